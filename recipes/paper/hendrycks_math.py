"""Hendrycks MATH: the boxed answer of a solution."""

from __future__ import annotations

import re

from collm.errors import DataError
from collm.evaluation.tasks.gsm8k import NEXT_QUESTION, before_next_question, stated_answer
from collm.evaluation.tasks.task import Task, TaskItem
from collm.training.data import Row
from recipes.paper.equivalence import Equivalence

_BRACE = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\.|[{}]", re.DOTALL)
_BARE_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z{])[ \t]*([^\s${}][^\n$]*)")


class HendrycksMath(Task):
    """MATH (EleutherAI/hendrycks_math).

    Measures: `accuracy`, 1 if math-verify finds the final answer equal to the reference; `unparsed`, 1 if there is no
    final answer.

    Raises:
        ConfigError: math-verify is not installed.
    """

    name = "math"
    measure = "accuracy"
    source = "EleutherAI/hendrycks_math"
    max_tokens = 1024
    stop = NEXT_QUESTION
    format = "recipes.paper.formats:MATH"

    def __init__(self) -> None:
        self._equal = Equivalence()

    def reference(self, row: Row) -> str:
        answer = boxed(row.completion)
        if not answer:
            raise DataError(f"{row.where}: no \\boxed{{...}} in 'solution', expected the answer in one")
        return answer

    def score(self, item: TaskItem, text: str) -> dict[str, float]:
        answer = final_answer(text)
        return {"accuracy": float(bool(answer) and self._equal(item.reference, answer)), "unparsed": float(not answer)}


def final_answer(text: str) -> str:
    """The content of the last box, or the sentence after the last "the answer is"; empty if there is neither."""
    text = before_next_question(text)
    answer = boxed(text)
    if answer is not None:
        return answer
    return (stated_answer(text) or "").partition(". ")[0].rstrip(".").strip().strip("$").strip()


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
