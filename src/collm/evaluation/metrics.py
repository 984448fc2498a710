"""Metrics of a generated text: `metric(prediction: str, reference: str) -> float`, a score from 0 to 1."""

from __future__ import annotations

import inspect
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal
from numbers import Real

from collm.core.named import imported
from collm.errors import ConfigError

logger = logging.getLogger(__name__)

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

_ENDS_IN_NUMBER = re.compile(r"(?<![\w.,])\d[\d.,]*%?\s*$")

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


def suitable_metric(references: Sequence[str]) -> str:
    """The name of a metric that suits these reference completions: free text is hardly ever matched exactly.

    The last number if nine tenths of them end in a number, token F1 if half of them have several words, otherwise exact
    match. The choice is logged.
    """
    if 10 * sum(_ENDS_IN_NUMBER.search(one) is not None for one in references) >= 9 * len(references):
        metric, reason = last_number, "most completions end in a number"
    elif 2 * sum(len(one.split()) > 1 for one in references) >= len(references):
        metric, reason = token_f1, "most completions have several words"
    else:
        metric, reason = exact_match, "most completions are single words"
    logger.info("the metric is %s, because %s; name another if it does not fit", metric.__name__, reason)
    return metric.__name__


def try_metric(name: str | None, reference: str) -> None:
    """Score a reference with a metric, if one is named, so that a ConfigError refuses a broken one before any work."""
    if name is not None:
        metric_named(name)(reference, reference)


def metric_named(name: str) -> Metric:
    """A metric of METRICS, or a Python function "package.module:function".

    Raises:
        ConfigError: there is no such metric, or it does not take a prediction and a reference. In use, also if it
            raises, or returns anything but a number from 0 to 1.
    """
    if name in METRICS:
        return METRICS[name]
    if ":" not in name:
        known = ", ".join(METRICS)
        raise ConfigError(f"metric is {name!r}, expected one of {known}, or a Python function package.module:function")
    function = imported(name, "metric")
    expected = "expected a function metric(prediction: str, reference: str) that returns a number from 0 to 1"
    if not callable(function):
        raise ConfigError(f"metric {name!r} is a {type(function).__name__}, {expected}")
    try:
        inspect.signature(function).bind("", "")
    except TypeError as error:
        raise ConfigError(f"metric {name!r} takes {inspect.signature(function)}, {expected}") from error
    except ValueError:  # a built-in function without a signature
        pass

    def metric(prediction: str, reference: str) -> float:
        try:
            score = function(prediction, reference)
        except Exception as error:  # a user's function may fail in any way
            what = f"{type(error).__name__}: {error}"
            raise ConfigError(f"metric {name!r} raised {what:.200}, for the prediction {prediction!r:.80}") from error
        if not isinstance(score, Real) or not 0 <= float(score) <= 1:  # also for NaN
            raise ConfigError(f"metric {name!r} returned {score!r}, expected a number from 0 to 1")
        return float(score)

    return metric


def _normalised(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _bag_of_words(text: str) -> Counter[str]:
    return Counter(re.findall(r"\w+", _normalised(text).casefold()))
