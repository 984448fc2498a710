"""GSM8K: the final number of a solution."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

from collm.errors import ConfigError, DataError
from collm.evaluation.metrics import numbers_in
from collm.evaluation.tasks.task import Task, TaskItem
from collm.training.data import Row
from collm.training.formats import CALCULATOR_MARK

NEXT_QUESTION = ("\n\nQuestion:", "\n\nProblem:", "\n\nQ:")
"""Stop strings: the model continues with a question of its own."""

_NEXT_QUESTION = re.compile(r"^[ \t]*(?:Question|Problem|Q)(?: \d{1,4})?:", re.MULTILINE)
_STATED = re.compile(r"\b(?:answer\s{1,9}is\b|final\s{1,9}answer\s{0,9}:)", re.IGNORECASE)
_MARKED = re.compile(r"####[ \t]*(?=[^\w\n]{0,4}\d)")
_FORMATS = ("gsm8k", "gsm8k-plain")


@dataclass(frozen=True)
class Gsm8k(Task):
    """GSM8K (openai/gsm8k).

    Measures: `accuracy`, 1 if the final number has the reference's value; `unparsed`, 1 if there is no final number.

    Attributes:
        format: format of few-shot examples: gsm8k, or gsm8k-plain without calculator marks.
    """

    format: str = "gsm8k"

    name = "gsm8k"
    measure = "accuracy"
    source = "openai/gsm8k"
    max_tokens = 400
    stop = NEXT_QUESTION

    def __post_init__(self) -> None:
        if self.format not in _FORMATS:
            raise ConfigError(f"format of task 'gsm8k' is {self.format!r}, expected {' or '.join(_FORMATS)}")

    def reference(self, row: Row) -> str:
        numbers = numbers_in(row.completion.rpartition("####")[2])
        if "####" not in row.completion or len(numbers) != 1:
            raise DataError(f"{row.where}: 'answer' ends with {row.completion[-40:]!r}, expected '####' and one number")
        return str(numbers[0])

    def score(self, item: TaskItem, text: str) -> dict[str, float]:
        number = final_number(text)
        return {"accuracy": float(number == Decimal(item.reference)), "unparsed": float(number is None)}


def final_number(text: str) -> Decimal | None:
    """The number after the first "####", or after the last "the answer is", or the last number.

    Calculator marks and further questions are ignored. For a sum ("5*3 = 15") the result counts. `metrics.last_number`
    describes what is ignored around a number. A stated answer without a number, such as one in words, gives None.
    """
    text = CALCULATOR_MARK.sub("", before_next_question(text))
    marked = _MARKED.search(text)
    stated = text[marked.end() :] if marked else stated_answer(text)
    if stated is None:
        return next(reversed(numbers_in(text)), None)
    line = first_line(stated)
    return next(iter(numbers_in(line.rpartition("=")[2]) or numbers_in(line)), None)


def before_next_question(text: str) -> str:
    """The text before another question. A question at the very beginning is a repetition of the prompt."""
    words = len(text) - len(text.lstrip())
    found = _NEXT_QUESTION.search(text, words + 1)
    return text[: found.start()] if found else text


def first_line(text: str) -> str:
    """The first line that is not empty, without emphasis."""
    return text.lstrip(" \t\r\n:*_").split("\n", 1)[0].strip(" \t\r*_")


def stated_answer(text: str) -> str | None:
    """The line after the last "answer is" or "final answer:"; None if there is neither."""
    stated = list(_STATED.finditer(text))
    return first_line(text[stated[-1].end() :]) if stated else None
