"""Multiple choice with a chain of thought."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from collm.errors import DataError
from collm.evaluation.metrics import contains
from collm.evaluation.tasks.answers import NEXT_QUESTION, before_next_question, boxed, stated_answer
from collm.evaluation.tasks.task import Task, TaskItem
from collm.training.data import load_records
from collm.training.formats import text_field

INSTRUCTION = 'Think step by step and end with "The final answer is: X", where X is the letter of the right choice.'

_MARKUP = re.compile(r"\\(?:boxed|fbox|text|textbf|mathrm|mathbf)\b|\\[()\[\]]|[*_`$\"'{}]")
_INTRODUCTION = re.compile(
    r"(?:(?:the\s)?(?:correct\s|right\s|final\s)?(?:answer|option|choice)\b(?:\sis\b)?[\s:]{0,9}){0,3}", re.IGNORECASE
)
_MARKED_LETTER = re.compile(r"[(\[]([A-Z])[)\]]|([A-Z])(?:[).:,;]|$)")
_BARE_LETTER = re.compile(r"([B-HJ-Z])\s")  # "A" and "I" may be words
_MAX_CHARACTERS = 1000  # of a line that names a choice


class MultipleChoice(Task):
    """Rows {"question", "choices", "answer"}.

    Choices are a list, or a mapping from letters. The answer is a letter, an index from 0, or the text of a choice.

    Measures: `accuracy`; `unparsed`, 1 if the text names no choice.
    """

    name = "multiple_choice"
    measure = "accuracy"
    max_new_tokens = 1024
    stop = NEXT_QUESTION
    format = None

    def read(self, source: str | Path, split: str | None) -> list[TaskItem]:
        records = load_records(source, split=split)
        return [_item(str(n), where, record) for n, (where, record) in enumerate(records, 1)]

    def score(self, item: TaskItem, text: str) -> dict[str, float]:
        letter = chosen_letter(text, item.reference["choices"])
        return {"accuracy": float(letter == item.reference["answer"]), "unparsed": float(letter is None)}


def chosen_letter(text: str, choices: Mapping[str, str]) -> str | None:
    """The letter of the choice after the last "answer is", in the last box, or in the last line.

    A choice is named by its letter ("(B)", "B.", "**B**") or its text. None if none of these places names exactly one.
    """
    text = before_next_question(text)
    for place in (stated_answer(text), boxed(text)):
        words = _words(place or "")
        letter = _marked_letter(words, choices) or _told(words, choices)
        if letter:
            return letter
    words = _words(text.rstrip().rpartition("\n")[2])
    alone: set[str | None] = {letter for letter, choice in choices.items() if _folded(choice) == _folded(words)}
    named = alone or set(re.findall(r"[(\[]([A-Z])[)\]]", words)) or {_marked_letter(words, choices)}
    return named.pop() if len(named) == 1 and named <= set(choices) else None


def _words(line: str) -> str:
    """The line without markup and without "answer:" or the like before the choice."""
    plain = _MARKUP.sub("", line[:_MAX_CHARACTERS]).strip()
    introduction = _INTRODUCTION.match(plain)
    words = plain[introduction.end() :] if introduction else plain
    return words.upper() if len(words) <= 3 else words  # "(b)"


def _marked_letter(words: str, choices: Mapping[str, str]) -> str | None:
    marked = _MARKED_LETTER.match(words)
    letter = marked and (marked[1] or marked[2])
    return letter if letter in choices else None


def _told(words: str, choices: Mapping[str, str]) -> str | None:
    """The choice whose text the words begin with, or whose letter, or else the only one whose text is in them."""
    told = _folded(words)
    texts = {letter: _folded(choice) for letter, choice in choices.items()}
    begun = [
        letter for letter, text in texts.items() if told.startswith(text) and contains(told[: len(text) + 1], text)
    ]
    if begun:
        return max(begun, key=lambda letter: len(texts[letter]))
    bare = _BARE_LETTER.match(words)
    if bare and bare[1] in choices:
        return bare[1]
    inside = [letter for letter, text in texts.items() if contains(told, text)]
    whole = [one for one in inside if not any(contains(texts[other], texts[one]) for other in inside if other != one)]
    return whole[0] if len(whole) == 1 else None  # "York" is not named by "New York"


def _folded(text: str) -> str:
    return " ".join(_MARKUP.sub("", text).casefold().split()).rstrip(" .")


def _item(id: str, where: str, record: Mapping[str, Any]) -> TaskItem:  # noqa: A002
    question = text_field(where, record, "question", "expected question, choices and answer").strip()
    choices = _choices(where, record.get("choices"))
    answer = record.get("answer")
    right = _letters_meant(answer, choices)
    if len(right) != 1:
        raise DataError(
            f"{where}: 'answer' is {answer!r:.40}, which means {len(right)} of the choices; expected a letter, a place "
            "from 0 or a text that means one"
        )
    listed = "\n".join(f"{letter}. {choice}" for letter, choice in choices.items())
    prompt = f"{question}\n\n{listed}\n\n{INSTRUCTION}"
    return TaskItem(id, prompt, {"choices": choices, "answer": right.pop()}, where)


def _choices(where: str, found: Any) -> dict[str, str]:
    """Letter -> text."""
    if isinstance(found, Mapping):
        choices = {str(letter).upper(): choice for letter, choice in found.items()}
    elif isinstance(found, Sequence) and not isinstance(found, str):
        choices = dict(zip(string.ascii_uppercase, found, strict=False))
    else:
        choices = {}
    usable = all(isinstance(choice, str) and choice.strip() for choice in choices.values())
    if not usable or not 2 <= len(choices) == len(found) or not set(choices) <= set(string.ascii_uppercase):
        raise DataError(f"{where}: 'choices' is {found!r:.80}, expected 2 to 26 texts, in a list or by letter")
    return {letter: choice.strip() for letter, choice in choices.items()}


def _letters_meant(answer: Any, choices: Mapping[str, str]) -> set[str]:
    """The letters of the choices that match an answer."""
    if isinstance(answer, int) and not isinstance(answer, bool):
        return set(list(choices)[answer : answer + 1]) if answer >= 0 else set()
    if not isinstance(answer, str):
        return set()
    named = {answer.strip().upper()} & set(choices)
    return named | {letter for letter, choice in choices.items() if _folded(choice) == _folded(answer)}
