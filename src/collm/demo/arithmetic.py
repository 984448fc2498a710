"""Generated chats about sums, for a base that learns to use the calculator."""

from __future__ import annotations

import csv
import random
from dataclasses import dataclass
from fractions import Fraction
from importlib import resources
from typing import Any

from collm.tools.calculator import calculator


def _read_csv(name: str) -> list[dict[str, str]]:
    text = (resources.files("collm.demo") / "data" / name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


_WORDS = _read_csv("words.csv")
NAMES, THINGS = [row["name"] for row in _WORDS], [row["thing"] for row in _WORDS if row["thing"]]

# Question and answer of a form have the fields {a}, {b}, {c}, {name} and {thing}. Columns a, b and c have the largest
# values. In the answer, `{= expression}` becomes `expression = result`.
_FORMS = _read_csv("sums.csv")
KINDS = [form for form in _FORMS if form["split"] == "train"]
"""Forms of questions for training."""
UNSEEN = [form for form in _FORMS if form["split"] == "test"]
"""Forms of questions that no training row has."""


@dataclass(frozen=True)
class Sum:
    """A question, its answer, and the number that the answer must end with."""

    question: str
    answer: str
    result: Fraction = Fraction(0)

    @property
    def chat(self) -> dict[str, Any]:
        """A row of training data."""
        turns = (("user", self.question), ("assistant", self.answer))
        return {"messages": [{"role": role, "content": content} for role, content in turns]}


TALK = [Sum(row["question"], row["answer"]) for row in _read_csv("talk.csv")]
"""Chats without sums, so that the base does not forget how to talk."""


def sums(kinds: list[dict[str, str]], count: int, seed: int) -> list[Sum]:
    """Questions of all kinds in turn; the same seed gives the same ones."""
    rng = random.Random(f"sums {seed}")
    return [_sum(kinds[i % len(kinds)], rng) for i in range(count)]


def chats(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows to learn from: sums, and every tenth row talk."""
    rows = sums(KINDS, count, seed)
    rows[9::10] = [TALK[i % len(TALK)] for i in range(count // 10)]
    random.Random(f"chats {seed}").shuffle(rows)
    return [row.chat for row in rows]


def _sum(form: dict[str, str], rng: random.Random) -> Sum:
    question, answer = form["question"], form["answer"]
    most = [int(form[number]) for number in "abc"]
    b, c = (rng.randint(2, largest) if largest > 1 else 1 for largest in most[1:])
    a = rng.randint(min(b + 1, most[0]) if " - " in answer else 2, most[0])
    words = {"{a}": a, "{b}": b, "{c}": c, "{name}": rng.choice(NAMES), "{thing}": rng.choice(THINGS)}
    for field, value in words.items():
        question, answer = question.replace(field, str(value)), answer.replace(field, str(value))
    text, *parts = answer.split("{= ")
    result = Fraction(0)
    for part in parts:
        expression, _, rest = part.partition("}")
        text += f"{expression} ="
        written = calculator(text)
        assert written is not None, text
        result = Fraction(written.strip(" $").replace(",", ""))
        text += written + rest
    return Sum(question, text if text.endswith(".") else text + ".", result)
