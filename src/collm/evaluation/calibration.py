"""Choose thresholds: decode a validation set at several thresholds, measure each, and keep the best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from collm.collaboration import CoLLM
from collm.core.calibration import Calibration, CalibrationOptions, CalibrationPoint, HeldOutCheck, best_within
from collm.core.types import BASE, Completion, check_threshold
from collm.errors import ConfigError, DataError
from collm.evaluation.gold import ASSISTANTS_ALONE, BASE_ALONE
from collm.evaluation.intervals import Interval, bootstrap_interval, independent_difference, ratio_interval
from collm.evaluation.metrics import metric_named
from collm.training.data import Row
from collm.training.scoring import OnProgress

EVEN_ODDS = 0.5
_NARROW = 0.01  # a step in deferral rate that is not refined further


def calibrate(
    model: CoLLM,
    rows: Sequence[Row],
    options: CalibrationOptions | None = None,
    *,
    guesses: Sequence[float] = (),
    settings: dict[str, Any] | None = None,
    on_completion: OnProgress = lambda done, total: None,
) -> Calibration:
    """Measure deferral rate and metric at several thresholds. Sets and returns `model.calibration`.

    The base first writes every answer alone. The quantiles of its defer probs are the thresholds that would give
    `rates` on its own text (arXiv 2403.03870). To these and 1/2, `refine` times the median of the defer probs in the
    widest step beside the best threshold is added, also for each budget. Answers are generated at each threshold.

    Args:
        rows: the validation set: prompts with their reference completions.
        guesses: further thresholds to measure, such as the best one of a `teacher_forced` curve.
        settings: stored with the calibration.
        on_completion: called with (completions done, maximum number of completions).

    Raises:
        DataError: no rows.
        ConfigError: an unknown metric, or an invalid guess.
    """
    if not rows:
        raise DataError("the validation set is empty; calibration needs at least one prompt with its reference")
    options = options or CalibrationOptions()
    guesses = [check_threshold(guess) for guess in guesses]
    aims = [aim for aim in (1.0, *options.budgets) for _ in range(options.refine)]
    most = len([BASE_ALONE, EVEN_ODDS, *options.rates, *guesses, *aims])
    measuring = _Measuring(model, rows, options, options.metric, most, on_completion)
    measuring.add(BASE_ALONE)
    for threshold in _thresholds(measuring.defer_probs[BASE_ALONE].tolist(), options.rates, guesses):
        measuring.add(threshold)
    for aim in aims:
        if (between := measuring.between(aim)) is not None:
            measuring.add(between)
    on_completion(measuring.done, measuring.done)
    points = sorted(measuring.points, key=lambda point: (point.deferral_rate, -point.threshold))
    params = options.params
    used = {"max_new_tokens": params.max_new_tokens, "temperature": params.temperature, **(settings or {})}
    model.calibration = Calibration(points, options.metric, len(rows), used, sorted(set(options.budgets)))
    return model.calibration


def check_on(
    model: CoLLM,
    rows: Sequence[Row],
    options: CalibrationOptions | None = None,
    *,
    on_completion: OnProgress = lambda done, total: None,
) -> Calibration:
    """Check on new prompts that the chosen thresholds give the calibrated deferral rate and metric.

    The best of many thresholds was partly lucky, so its metric on other prompts is slightly lower. Sets and returns
    `model.calibration`, now with its `checks`.

    Args:
        rows: prompts that calibration has not seen, with their reference completions.
        options: those of the calibration. The metric is always that of the calibration.
    """
    if not rows:
        raise DataError("there are no prompts to check the thresholds on; expected at least one")
    calibration = model.calibration
    if calibration is None:
        raise ConfigError("the collaboration is not calibrated, so there is nothing to check; calibrate it first")
    chosen = {budget: calibration.best(budget) for budget in (1.0, *calibration.budgets)}
    thresholds, options = {point.threshold for point in chosen.values()}, options or CalibrationOptions()
    measuring = _Measuring(model, rows, options, calibration.metric_name, len(thresholds), on_completion)
    measured = {threshold: measuring.add(threshold) for threshold in thresholds}
    checks = []
    for budget, promised in chosen.items():
        found = measured[promised.threshold]
        rates = [Interval(one.deferral_rate, one.rate_low, one.rate_high) for one in (found, promised)]
        metrics = [Interval(one.metric, one.low, one.high) for one in (found, promised)]
        differences = [independent_difference(*both) for both in (rates, metrics)]
        checks.append(HeldOutCheck(budget, promised, found, len(rows), *((one.low, one.high) for one in differences)))
    model.calibration = replace(calibration, checks=checks)
    return model.calibration


def point_of(threshold: float, completions: Sequence[Completion], scores: Sequence[float]) -> CalibrationPoint:
    """Deferral rate and metric of a threshold, with their intervals over the prompts."""
    metric = bootstrap_interval(scores)
    deferred = [sum(author != BASE for author in completion.authors) for completion in completions]
    rate = ratio_interval(deferred, [len(completion.authors) for completion in completions])
    return CalibrationPoint(threshold, rate.mean, metric.mean, metric.low, metric.high, rate.low, rate.high)


class _Measuring:
    """Generates and scores the rows at one threshold after another, and reports the progress over all of them."""

    def __init__(
        self,
        model: CoLLM,
        rows: Sequence[Row],
        options: CalibrationOptions,
        metric: str,
        most: int,
        report: OnProgress,
    ) -> None:
        self.model, self.rows, self.options = model, rows, options
        self.points: list[CalibrationPoint] = []
        self.defer_probs: dict[float, Tensor] = {}  # of all tokens at each threshold, fp64, shape (M,)
        self._score, self._report = metric_named(metric), report
        self.done, self._most = 0, len(rows) * most

    def add(self, threshold: float) -> CalibrationPoint:
        """Measure a threshold."""
        completions = self.model.generate(
            [row.prompt for row in self.rows],
            self.options.params,
            threshold=threshold,
            max_batch=self.options.max_batch,
            on_completion=self._count,
        )
        scores = [self._score(one.text, row.completion) for one, row in zip(completions, self.rows, strict=True)]
        probs = [prob for one in completions for prob in one.defer_probs]
        self.defer_probs[threshold] = torch.tensor(probs, dtype=torch.float64)
        self.points.append(point_of(threshold, completions, scores))
        return self.points[-1]

    def _count(self, index: int, completion: Completion) -> None:
        self.done += 1
        self._report(self.done, self._most)

    def between(self, budget: float) -> float | None:
        """A threshold in the widest step in deferral rate next to the best within the budget; None if there is none."""
        points = sorted(self.points, key=lambda point: -point.threshold)
        best = points.index(best_within(points, budget))
        beyond = next((i for i, point in enumerate(points) if point.deferral_rate > budget), best)
        # Each step leads to the next point.
        steps = {step for step in (best - 1, best, beyond - 1) if 0 <= step < len(points) - 1}
        widths = {step: points[step + 1].deferral_rate - points[step].deferral_rate for step in steps}
        for step in sorted((step for step in steps if widths[step] >= _NARROW), key=lambda step: -widths[step]):
            higher, lower = points[step].threshold, points[step + 1].threshold
            probs = self.defer_probs[higher]
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


def _thresholds(defer_probs: Sequence[float], rates: Sequence[float], guesses: Sequence[float]) -> list[float]:
    """The quantile of `defer_probs` for each rate, 1/2 and the guesses, without the base alone."""
    ranked = sorted(defer_probs, reverse=True)
    wanted = [ranked[min(round(rate * len(ranked)), len(ranked) - 1)] for rate in rates if 0 < rate < 1]
    inner = {_above(defer_prob, ranked) for defer_prob in wanted}
    ends = {ASSISTANTS_ALONE} if 1 in rates else set()
    return sorted((inner | ends | {EVEN_ODDS, *guesses}) - {BASE_ALONE}, reverse=True)
