"""Chats about sums, made by a program: what a real base learns to leave to the calculator."""

from __future__ import annotations

import random
from dataclasses import dataclass
from fractions import Fraction
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
    most: tuple[int, int, int] = (999, 99, 99)


KINDS = (
    Kind("What is {a} * {b}?", "{= {a} * {b}}"),
    Kind("Calculate {a} times {b}.", "{= {a} * {b}}"),
    Kind("What is {a} + {b}?", "{= {a} + {b}}", (9999, 9999, 1)),
    Kind("How much is {a} minus {b}?", "{= {a} - {b}}", (9999, 999, 1)),
    Kind("Compute ({a} - {b}) * {c}.", "{= ({a} - {b}) * {c}}", (999, 99, 99)),
    Kind("What is {a}% of {b}?", "{= {a}% * {b}}", (95, 999, 1)),
    Kind("Add up {a}, {b} and {c}.", "{= {a} + {b} + {c}}", (999, 999, 999)),
    Kind(
        "A ticket costs ${b}. How much do {a} tickets cost?",
        "{a} tickets at ${b} each cost {= {a} * ${b}}.",
        (300, 99, 1),
    ),
    Kind(
        "{name} has {a} boxes with {b} {thing} each. How many {thing} does {name} have?",
        "{name} has {= {a} * {b}} {thing}.",
        (99, 99, 1),
    ),
    Kind(
        "{name} had {a} {thing} and found {b} more. How many {thing} are there now?",
        "Now there are {= {a} + {b}} {thing}.",
        (999, 999, 1),
    ),
    Kind(
        "There are {b} shelves with {a} books on each, and {c} books are lent out. How many books are left?",
        "There are {= {a} * {b}} books in all. After lending, {= {a} * {b} - {c}} are left.",
        (99, 99, 99),
    ),
    Kind(
        "{name} earns ${a} a day. How much is that in {b} days?",
        "In {b} days {name} earns {= {b} * ${a}}.",
        (300, 60, 1),
    ),
)
"""What is learned from."""

UNSEEN = (
    Kind("Please work out {a} x {b} for me.", "{= {a} * {b}}"),
    Kind(
        "A baker bakes {a} loaves every day. How many loaves is that in {b} days?",
        "In {b} days the baker bakes {= {a} * {b}} loaves.",
        (300, 60, 1),
    ),
    Kind(
        "{name} buys {a} {thing} for ${b} each. What does {name} pay?",
        "{name} pays {= {a} * ${b}}.",
        (99, 60, 1),
    ),
    Kind(
        "If I have {a} {thing} and give away {b}, how many are left?", "{= {a} - {b}} {thing} are left.", (999, 99, 1)
    ),
)
"""Forms of questions that no training row has."""

TALK = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Hello!", "Hello! How can I help you today?"),
    ("Who wrote Romeo and Juliet?", "Romeo and Juliet was written by William Shakespeare."),
    ("Name three colours of the rainbow.", "Three colours of the rainbow are red, yellow and blue."),
    ("What do bees make?", "Bees make honey."),
    ("Which planet is closest to the sun?", "The planet closest to the sun is Mercury."),
    ("Thank you!", "You're welcome! Is there anything else I can help you with?"),
    ("What is water made of?", "Water is made of hydrogen and oxygen."),
)
"""Without any sums, so that the base does not forget how to talk."""


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
