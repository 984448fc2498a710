"""Choose thresholds: decode a validation set at several thresholds, measure each, and keep the best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from collm.collaboration import CoLLM
from collm.core.calibration import Calibration, CalibrationOptions, CalibrationPoint, HeldOutCheck, best_within
from collm.core.types import BASE, Completion
from collm.errors import ConfigError, DataError
from collm.evaluation.gold import ASSISTANTS_ALONE, BASE_ALONE, TeacherForcedCurve, half_way
from collm.evaluation.intervals import (
    Interval,
    bootstrap_interval,
    independent_difference,
    paired_difference,
    ratio_interval,
)
from collm.evaluation.metrics import metric_named, suitable_metric
from collm.training.data import Row
from collm.training.scoring import OnProgress

EVEN_ODDS = 0.5
_NARROW = 0.01  # a step in deferral rate that is not refined further


def calibrate(
    model: CoLLM,
    rows: Sequence[Row],
    options: CalibrationOptions | None = None,
    *,
    curve: TeacherForcedCurve | None = None,
    settings: dict[str, Any] | None = None,
    on_completion: OnProgress = lambda done, total: None,
) -> Calibration:
    """Measure deferral rate and metric at several thresholds. Sets and returns `model.calibration`.

    The base first writes every answer alone. The quantiles of its defer probs are the thresholds that would give
    `rates` on its own text (arXiv 2403.03870). 1/2 and the best of the curve are added. Thresholds are left out where
    more deferral is clearly worse (`_Measuring.is_beyond`). Then `refine` times the median of the defer probs in the
    widest step beside the best threshold is added, and the same for each budget and its end.

    If the metric of no threshold differs from that of the base alone (95 % interval of the paired difference, for each
    threshold alone), the curve decides, and only the ends of budgets are refined.

    With a temperature, prompt i has the seed of `options.params` plus i, by default i.

    Args:
        rows: the validation set: prompts with their reference completions.
        curve: the `teacher_forced` curve on these rows.
        settings: stored with the calibration.
        on_completion: called with (completions done, maximum number of completions).

    Raises:
        ConfigError, DataError: an unknown metric; no rows.
    """
    if not rows:
        raise DataError("the validation set is empty; calibration needs at least one prompt with its reference")
    options = options or CalibrationOptions()
    metric = options.metric or suitable_metric([row.completion for row in rows])
    guesses = [] if curve is None else [curve.best(budget).threshold for budget in (1.0, *options.budgets)]
    aims = [aim for aim in (1.0, *options.budgets) for _ in range(options.refine)]
    most = len([BASE_ALONE, EVEN_ODDS, *options.rates, *guesses, *aims])
    measuring = _Measuring(model, rows, options, metric, most, on_completion, curve)
    if options.choose == "youden":
        measuring.add(_youden(curve))
    else:
        measuring.add(BASE_ALONE)
        measuring.sweep(_thresholds(measuring.defer_probs[BASE_ALONE], options.rates, guesses))
        measuring.refine(aims)
    on_completion(measuring.done, measuring.done)
    points = sorted(measuring.points, key=lambda point: (point.deferral_rate, -point.threshold))
    used = {name: getattr(measuring.params, name) for name in ("max_tokens", "temperature", "seed")}
    settings = {**used, "judge": options.judge, **(settings or {})}
    model.calibration = Calibration(points, metric, len(rows), settings, sorted(set(options.budgets)))
    return model.calibration


def _youden(curve: TeacherForcedCurve | None) -> float:
    if curve is None or curve.youden.isnan().any():
        needed = "the models in this process" if curve is None else "tokens of the references for and against deferring"
        raise ConfigError(f"choose is 'youden', which needs {needed}; choose 'best'")
    return curve[int(curve.youden.argmax())].threshold


def check_on(
    model: CoLLM,
    rows: Sequence[Row],
    options: CalibrationOptions | None = None,
    *,
    on_completion: OnProgress = lambda done, total: None,
) -> Calibration:
    """Check on new prompts that the chosen thresholds keep their budgets and give the calibrated metric.

    The best of many thresholds was partly lucky, so its metric on other prompts is slightly lower. Sets and returns
    `model.calibration`, now with its `checks`. `HeldOutCheck.summary` says what was found.

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
    measuring.judge = calibration.judge
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
    if threshold >= BASE_ALONE:
        rate = Interval(0.0, 0.0, 0.0)  # on any prompts
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
        curve: TeacherForcedCurve | None = None,
    ) -> None:
        self.model, self.rows, self.options, self.params = model, rows, options, options.params
        if self.params.temperature > 0 and self.params.seed is None:
            self.params = replace(self.params, seed=0)
        self.judge = options.judge
        self.points: list[CalibrationPoint] = []
        self._first: list[float] = []  # the scores at the first threshold
        self.defer_probs: dict[float, Tensor] = {}  # of all tokens at each threshold, fp64, shape (M,)
        self._score, self._report = metric_named(metric), report
        self.done, self._most, self._curve = 0, len(rows) * most, curve
        report(0, self._most)

    def add(self, threshold: float) -> CalibrationPoint:
        """Measure a threshold."""
        completions = self.model.generate(
            [row.prompt for row in self.rows],
            self.params,
            threshold=threshold,
            judge=self.judge,
            max_batch=self.options.max_batch,
            on_completion=self._count,
        )
        scores = [self._score(one.text, row.completion) for one, row in zip(completions, self.rows, strict=True)]
        probs = [prob for one in completions for prob in one.defer_probs]
        self.defer_probs[threshold] = torch.tensor(probs, dtype=torch.float64)
        self._first = self._first or scores
        difference = paired_difference(scores, self._first)
        differs = difference.low > 0 or difference.high < 0
        accuracy = None if self._curve is None else self._curve.at(threshold).accuracy
        point = point_of(threshold, completions, scores)
        if self.judge is not None:
            tokens = sum(len(one.token_ids) for one in completions)
            passes = sum(used.forward_passes for name, used in completions.usage.items() if name != "base")
            rejected = sum(len(one.rejected) for one in completions)
            point = replace(point, rejected=rejected / max(tokens, 1), assistant_passes=passes / max(tokens, 1))
        self.points.append(replace(point, differs=differs, gold_accuracy=accuracy))
        return self.points[-1]

    def sweep(self, thresholds: Sequence[float]) -> None:
        """Measure thresholds: the assistants alone, then from the highest on, those that may be the best."""
        for threshold in sorted(thresholds, key=lambda one: (one != ASSISTANTS_ALONE, -one)):
            if not self.is_beyond(threshold):
                self.add(threshold)

    def is_beyond(self, threshold: float) -> bool:
        """Whether more deferral than at the last threshold is clearly worse: the metric there, and of the assistants
        alone, is below the interval of the best so far, and on the references a lower threshold is no better.
        """
        best, last = best_within(self.points, 1.0), self.points[-1]
        alone = next((point for point in self.points if point.threshold == ASSISTANTS_ALONE), None)
        if self._curve is None or alone is None or last is alone or max(last.high, alone.high) >= best.low:
            return False
        return self._curve.at(threshold).accuracy <= self._curve.at(last.threshold).accuracy

    def _count(self, index: int, completion: Completion) -> None:
        self.done += 1
        self._report(self.done, self._most)

    def refine(self, aims: Sequence[float]) -> None:
        """Measure a threshold near the best one within each budget."""
        decides = self._curve is None or any(point.differs for point in self.points)
        for aim in aims:
            if (decides or aim < 1) and (between := self.between(aim)) is not None:
                self.add(between)

    def between(self, budget: float) -> float | None:
        """A threshold in the widest step in deferral rate next to the best within the budget, or at its end; None if
        there is none.
        """
        points = sorted(self.points, key=lambda point: -point.threshold)
        best = points.index(best_within(points, budget))
        beyond = next((i for i, point in enumerate(points) if point.rate_high > budget), best)
        # Each step leads to the next point.
        steps = {step for step in (best - 1, best, beyond - 1) if 0 <= step < len(points) - 1}
        widths = {step: points[step + 1].deferral_rate - points[step].deferral_rate for step in steps}
        for step in sorted((step for step in steps if widths[step] >= _NARROW), key=lambda step: -widths[step]):
            higher, lower = points[step].threshold, points[step + 1].threshold
            probs = self.defer_probs[higher]
            inside = probs[(probs < higher) & (probs > lower)]
            values = torch.unique_consecutive(inside.sort().values)
            if len(values) > 1:
                middle = min(int((values < inside.median()).sum()), len(values) - 2)
                return half_way(values[middle], values[middle + 1]).item()
        return None


def _thresholds(defer_probs: Tensor, rates: Sequence[float], guesses: Sequence[float]) -> list[float]:
    """For each rate a threshold between two of `defer_probs`, 1/2 and the guesses, without the base alone."""
    ranked = defer_probs.sort(descending=True).values
    wanted = [ranked[min(round(rate * len(ranked)), len(ranked) - 1)] for rate in rates if 0 < rate < 1]
    # Above the highest defer prob the base writes alone.
    inner = {half_way(prob, ranked[ranked > prob][-1]).item() for prob in wanted if prob < ranked[0]}
    ends = {ASSISTANTS_ALONE} if 1 in rates else set()
    return sorted((inner | ends | {EVEN_ODDS, *guesses}) - {BASE_ALONE}, reverse=True)
