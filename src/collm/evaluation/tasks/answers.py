"""Extract the answer from a generated text. Each function takes time proportional to the text."""

from __future__ import annotations

import re

NEXT_QUESTION = ("\n\nQuestion:", "\n\nProblem:", "\n\nQ:")
"""Stop strings: the model continues with a question of its own."""

_NEXT_QUESTION = re.compile(r"^[ \t]*(?:Question|Problem|Q)(?: \d{1,4})?:", re.MULTILINE)
_STATED = re.compile(r"\b(?:answer\s{1,9}is\b|final\s{1,9}answer\s{0,9}:)", re.IGNORECASE)
_BRACE = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\.|[{}]", re.DOTALL)
_BARE_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z{])[ \t]*([^\s${}][^\n$]*)")


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


def boxed(text: str) -> str | None:
    r"""The content of the last complete \boxed{...} or \fbox{...}, or of the last "\boxed 5"; None if there is none."""
    opened: list[int | None] = []  # for each open brace the start of its box; None for other braces
    box: tuple[int, int] | None = None
    for brace in _BRACE.finditer(text):
        if brace["box"]:
            opened.append(brace.end())
        elif brace[0] == "{":
            opened.append(None)
        elif brace[0] == "}" and opened:
            start = opened.pop()
            if start is not None and (box is None or start > box[0]):
                box = start, brace.start()
    if box is not None:
        return text[slice(*box)].strip()
    bare = _BARE_BOX.findall(text)
    return bare[-1].strip().rstrip(".") if bare else None
