"""GSM8K with a fixed split, and the calculator marks in its solutions."""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from torch import Tensor, split

from collm.errors import DataError
from collm.evaluation.intervals import Interval, ratio_interval
from collm.training.data import Row, load_rows

HUB_NAME = "openai/gsm8k:main"
VALIDATION_ROWS = 300
VALIDATION_SEED = 20_240_306

MARK = re.compile(r"<<([^<>=]+)=([^<>=]+)>>")
"""A calculator mark: its expression and its result."""

_NUMBER = re.compile(r"[0-9]+\.?[0-9]*|\.[0-9]+")
_ARITHMETIC = re.compile(r"[0-9.+\-*/() ]+")


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


def is_right(expression: str, result: str) -> bool:
    """Whether a mark's result equals its expression's value, or is rounded or cut at two or more decimals."""
    value, stated = (evaluate(text.replace(",", "").strip()) for text in (expression, result))
    if value is None or stated is None:
        return False
    places = len(result.strip().partition(".")[2])
    return value == stated or (places >= 2 and abs(value - stated) < Fraction(1, 10**places))


def mark_score(prediction: str, reference: str) -> float:
    """Share of a solution's marks that are right; 0 without marks. Calibration uses this metric."""
    marks = MARK.findall(prediction)
    return sum(is_right(*mark) for mark in marks) / len(marks) if marks else 0.0


def equations(right: Tensor, spans: Sequence[Sequence[range]], counts: Sequence[int]) -> Interval:
    """Share of results whose tokens are all right. The interval treats each solution as one unit.

    Args:
        right: whether each target token is right, bool, shape (M,).
        spans: positions of the results of each solution.
        counts: number of target tokens of each solution.
    """
    each = [
        [bool(part[span.start : span.stop].all()) for span in of_one]
        for part, of_one in zip(split(right, list(counts)), spans, strict=True)
    ]
    return ratio_interval([sum(one) for one in each], [len(one) for one in each])


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
