"""The calculator, which completes expressions in GSM8K's styles: `<<48/2=24>>24` and `48 / 2 = 24`."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from fractions import Fraction
from itertools import accumulate
from typing import NamedTuple

_CONTEXT_CHARS = 500  # characters at the end of the text to read
_MAX_EXPRESSION = 200  # characters per expression
_MAX_DEPTH = 20  # nested parentheses
_MAX_DIGITS = 30  # digits of a number in the expression, and of a result before its decimal point
_MAX_PLACES = 8  # decimals of a result

_SIGNS = str.maketrans("\u00d7\u00b7\u00f7\u2212\u2013\u00a0\u201c\u2018", "**/-- \"'")
_MONEY = ("$", "€", "£")
_ENDS = (">>", *(f"={space}{money}" for space in ("", " ") for money in ("", *_MONEY)))
_NUMBER = r"(?:(?:\d{1,3}(?:,\d{3})+(?!,?\d)|\d+)(?:\.\d+)?|\.\d+)"
_TOKEN = re.compile(
    rf"[ \t]+|0[xX]\w+|(?P<money>[$€£][ ]?)?(?P<number>{_NUMBER})(?P<percent>[ ]?%)?"
    r"|(?P<sign>[-+*/()]|[xX](?![A-Za-z_]))|[A-Za-z_]\w*|.",
    re.ASCII | re.DOTALL,
)

_ITEM = re.compile(r"\s{0,40}(?:[-*]|\w{1,3}\))\s+\Z")  # the beginning of a list item
_MAY_PRECEDE = "([{:;=>|~\"'"
_BELONGS_TO_MORE = re.compile(r"[\^√\\%]\s*\Z|[\d%)]\s*of\s+\Z")  # the expression is part of a larger one
_SPLIT = re.compile(r"\d(?:,\s+\d{3}|:\d\d)(?!\d)")  # a split number such as 14, 400, or a time of day
_STACKED = re.compile(r"/\s+[$€£]?[\d.,]+/")  # 2 / 3/4 means 2 / (3/4)

_ADJACENT = re.compile(r"[n)][n(]")  # in kinds of tokens
_NO_EXPRESSION = re.compile(r"(?<![n)])-(?![n(])|x-")  # two minuses before a number, or 2x - 3, where x is a variable

_WRITTEN_NUMBER = re.compile(rf"-?{_NUMBER}\Z", re.ASCII)
_MARKS = re.compile(r"<<[^<>]*>>")
_RESULT = re.compile(rf"=[ ]?[$€£]?-?({_NUMBER})", re.ASCII)
_AMOUNT = re.compile(rf"[$€£]({_NUMBER})", re.ASCII)
_CENTS = re.compile(r"\.\d0\Z", re.ASCII)
_BELOW_ONE = re.compile(r"(?<![\d,])(0?)\.\d", re.ASCII)
_THOUSANDS = re.compile(r"(?<![\d.,])(?:\d{1,3}((?:,\d{3})+)|\d{4,})(?!\d)", re.ASCII)


def calculator(text: str, *, plain: bool = True) -> str | None:
    """Compute the expression at the end of a text.

    After `<<48/2=` follows `24>>24`, and after `<<2/3=.66>>` follows `.66`. Outside of marks, ` 24` follows `48 / 2 =`,
    `24` follows `48/2=` and `48/2= `, and `0.20` follows `12 / 60 = $`.

    An expression consists of numbers, + - * / (or x and other common signs), parentheses, and minuses before a number
    or a parenthesis. Numbers may be decimals (`.5`), have thousands commas, percent (20% is 0.2) and $ € £. It has at
    most 200 characters, numbers of 30 digits and 20 nested parentheses. In a mark it may be a single number or begin
    with a plus. Outside of marks it is the longest one on the line before the `=` that has an operation or a percent
    sign. It must not continue something that is no number (`3 apples + 4 =`), nor directly follow a word, number or
    power.

    The result is exact with up to 8 decimals. A longer one is rounded half up to two decimals, below 0.1 to two
    significant digits. Outside of marks it has the unit of the expression: $ for $5 * 3, none for $6 / $2, and % for
    sums and products of percents, a percent divided by a number, and a number times 100%.

    Numbers have the style of the last 500 characters: thousands commas, outside of marks, if the last number of four
    digits or more has them; `.5` or `0.5` like the last decimal below one; no trailing zeros, but two decimals for
    money that has any, or that follows a result such as 4.50 or, if the expression has no decimals, such as $4.50.

    Args:
        text: the text so far.
        plain: whether to answer outside of marks too.

    Returns:
        The text that follows, or None if the text does not end with a valid expression.
    """
    if not text.endswith(_ENDS):
        return None
    context = text[-_CONTEXT_CHARS:].translate(_SIGNS)
    line = context[context.rfind("\n") + 1 :]
    opened = line.rfind("<<")
    if opened > line.rfind(">>") or line.endswith(">>"):
        return _marked(context[: len(context) - len(line) + opened], line[opened + 2 :]) if opened >= 0 else None
    return _after_equals(context, line) if plain else None


def _marked(before: str, inside: str) -> str | None:
    """The remainder of a mark and the number after it; for a complete mark only if its result is correct."""
    expression, equals, stated = inside.removesuffix(">>").partition("=")
    if not equals or len(expression) > _MAX_EXPRESSION:
        return None
    kinds, _, quantities = _tokens(expression.removeprefix("+"))
    result = _evaluate(kinds, quantities)
    if result is None:
        return None
    if not inside.endswith(">>"):
        written = None if stated else _write(result.value, before, expression, money=before.endswith(_MONEY))
        return None if written is None else f"{written}>>{_with_commas(written, before)}"
    if len(stated) > 2 * _MAX_DIGITS or not _WRITTEN_NUMBER.match(stated):
        return None
    number = stated.replace(",", "")
    places, error = len(number.partition(".")[2]), abs(Fraction(number) - result.value)
    is_right = error == 0 or (places >= 2 and error < Fraction(1, 10**places))
    return _with_commas(stated, before) if is_right else None


def _after_equals(context: str, line: str) -> str | None:
    """The result of the longest expression before the last `=` of the line, with its unit."""
    prefix, _, suffix = line.rpartition("=")
    before, given = prefix.rstrip(" \t"), suffix.strip()
    if not before.endswith(tuple("0123456789)%")):
        return None
    since = max(len(before) - _MAX_EXPRESSION, 0)
    kinds, places, quantities = _tokens(before, since)
    start = _start(kinds, places, before)
    if start is None or (start == 0 and since > 0):
        return None
    expression, count = before[places[start] :], kinds.count("n", start)
    result = _evaluate(kinds[start:], quantities[len(quantities) - count :])
    if result is None or (count == 1 and not result.percent) or _STACKED.search(expression):
        return None
    percent = result.percent and count > 1
    if given and (percent or result.money not in ("", given)):
        return None
    value, is_money = result.value * 100 if percent else result.value, bool(given or result.money)
    written = _write(value, context, expression, money=is_money)
    if written is None:
        return None
    space = " " if prefix != before and not suffix else ""
    minus = "-" if written.startswith("-") else ""
    number = _with_commas(written.removeprefix("-"), context)
    return f"{space}{minus}{'' if given else result.money}{number}{'%' if percent else ''}"


class _Quantity(NamedTuple):
    """A number with its unit."""

    value: Fraction
    money: str = ""
    percent: bool = False

    def plus(self, other: _Quantity) -> _Quantity:
        return _Quantity(self.value + other.value, self._money(other), self.percent and other.percent)

    def minus(self, other: _Quantity) -> _Quantity:
        return self.plus(other._replace(value=-other.value))

    def times(self, other: _Quantity) -> _Quantity:
        money = self._money(other)
        percent = (self.percent and other.percent) or _Quantity(Fraction(1), percent=True) in (self, other)
        return _Quantity(self.value * other.value, money, percent and not money)

    def over(self, other: _Quantity) -> _Quantity:
        money = self._money(other)
        return _Quantity(self.value / other.value, "" if other.money else money, self.percent and not other.percent)

    def _money(self, other: _Quantity) -> str:
        if self.money and other.money and self.money != other.money:
            raise ValueError
        return self.money or other.money


def _tokens(text: str, since: int = 0) -> tuple[str, list[int], list[_Quantity]]:
    """The tokens of a text: their kinds (n for a number, ? for no sign), their positions, and the numbers."""
    kinds, places, quantities = "", [], []
    for match in _TOKEN.finditer(text, since):
        if match[0].isspace():
            continue
        number, kind = match["number"], (match["sign"] or "?").lower()
        if number and len(number) <= _MAX_DIGITS and not re.match(r"0\d", number):
            value, percent, kind = Fraction(number.replace(",", "")), match["percent"] is not None, "n"
            quantities.append(_Quantity(value / 100 if percent else value, (match["money"] or "").strip(), percent))
        kinds += kind
        places.append(match.start())
    return kinds, places, quantities


def _start(kinds: str, places: list[int], text: str) -> int | None:
    """Index of the first token of the longest expression at the end; None if there is none."""
    depth, start = 0, len(kinds)
    while start > 0 and kinds[start - 1] != "?":
        if depth == 0 and _ADJACENT.match(kinds, start - 1):
            break
        depth += {")": 1, "(": -1}.get(kinds[start - 1], 0)
        if depth < 0:
            break
        start -= 1
    if start == len(kinds) or depth > 0:
        return None
    if kinds[start] not in "n(" and _ITEM.match(text[: places[start + 1]]):
        start += 1
    prefix = text[: places[start]]
    if start > 0 and kinds[start - 1] in "n)" and not _ITEM.match(prefix):
        return None
    attached = prefix and not prefix[-1].isspace() and prefix[-1] not in _MAY_PRECEDE
    if attached or _BELONGS_TO_MORE.search(prefix) or _SPLIT.match(text, len(prefix.rstrip()) - 2):
        return None
    before = prefix.rstrip()[-1:]
    is_negative = kinds[start] == "-" and places[start + 1] == places[start] + 1 and before in _MAY_PRECEDE
    return start if is_negative or kinds[start] in "n(" else None


def _evaluate(kinds: str, quantities: list[_Quantity]) -> _Quantity | None:
    """The value of an expression, which is read as one of Python; None if these tokens are none."""
    nesting = accumulate((kind == "(") - (kind == ")") for kind in kinds)
    if _NO_EXPRESSION.search(kinds) or max(nesting, default=0) > _MAX_DEPTH:
        return None
    left = iter(quantities)

    def value(node: ast.expr) -> _Quantity:
        match node:
            case ast.Name():
                return next(left)
            case ast.UnaryOp(op=ast.USub()):
                number = value(node.operand)
                return number._replace(value=-number.value)
            case ast.BinOp() if type(node.op) in _OPERATIONS:
                return _OPERATIONS[type(node.op)](value(node.left), value(node.right))
        raise ValueError

    try:
        return value(ast.parse(" ".join(kinds.replace("x", "*")), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None


_OPERATIONS: dict[type[ast.operator], Callable[[_Quantity, _Quantity], _Quantity]] = {
    ast.Add: _Quantity.plus,
    ast.Sub: _Quantity.minus,
    ast.Mult: _Quantity.times,
    ast.Div: _Quantity.over,
}


def _write(value: Fraction, text: str, expression: str, *, money: bool) -> str | None:
    """Format a number in the style of the last ones of the text, without commas; None if it has too many digits."""
    places = next((n for n in range(_MAX_PLACES + 1) if (value * 10**n).denominator == 1), None)
    if places is None:
        places = next((n for n in range(2, _MAX_PLACES) if abs(value) * 10**n >= 10), _MAX_PLACES)
    if money and places < 2:
        amounts = [] if "." in expression else _AMOUNT.findall(_MARKS.sub("", text))[-1:]
        has_cents = any(_CENTS.search(amount) for amount in _RESULT.findall(text)[-1:] + amounts)
        places = 2 if places or has_cents else 0
    scaled = int(abs(value) * 10**places + Fraction(1, 2))
    whole, decimals = divmod(scaled, 10**places)
    if whole >= 10**_MAX_DIGITS or (value and not scaled):
        return None
    below_one = ["0", *_BELOW_ONE.findall(text + expression)]
    digits = str(whole) if whole or not places else below_one[-1]
    return f"{'-' if value < 0 else ''}{digits}{f'.{decimals:0{places}}' if places else ''}"


def _with_commas(written: str, text: str) -> str:
    """Add the commas that a formatted number has outside of marks."""
    thousands = ["", *_THOUSANDS.findall(_MARKS.sub("", text))]
    whole, point, decimals = written.partition(".")
    return f"{int(whole):,}{point}{decimals}" if thousands[-1] and whole.isdigit() else written
