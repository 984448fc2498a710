"""Choose thresholds: decode a validation set at several thresholds, measure each, and keep the best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from collm.collaboration import CoLLM
from collm.core.calibration import (
    DEFERRAL_RATES,
    REFINE,
    Calibration,
    CalibrationPoint,
    HeldOutCheck,
    best_within,
)
from collm.core.params import SamplingParams
from collm.core.types import BASE, Completion, check_threshold
from collm.errors import ConfigError, DataError
from collm.evaluation.intervals import Interval, bootstrap_interval, independent_difference, ratio_interval
from collm.evaluation.metrics import metric_named
from collm.evaluation.teacher_forced import ASSISTANTS_ALONE, BASE_ALONE
from collm.text.template import Prompt

EVEN_ODDS = 0.5
_NARROW = 0.01  # a step in deferral rate that is not refined further

OnCompletion = Callable[[int, int], None]


@dataclass(frozen=True)
class ValidationItem:
    """A prompt and its reference completion."""

    prompt: Prompt
    reference: str


def calibrate(
    model: CoLLM,
    items: Sequence[ValidationItem],
    *,
    metric: str = "exact_match",
    params: SamplingParams | None = None,
    rates: Sequence[float] = DEFERRAL_RATES,
    budgets: Sequence[float] = (),
    guesses: Sequence[float] = (),
    refine: int = REFINE,
    max_batch: int = 16,
    settings: dict[str, Any] | None = None,
    on_completion: OnCompletion | None = None,
) -> Calibration:
    """Measure deferral rate and metric at several thresholds. Sets and returns `model.calibration`.

    The base first writes every answer alone. The quantiles of its defer probs are the thresholds that would give
    `rates` on its own text (arXiv 2403.03870). The threshold 1/2 is added. The search is then refined near the best
    threshold, and near the best threshold within each budget: `refine` times it adds the median of the defer probs in
    the widest adjacent step in deferral rate. The answers are generated at each threshold, so the recorded rates are
    measured rates.

    Args:
        items: the validation set.
        metric: a name from `metrics.METRICS` or "module:function".
        params: sampling parameters. Greedy by default.
        rates: target deferral rates. 0 (the base alone) is always measured.
        budgets: maximum deferral rates to find thresholds for, besides the best threshold of all.
        guesses: further thresholds to measure, such as the best one of a `teacher_forced` curve.
        refine: number of thresholds to add near the best one, and near that of each budget. Fewer if no step is wider
            than 1 %.
        settings: stored with the calibration.
        on_completion: called with (completions done, maximum number of completions).

    Raises:
        DataError: no items.
        ConfigError: an unknown metric, a rate or budget outside [0, 1], an invalid guess, or a negative `refine`.
    """
    if not items:
        raise DataError("the validation set is empty; calibration needs at least one prompt with its reference")
    check_rates([*rates, *budgets])
    for guess in guesses:
        check_threshold(guess)
    check_refine(refine)
    params = params or SamplingParams()
    measuring = _Measuring(model, items, metric, params, max_batch, on_completion)
    points = [one.point for one in _search(measuring, rates, budgets, guesses, refine)]
    points.sort(key=lambda point: (point.deferral_rate, -point.threshold))
    used = {"max_new_tokens": params.max_new_tokens, "temperature": params.temperature, **(settings or {})}
    model.calibration = Calibration(points, metric, len(items), used, sorted(set(budgets)))
    return model.calibration


def _search(
    measuring: _Measuring, rates: Sequence[float], budgets: Sequence[float], guesses: Sequence[float], refine: int
) -> list[_Measured]:
    """Measure the base alone, the thresholds for the rates, and thresholds near the best ones."""
    aims = [1.0, *budgets]
    more = refine * len(aims)
    measuring.expect(1 + len(_thresholds([EVEN_ODDS], rates, guesses)) + more)
    alone = measuring.at(BASE_ALONE)
    thresholds = _thresholds(alone.defer_probs.tolist(), rates, guesses)
    measuring.expect(1 + len(thresholds) + more)
    measured = [alone, *(measuring.at(threshold) for threshold in thresholds)]
    for aim, _ in product(aims, range(refine)):
        threshold = _between(measured, aim)
        if threshold is not None:
            measured.append(measuring.at(threshold))
    measuring.expect(len(measured))
    return measured


def check_on(
    model: CoLLM,
    items: Sequence[ValidationItem],
    *,
    params: SamplingParams | None = None,
    max_batch: int = 16,
    on_completion: OnCompletion | None = None,
) -> Calibration:
    """Check on new prompts that the chosen thresholds give the calibrated deferral rate and metric.

    The best of many thresholds was partly lucky, so its metric on other prompts is slightly lower. The interval of
    each difference is that of two independent means (`intervals.independent_difference`).

    Args:
        items: prompts that calibration has not seen.
        params: the sampling parameters of the calibration.

    Returns:
        The calibration with its `checks`. It is also the new `model.calibration`.

    Raises:
        DataError: no items.
        ConfigError: the collaboration is not calibrated, or no threshold is within one of its budgets.
    """
    if not items:
        raise DataError("there are no prompts to check the thresholds on; expected at least one")
    calibration = model.calibration
    if calibration is None:
        raise ConfigError("the collaboration is not calibrated, so there is nothing to check; calibrate it first")
    chosen = {budget: calibration.best(budget) for budget in (1.0, *calibration.budgets)}
    measuring = _Measuring(model, items, calibration.metric_name, params or SamplingParams(), max_batch, on_completion)
    thresholds = {point.threshold for point in chosen.values()}
    measuring.expect(len(thresholds))
    measured = {threshold: measuring.at(threshold).point for threshold in thresholds}
    checks = []
    for budget, promised in chosen.items():
        found = measured[promised.threshold]
        rates = [Interval(one.deferral_rate, one.rate_low, one.rate_high) for one in (found, promised)]
        metrics = [Interval(one.metric, one.low, one.high) for one in (found, promised)]
        rate, metric = independent_difference(*rates), independent_difference(*metrics)
        ends = (rate.low, rate.high), (metric.low, metric.high)
        checks.append(HeldOutCheck(budget, promised, found, len(items), *ends))
    model.calibration = replace(calibration, checks=checks)
    return model.calibration


def point_of(threshold: float, completions: Sequence[Completion], scores: Sequence[float]) -> CalibrationPoint:
    """Deferral rate and metric of a threshold, with their intervals over the prompts."""
    metric = bootstrap_interval(scores)
    deferred = [sum(author != BASE for author in completion.authors) for completion in completions]
    rate = ratio_interval(deferred, [len(completion.authors) for completion in completions])
    return CalibrationPoint(threshold, rate.mean, metric.mean, metric.low, metric.high, rate.low, rate.high)


@dataclass(frozen=True)
class _Measured:
    """A measured threshold, with the defer probs of all its tokens, fp64, shape (M,)."""

    point: CalibrationPoint
    defer_probs: Tensor


class _Measuring:
    """Generates and scores the items at a threshold, and reports the progress over all thresholds."""

    def __init__(
        self,
        model: CoLLM,
        items: Sequence[ValidationItem],
        metric: str,
        params: SamplingParams,
        max_batch: int,
        report: OnCompletion | None,
    ) -> None:
        self.model, self.items, self.params, self.max_batch = model, items, params, max_batch
        self._score = metric_named(metric)
        self._report = report
        self._done = self._total = 0

    def expect(self, thresholds: int) -> None:
        """Set the number of thresholds in all, including those that are done."""
        self._total = len(self.items) * thresholds
        if self._done and self._report is not None:
            self._report(self._done, self._total)

    def at(self, threshold: float) -> _Measured:
        out = self.model.generate(
            [item.prompt for item in self.items],
            self.params,
            threshold=threshold,
            max_batch=self.max_batch,
            on_completion=self._count,
        )
        scores = [self._score(one.text, item.reference) for one, item in zip(out, self.items, strict=True)]
        probs = torch.tensor([prob for one in out for prob in one.defer_probs], dtype=torch.float64)
        return _Measured(point_of(threshold, out, scores), probs)

    def _count(self, index: int, completion: Completion) -> None:
        self._done += 1
        if self._report is not None:
            self._report(self._done, self._total)


def _between(measured: Sequence[_Measured], budget: float) -> float | None:
    """A threshold that splits the widest step in deferral rate next to the best one within the budget.

    None if no step is wide enough, or no token lies in it.
    """
    falling = sorted(measured, key=lambda one: -one.point.threshold)
    points = [one.point for one in falling]
    best = points.index(best_within(points, budget))
    beyond = next((i for i, point in enumerate(points) if point.deferral_rate > budget), best)
    steps = {step for step in (best - 1, best, beyond - 1) if 0 <= step < len(points) - 1}  # each to the point after
    widths = {step: points[step + 1].deferral_rate - points[step].deferral_rate for step in steps}
    for step in sorted(steps, key=lambda step: -widths[step]):
        if widths[step] < _NARROW:
            return None
        higher, lower = points[step].threshold, points[step + 1].threshold
        probs = falling[step].defer_probs
        inside = probs[(probs < higher) & (probs > lower)]
        if len(inside):
            return _above(inside.median().item(), inside.tolist())
    return None


def _above(defer_prob: float, others: Sequence[float]) -> float:
    """A threshold half-way to the next higher defer prob, or the defer prob itself if it is the highest.

    Half-way, rounding in another batch or engine changes no author.
    """
    higher = min((other for other in others if other > defer_prob), default=defer_prob)
    middle = (defer_prob + higher) / 2
    return middle if middle < higher else defer_prob


def check_refine(refine: int) -> None:
    """Raise a ConfigError for a negative number of thresholds."""
    if refine < 0:
        raise ConfigError(f"refine is {refine}, expected 0 or more thresholds")


def check_rates(rates: Sequence[float]) -> None:
    """Raise a ConfigError for a deferral rate outside [0, 1]."""
    outside = [rate for rate in rates if not 0 <= rate <= 1]
    if outside:
        raise ConfigError(f"cannot aim at a deferral rate of {outside[0]}, expected numbers from 0 to 1")


def _thresholds(defer_probs: Sequence[float], rates: Sequence[float], guesses: Sequence[float]) -> list[float]:
    """The quantile of `defer_probs` for each rate, 1/2 and the guesses, without the base alone."""
    ranked = sorted(defer_probs, reverse=True)
    wanted = [ranked[min(round(rate * len(ranked)), len(ranked) - 1)] for rate in rates if 0 < rate < 1]
    inner = {_above(defer_prob, ranked) for defer_prob in wanted}
    ends = {ASSISTANTS_ALONE} if 1 in rates else set()
    return sorted((inner | ends | {EVEN_ODDS, *guesses}) - {BASE_ALONE}, reverse=True)
