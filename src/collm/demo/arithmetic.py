"""Generated chats about sums, for a base that learns to use the calculator."""

from __future__ import annotations

import csv
import random
from dataclasses import dataclass
from fractions import Fraction
from importlib import resources
from typing import Any

from collm.tools.calculator import calculator

NAMES = (
    "Ana",
    "Ben",
    "Chloe",
    "David",
    "Emma",
    "Farid",
    "Grace",
    "Hugo",
    "Ines",
    "Jonas",
    "Kofi",
    "Lena",
    "Mei",
    "Noah",
)
THINGS = ("pencils", "marbles", "stickers", "cards", "apples", "books", "coins", "shells", "beads", "stamps")


@dataclass(frozen=True)
class Kind:
    """Questions of one form.

    Attributes:
        question: with the fields {a}, {b}, {c}, {name}, {thing}.
        answer: likewise; every `{= expression}` in it becomes `expression = result`.
        most: largest value of each number.
    """

    question: str
    answer: str
    most: tuple[int, int, int]


def _read_csv(name: str) -> list[dict[str, str]]:
    text = (resources.files("collm.demo") / "data" / name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def _kinds(split: str) -> tuple[Kind, ...]:
    rows = (row for row in _read_csv("sums.csv") if row["split"] == split)
    return tuple(Kind(row["question"], row["answer"], (int(row["a"]), int(row["b"]), int(row["c"]))) for row in rows)


KINDS = _kinds("train")
"""Forms of questions for training."""
UNSEEN = _kinds("test")
"""Forms of questions that no training row has."""
TALK = tuple((row["question"], row["answer"]) for row in _read_csv("talk.csv"))
"""Chats without sums, so that the base does not forget how to talk."""


@dataclass(frozen=True)
class Sum:
    """A question, its answer, and the number that the answer must end with."""

    question: str
    answer: str
    result: Fraction

    @property
    def chat(self) -> dict[str, Any]:
        """A row of training data."""
        turns = (("user", self.question), ("assistant", self.answer))
        return {"messages": [{"role": role, "content": content} for role, content in turns]}


def sums(kinds: tuple[Kind, ...], count: int, seed: int) -> list[Sum]:
    """Questions of all kinds in turn; the same seed gives the same ones."""
    rng = random.Random(f"sums {seed}")
    return [_sum(kinds[i % len(kinds)], rng) for i in range(count)]


def chats(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows to learn from: sums, and every tenth row talk."""
    rng = random.Random(f"chats {seed}")
    made = sums(KINDS, count, seed)
    rows = []
    for i, one in enumerate(made):
        talk = Sum(*TALK[i // 10 % len(TALK)], Fraction(0))
        rows.append((talk if i % 10 == 9 else one).chat)
    rng.shuffle(rows)
    return rows


def _sum(kind: Kind, rng: random.Random) -> Sum:
    b, c = (rng.randint(2, most) if most > 1 else 1 for most in kind.most[1:])
    a = rng.randint(min(b + 1, kind.most[0]) if " - " in kind.answer else 2, kind.most[0])
    words = {"{a}": a, "{b}": b, "{c}": c, "{name}": rng.choice(NAMES), "{thing}": rng.choice(THINGS)}
    question, answer = kind.question, kind.answer
    for field, value in words.items():
        question, answer = question.replace(field, str(value)), answer.replace(field, str(value))
    parts = answer.split("{= ")
    text, result = parts[0], Fraction(0)
    for part in parts[1:]:
        expression, _, rest = part.partition("}")
        text += f"{expression} ="
        written = calculator(text)
        assert written is not None, text
        result = Fraction(written.strip(" $").replace(",", ""))
        text += written + rest
    return Sum(question, text if text.endswith(".") else text + ".", result)
