"""GSM8K with a fixed split and template, and arithmetic with the distribution of its calculator marks."""

from __future__ import annotations

import ast
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from itertools import islice
from pathlib import Path

from collm.errors import DataError
from collm.models.template import PromptTemplate
from collm.training.data import Row, load_rows

HUB_NAME = "openai/gsm8k:main"
VALIDATION_ROWS = 300
VALIDATION_SEED = 20_240_306
TEMPLATE = PromptTemplate("{prompt}\n")

MARK = re.compile(r"<<([^<>=]+)=([^<>=]+)>>")
"""A calculator mark: its expression and its result."""

_NUMBER = re.compile(r"[0-9]+\.?[0-9]*|\.[0-9]+")
_ARITHMETIC = re.compile(r"[0-9.+\-*/() ]+")
_MOST_DRAWS = 300
_COPIED_OPERANDS = 0.5


@dataclass(frozen=True)
class Problems:
    """The rows of GSM8K: for training, for validation (held out from training), and for tests."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]


def load_problems(source: str | Path = HUB_NAME, *, validation_rows: int = VALIDATION_ROWS) -> Problems:
    """Read GSM8K. The same rows of its training split are held out for validation every time.

    Args:
        source: a directory with train.jsonl and test.jsonl, or the name of a Hub data set with these splits.
        validation_rows: number of rows to hold out.

    Raises:
        DataError: `source` has no usable data, or its training split has too few rows.
    """
    train = _load_split(source, "train")
    if len(train) <= validation_rows:
        raise DataError(
            f"{source} has {len(train)} training rows, expected more than the {validation_rows} to hold out"
        )
    held_out = set(random.Random(VALIDATION_SEED).sample(range(len(train)), validation_rows))
    return Problems(
        train=[row for i, row in enumerate(train) if i not in held_out],
        validation=[train[i] for i in sorted(held_out)],
        test=_load_split(source, "test"),
    )


def _load_split(source: str | Path, split: str) -> list[Row]:
    file = Path(source) / f"{split}.jsonl"
    data, name = (file, None) if Path(source).is_dir() else (source, split)
    return load_rows(data, split=name, prompt_field="question", completion_field="answer")


def text_of(row: Row) -> str:
    """Problem and solution as one text. The problem is rendered by `TEMPLATE`."""
    return TEMPLATE.text.replace("{prompt}", str(row.prompt)) + row.completion


class Arithmetic:
    """Generates new marks with the distribution of existing ones.

    A new mark has the operators and parentheses of a random existing mark, and operands with the same numbers of digits
    before and after the point. Half of the operands are copied from existing operands with these numbers of digits,
    because percentages and units occur often. The other half are drawn digit by digit. A result is exact. It has the
    sign of the existing result, and is an integer if that was an integer.

    Args:
        texts: texts that contain marks.

    Raises:
        DataError: the texts contain no marks.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        marks = [match for text in texts for match in MARK.findall(text)]
        self._forms = [form for form in (_Form.of(*mark) for mark in marks) if form is not None]
        if not self._forms:
            raise DataError(f"no calculator mark such as <<48/2=24>> in {len(texts)} texts; expected at least one")
        self._operands: dict[tuple[int, int], list[str]] = defaultdict(list)
        for expression, _ in marks:
            for operand in _NUMBER.findall(expression):
                self._operands[_digits(operand)].append(operand)

    def lines(self, seed: int | str, count: int | None = None) -> Iterator[str]:
        """Yield lines such as "<<48/2=24>>24": `count` of them, or endlessly. The same seed gives the same lines."""
        return islice(self._endless(random.Random(f"arithmetic {seed}")), count)

    def _endless(self, rng: random.Random) -> Iterator[str]:
        while True:
            form = rng.choice(self._forms)
            for _ in range(_MOST_DRAWS):
                operands = [self._operand(digits, rng) for digits in form.operands]
                result = form.result(operands)
                if result is not None:
                    yield f"<<{form.expression(operands)}={result}>>{result}"
                    break

    def _operand(self, digits: tuple[int, int], rng: random.Random) -> str:
        if rng.random() < _COPIED_OPERANDS:
            return rng.choice(self._operands[digits])
        before, after = digits
        whole = str(rng.randrange(10 ** (before - 1) if before > 1 else int(not after), 10**before)) if before else ""
        return whole + ("." + "".join(rng.choices("0123456789", k=after)) if after else "")


@dataclass(frozen=True)
class _Form:
    """A mark without its operands.

    Attributes:
        between: text before, between and after the operands.
        operands: numbers of digits before and after the point of each operand.
        places: largest number of digits after the point of a result; 0 if results are integers.
        negative: whether results are negative.
    """

    between: list[str]
    operands: list[tuple[int, int]]
    places: int
    negative: bool

    @classmethod
    def of(cls, expression: str, result: str) -> _Form | None:
        """The form of a mark; None if it is not arithmetic."""
        operands = _NUMBER.findall(expression)
        value, stated = evaluate(expression), evaluate(result)
        if not operands or value is None or stated is None or value != stated:
            return None
        places = 0 if value.denominator == 1 else max(2, len(result.partition(".")[2]))
        return cls(_NUMBER.split(expression), [_digits(operand) for operand in operands], places, value < 0)

    def expression(self, operands: Sequence[str]) -> str:
        return self.between[0] + "".join(
            operand + after for operand, after in zip(operands, self.between[1:], strict=True)
        )

    def result(self, operands: Sequence[str]) -> str | None:
        """The result for these operands; None if it does not match the form."""
        value = evaluate(self.expression(operands))
        if value is None or (value < 0) != self.negative or (value.denominator == 1) != (self.places == 0):
            return None
        return format_exact(value, most_places=self.places)


def _digits(operand: str) -> tuple[int, int]:
    before, _, after = operand.partition(".")
    return len(before), len(after)


def evaluate(expression: str) -> Fraction | None:
    """The exact value of an expression of +, -, *, / and parentheses; None if it is not one, or divides by 0."""
    if not _ARITHMETIC.fullmatch(expression):
        return None
    quoted = _NUMBER.sub(lambda match: f"('{match[0]}')", expression.strip())  # ast would round decimals
    try:
        return _value(ast.parse(quoted, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=str(number)):
            return Fraction(number)
        case ast.UnaryOp(op=ast.UAdd() | ast.USub() as sign, operand=operand):
            return -_value(operand) if isinstance(sign, ast.USub) else _value(operand)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _value(left) + _value(right)
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            return _value(left) - _value(right)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _value(left) * _value(right)
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            return _value(left) / _value(right)
        case _:
            raise ValueError(f"{ast.dump(node)[:40]} is not arithmetic")


def format_exact(value: Fraction, *, most_places: int) -> str | None:
    """Format a number with as many decimal places as it needs; None if it needs more than `most_places`."""
    for places in range(most_places + 1):
        scaled = value * 10**places
        if scaled.denominator == 1:
            return f"{Decimal(scaled.numerator).scaleb(-places):f}"
    return None
