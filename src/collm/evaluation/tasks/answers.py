"""Finding the answer in what a model wrote; each function takes time proportional to the text."""

from __future__ import annotations

import re

NEXT_QUESTION = ("\n\nQuestion:", "\n\nProblem:", "\n\nQ:")
"""Where a model goes on with a question of its own; its answer is over."""

_NEXT_QUESTION = re.compile(r"^[ \t]*(?:Question|Problem|Q)(?: \d{1,4})?:", re.MULTILINE)
_STATED = re.compile(r"\b(?:answer\s{1,9}is\b|final\s{1,9}answer\s{0,9}:)", re.IGNORECASE)
_BRACE = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\.|[{}]", re.DOTALL)
_BARE_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z{])[ \t]*([^\s${}][^\n$]*)")


def before_next_question(text: str) -> str:
    """The text up to the line where another question begins; one it begins with is the prompt, repeated."""
    words = len(text) - len(text.lstrip())
    found = _NEXT_QUESTION.search(text, words + 1)
    return text[: found.start()] if found else text


def first_line(text: str) -> str:
    """The first line with something on it, without what emphasises it."""
    return text.lstrip(" \t\r\n:*_").split("\n", 1)[0].strip(" \t\r*_")


def stated_answer(text: str) -> str | None:
    """The line that follows the last "answer is" or "final answer:"; None if it says neither."""
    stated = list(_STATED.finditer(text))
    return first_line(text[stated[-1].end() :]) if stated else None


def boxed(text: str) -> str | None:
    r"""What the last complete \boxed{...} or \fbox{...} holds, else the last "\boxed 5"; None without one."""
    opened: list[int | None] = []  # per open brace, where its box begins; None for another brace
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
