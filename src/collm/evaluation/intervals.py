"""How sure a mean over items is: intervals that stay honest when every item scored the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from collm.errors import ConfigError, DataError

_DRAWS_AT_ONCE = 2**22  # resampled scores held in memory at a time


@dataclass(frozen=True)
class Interval:
    """A mean and the interval around it, in the unit of the scores."""

    mean: float
    low: float
    high: float


def bootstrap_interval(
    scores: Sequence[float], *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> Interval:
    """An interval for the mean of `scores`, one score in [0, 1] per item.

    Percentile bootstrap over the items, except in two cases where it would claim too much:

    - scores that are all 0 or 1: the Wilson score interval (Wilson 1927). Resampling 0s and 1s only
      approximates the binomial; with 1 right of 20 its lower end is 0, which one right answer refutes.
    - scores that are all equal: resampling would give a width of 0. Items that score otherwise may exist, but
      by Wilson's bound their share is at most z^2 / (n + z^2); the ends assume those score 0 and 1. For 0/1
      scores this is the Wilson interval.

    What no item shows, no resampling sees: with few items, or scores nearly all equal, it is still too narrow.

    Raises:
        DataError: no scores, or one outside [0, 1].
        ConfigError: confidence or resamples out of range.
    """
    values = _checked_values(scores)
    _check_options(confidence, resamples)
    if bool(((values == 0) | (values == 1)).all()):
        return _wilson(values.mean().item(), len(values), confidence)
    return _bootstrap(values, 0.0, confidence, resamples, seed)


def ratio_interval(
    parts: Sequence[float], wholes: Sequence[float], *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> Interval:
    """An interval for sum(parts) / sum(wholes), where each item brings a part of a whole: right steps, of its steps.

    Percentile bootstrap over the items, since what an item brings belongs together. Where all or none of every whole
    is right, resampling would give a width of 0, so there the Wilson interval over the wholes.

    Raises:
        DataError: no wholes, a different number of parts, or a part outside [0, its whole].
        ConfigError: confidence or resamples out of range.
    """
    part, whole = torch.tensor(parts, dtype=torch.float64), torch.tensor(wholes, dtype=torch.float64)
    _check_options(confidence, resamples)
    if len(part) != len(whole) or not whole.sum() > 0 or not ((part >= 0) & (part <= whole)).all():
        raise DataError(
            f"{len(parts)} parts of {len(wholes)} wholes that sum to {float(whole.sum()):g}; expected a part from 0 to "
            "its whole for each, and at least one whole above 0"
        )
    ratio = (part.sum() / whole.sum()).item()
    if ratio in (0.0, 1.0):
        return _wilson(ratio, int(whole.sum()), confidence)
    draws = torch.randint(len(part), (resamples, len(part)), generator=torch.Generator().manual_seed(seed))
    ratios = part[draws].sum(-1) / whole[draws].sum(-1)
    tail = (1 - confidence) / 2
    low, high = ratios.nanquantile(torch.tensor([tail, 1 - tail], dtype=ratios.dtype)).tolist()
    return Interval(ratio, min(low, ratio), max(high, ratio))


def statistic_interval(
    statistic: Callable[[Tensor], Tensor],
    items: Sequence[Sequence[float]],
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """An interval for a function of what D quantities, one row of them per item, sum to: such as a macro F1.

    Percentile bootstrap over the items; where all items are alike its width is 0.

    Args:
        statistic: sums (..., D) -> values (...).

    Raises:
        DataError: no items.
        ConfigError: confidence or resamples out of range.
    """
    _check_options(confidence, resamples)
    if not items:
        raise DataError("no items to take a statistic of, expected at least one")
    rows = torch.tensor(items, dtype=torch.float64)
    draws = torch.randint(len(rows), (resamples, len(rows)), generator=torch.Generator().manual_seed(seed))
    value = statistic(rows.sum(0)).item()
    tail = (1 - confidence) / 2
    low, high = statistic(rows[draws].sum(1)).quantile(torch.tensor([tail, 1 - tail], dtype=rows.dtype)).tolist()
    return Interval(value, min(low, value), max(high, value))


def paired_difference(
    a: Sequence[float],
    b: Sequence[float],
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """An interval for mean(a) - mean(b), where a[i] and b[i] are scores in [0, 1] of the same item.

    Percentile bootstrap over the items' differences: much narrower than two intervals apart, since what makes
    an item hard is hard for both. Differences that are all equal are treated as in `bootstrap_interval`, the
    ends assuming -1 and 1 for the unseen share.

    Raises:
        DataError: no scores, a different number of them, or one outside [0, 1].
        ConfigError: confidence or resamples out of range.
    """
    if len(a) != len(b):
        raise DataError(f"{len(a)} and {len(b)} scores to compare, expected one of each per item, in one order")
    differences = _checked_values(a) - _checked_values(b)
    _check_options(confidence, resamples)
    return _bootstrap(differences, -1.0, confidence, resamples, seed)


def independent_difference(a: Interval, b: Interval) -> Interval:
    """An interval for the difference of two means over different items, from the interval of each.

    Square and add (Newcombe 1998, method 10; Zou and Donner 2008): each end is as far from the difference as the two
    ends that push it that way are from their means, squared and added, so it is no wider than it must be and keeps
    the skewness of both.
    """
    difference = a.mean - b.mean
    below = math.hypot(a.mean - a.low, b.high - b.mean)
    above = math.hypot(a.high - a.mean, b.mean - b.low)
    return Interval(difference, difference - below, difference + above)


def _checked_values(scores: Sequence[float]) -> Tensor:
    values = torch.tensor(scores, dtype=torch.float64)
    if not len(values):
        raise DataError("no scores to take a mean of, expected at least one item")
    outside = ~((values >= 0) & (values <= 1))  # true for NaN
    if bool(outside.any()):
        item = int(outside.int().argmax())
        raise DataError(f"score of item {item} is {scores[item]}, expected a number from 0 to 1")
    return values


def _check_options(confidence: float, resamples: int) -> None:
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence is {confidence}, expected a number between 0 and 1, as 0.95")
    if resamples < 100:
        raise ConfigError(f"resamples is {resamples}, expected at least 100: the ends are quantiles of so many")


def _wilson(mean: float, items: int, confidence: float) -> Interval:
    """Centre (p + z^2/2n) / (1 + z^2/n), half width z sqrt(p(1-p)/n + z^2/4n^2) / (1 + z^2/n)."""
    z = _z(confidence)
    centre = mean + z**2 / (2 * items)
    half = z * math.sqrt(mean * (1 - mean) / items + (z / (2 * items)) ** 2)
    scale = 1 + z**2 / items
    # Rounding must not put the mean outside: at 0 and 1 it is an end of the interval.
    return Interval(mean, max(0.0, min((centre - half) / scale, mean)), min(1.0, max((centre + half) / scale, mean)))


def _bootstrap(values: Tensor, lowest: float, confidence: float, resamples: int, seed: int) -> Interval:
    """Percentile interval of values in [lowest, 1]; with the unseen share where all are equal."""
    mean = values.mean().item()
    if bool((values == values[0]).all()):
        mean = values[0].item()
        unseen = _z(confidence) ** 2 / (len(values) + _z(confidence) ** 2)
        return Interval(mean, mean - unseen * (mean - lowest), mean + unseen * (1 - mean))
    tail = (1 - confidence) / 2
    means = _resampled_means(values, resamples, torch.Generator().manual_seed(seed))
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=means.dtype)).tolist()
    return Interval(mean, min(low, mean), max(high, mean))  # scores a rounding error apart may cross


def _resampled_means(values: Tensor, resamples: int, generator: torch.Generator) -> Tensor:
    """Means of `resamples` draws of n values with replacement; shape (resamples,)."""
    n = len(values)
    rows_at_once = max(1, _DRAWS_AT_ONCE // n)
    blocks = [min(rows_at_once, resamples - start) for start in range(0, resamples, rows_at_once)]
    return torch.cat([values[torch.randint(n, (rows, n), generator=generator)].mean(-1) for rows in blocks])


def _z(confidence: float) -> float:
    return NormalDist().inv_cdf((1 + confidence) / 2)
