"""Choosing the threshold: generate a validation set at several, measure, keep the best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from collm.collaboration import CoLLM
from collm.core.calibration import Calibration, CalibrationPoint
from collm.core.types import Completion, SamplingParams
from collm.errors import ConfigError, DataError
from collm.evaluation.intervals import bootstrap_interval
from collm.evaluation.metrics import metric_named
from collm.models.template import Prompt

DEFERRAL_RATES = tuple(i / 10 for i in range(11))
BASE_ALONE, ASSISTANTS_ALONE, EVEN_ODDS = 1.0, -1.0, 0.5


@dataclass(frozen=True)
class ValidationItem:
    """A prompt and the text its completion is compared with."""

    prompt: Prompt
    reference: str


def calibrate(
    model: CoLLM,
    items: Sequence[ValidationItem],
    *,
    metric: str = "exact_match",
    params: SamplingParams | None = None,
    rates: Sequence[float] = DEFERRAL_RATES,
    max_batch: int = 16,
    settings: dict[str, Any] | None = None,
    on_completion: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Measure deferral rate and metric at thresholds meant for `rates`; sets and returns `model.calibration`.

    The base first writes every answer alone; the quantiles of its defer probs are the thresholds that would give
    those rates on its own text (arXiv 2403.03870), to which 1/2 is added, where deferring is as likely as
    not. Each is then generated with, so the recorded rate is the one that came.

    Args:
        items: the validation set.
        metric: a name from `metrics.METRICS` or "module:function".
        params: how completions are drawn; greedy by default.
        rates: deferral rates to aim at; 0 (the base alone) is always measured.
        settings: kept with the calibration, to say what it was measured on.
        on_completion: called with (completions done, completions to do).

    Raises:
        DataError: no items.
        ConfigError: an unknown metric, or a rate outside [0, 1].
    """
    if not items:
        raise DataError("the validation set is empty; calibration needs at least one prompt with its reference")
    check_rates(rates)
    score = metric_named(metric)
    params = params or SamplingParams()
    progress = _Progress(on_completion, total=len(items) * (1 + len(_thresholds([0.5], rates))))

    def measure(threshold: float) -> tuple[CalibrationPoint, list[float]]:
        prompts = [item.prompt for item in items]
        out = model.generate(prompts, params, threshold=threshold, max_batch=max_batch, on_completion=progress.count)
        scores = [score(completion.text, item.reference) for completion, item in zip(out, items, strict=True)]
        interval = bootstrap_interval(scores)
        point = CalibrationPoint(threshold, out.deferral_rate, interval.mean, interval.low, interval.high)
        return point, [prob for completion in out for prob in completion.defer_probs]

    alone, probs = measure(BASE_ALONE)
    thresholds = _thresholds(probs, rates)
    progress.total = len(items) * (1 + len(thresholds))
    points = [alone, *(measure(threshold)[0] for threshold in thresholds)]
    points.sort(key=lambda point: (point.deferral_rate, -point.threshold))
    used = {"max_new_tokens": params.max_new_tokens, "temperature": params.temperature, **(settings or {})}
    model.calibration = Calibration(points, metric, len(items), used)
    return model.calibration


def check_rates(rates: Sequence[float]) -> None:
    """Raise a ConfigError for a deferral rate outside [0, 1]."""
    outside = [rate for rate in rates if not 0 <= rate <= 1]
    if outside:
        raise ConfigError(f"cannot aim at a deferral rate of {outside[0]}, expected numbers from 0 to 1")


@dataclass
class _Progress:
    """Counts completions over all thresholds."""

    report: Callable[[int, int], None] | None
    total: int
    done: int = 0

    def count(self, index: int, completion: Completion) -> None:
        self.done += 1
        if self.report is not None:
            self.report(self.done, max(self.total, self.done))


def _thresholds(defer_probs: Sequence[float], rates: Sequence[float]) -> list[float]:
    """Besides the base alone: for each rate the defer prob that this share of `defer_probs` exceeds, and 1/2."""
    ranked = sorted(defer_probs, reverse=True)
    inner = {ranked[min(round(rate * len(ranked)), len(ranked) - 1)] for rate in rates if 0 < rate < 1}
    ends = {ASSISTANTS_ALONE} if 1 in rates else set()
    return sorted((inner | ends | {EVEN_ODDS}) - {BASE_ALONE}, reverse=True)
