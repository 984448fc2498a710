"""Metrics of a generated text: `(prediction, reference) -> score`, a number in [0, 1]."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from numbers import Real

from collm.core.named import imported
from collm.errors import ConfigError

Metric = Callable[[str, str], float]

_NUMBER = re.compile(
    r"""
    (?P<sign> (?<![\w)]) [-+\u2212\u2013] )?  # in "5-3" and "(a)-3" the dash is no sign
    [$€£¥₹]?                                # "-$5"; in "$-5" the currency sign stands before the match
    (?P<digits>
        (?: \d{1,3} (?:,\d{3})+ (?!\d) | \d+ ) (?:\.\d+)?
      | (?<!\d) \.\d+
    )
    (?P<exponent> [eE][-+]?\d{1,4} )?
    """,
    re.VERBOSE,
)

_MINUS = str.maketrans("\u2212\u2013", "--")

# Letters and digits of scripts that put spaces between words. Thai and what follows in Unicode (Chinese,
# Japanese, Korean ...) attach words or particles, so a neighbour there says nothing about a word's border.
_SPACED_WORD_CHARACTER = r"[^\W\u0e00-\U0010ffff]"


def exact_match(prediction: str, reference: str) -> float:
    """1 if both texts are equal. A run of white space counts as one space, and white space at the ends is ignored."""
    return float(_normalised(prediction) == _normalised(reference))


def contains(prediction: str, reference: str) -> float:
    """1 if the prediction contains the reference as whole words ("Nigeria" does not contain "Niger").

    Only an empty prediction contains an empty reference. White space as in `exact_match`.
    """
    wanted = _normalised(reference)
    if not wanted:
        return exact_match(prediction, reference)
    # A word boundary is needed only where the reference has a word character: "%" can be next to anything.
    before = f"(?<!{_SPACED_WORD_CHARACTER})" if re.match(_SPACED_WORD_CHARACTER, wanted[0]) else ""
    after = f"(?!{_SPACED_WORD_CHARACTER})" if re.match(_SPACED_WORD_CHARACTER, wanted[-1]) else ""
    return float(re.search(before + re.escape(wanted) + after, _normalised(prediction)) is not None)


def last_number(prediction: str, reference: str) -> float:
    """1 if the last numbers of both texts are equal: "It costs $1,200.00." matches "#### 1200".

    Numbers are compared exactly, as decimals. Thousands separators, currency signs, a trailing point and a percent sign
    are ignored (50% is 50). A text without a number matches nothing.
    """
    predicted, wanted = (numbers_in(text)[-1:] for text in (prediction, reference))
    return float(bool(predicted) and predicted == wanted)


def numbers_in(text: str) -> list[Decimal]:
    """The numbers of a text in order, as exact decimals. `last_number` describes what is ignored."""
    return [
        Decimal((found["sign"] or "+").translate(_MINUS) + found["digits"].replace(",", "") + (found["exponent"] or ""))
        for found in _NUMBER.finditer(text)
    ]


def token_f1(prediction: str, reference: str) -> float:
    """Harmonic mean of precision and recall over the words, without case and punctuation. 1 if both have no words."""
    predicted, wanted = _bag_of_words(prediction), _bag_of_words(reference)
    if not predicted or not wanted:
        return float(predicted == wanted)
    return 2 * (predicted & wanted).total() / (predicted.total() + wanted.total())


METRICS: dict[str, Metric] = {one.__name__: one for one in (exact_match, contains, last_number, token_f1)}


def metric_named(name: str) -> Metric:
    """A metric of METRICS, or a Python function "package.module:function".

    A ConfigError if there is no such metric, and in use if the function does not return a number in [0, 1].
    """
    if name in METRICS:
        return METRICS[name]
    if ":" not in name:
        known = ", ".join(METRICS)
        raise ConfigError(f"metric is {name!r}, expected one of {known}, or a Python function package.module:function")
    function = imported(name, "metric")
    if not callable(function):
        kind = type(function).__name__
        raise ConfigError(f"metric {name!r} is a {kind}, expected a function (prediction, reference)")

    def metric(prediction: str, reference: str) -> float:
        score = function(prediction, reference)
        if not isinstance(score, Real) or not 0 <= float(score) <= 1:  # also for NaN
            raise ConfigError(f"metric {name!r} returned {score!r}, expected a number from 0 to 1")
        return float(score)

    return metric


def _normalised(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _bag_of_words(text: str) -> Counter[str]:
    return Counter(re.findall(r"\w+", _normalised(text).casefold()))
