"""Results of calibration: the deferral rate and metric measured at each threshold, and the choice of a threshold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from collm.errors import ConfigError
from collm.untrusted import check_fields

DEFERRAL_RATES = tuple(i / 10 for i in range(11))
"""Deferral rates that calibration aims at by default."""

REFINE = 3
"""Number of thresholds that calibration adds near the best one by default."""


def threshold_text(threshold: float) -> str:
    """A threshold in six digits, or in as many as distinguish it from 1, at which only the base writes."""
    texts = (f"{threshold:.{digits}g}" for digits in range(6, 18))
    return next(text for text in texts if threshold >= 1 or text != "1")


@dataclass(frozen=True)
class CalibrationPoint:
    """Measurements at one threshold.

    Attributes:
        deferral_rate: share of the generated tokens that assistants wrote.
        metric: mean over the validation prompts, in [0, 1].
        low, high: confidence interval of the metric.
        rate_low, rate_high: confidence interval of the deferral rate.
    """

    threshold: float
    deferral_rate: float
    metric: float
    low: float
    high: float
    rate_low: float
    rate_high: float

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> CalibrationPoint:
        """Read the output of `dataclasses.asdict`."""
        point = cls(**content)
        check_fields(point)
        shares = [value for name, value in content.items() if name != "threshold"]
        if not -1 <= point.threshold <= 1 or not all(0 <= share <= 1 for share in shares):
            raise ConfigError(f"{point!s:.300} is impossible, expected shares from 0 to 1")
        return point


@dataclass(frozen=True)
class HeldOutCheck:
    """A second measurement of a chosen threshold, on held-out prompts.

    Attributes:
        budget: the deferral rate that the threshold was chosen for; 1 for the default threshold.
        promised: the calibration's measurement.
        held_out: the measurement on the held-out prompts.
        num_prompts: number of held-out prompts.
        rate_difference: confidence interval of the held-out deferral rate minus the promised one.
        metric_difference: confidence interval of the held-out metric minus the promised one.
    """

    budget: float
    promised: CalibrationPoint
    held_out: CalibrationPoint
    num_prompts: int
    rate_difference: tuple[float, float]
    metric_difference: tuple[float, float]

    @property
    def rate_holds(self) -> bool:
        """Whether the held-out deferral rate is consistent with the promised one."""
        return _contains_zero(self.rate_difference)

    @property
    def metric_holds(self) -> bool:
        """Whether the held-out metric is consistent with the promised one."""
        return _contains_zero(self.metric_difference)

    def summary(self, metric_name: str) -> str:
        """Describe both measurements and whether they agree, in two sentences."""
        what = "the default threshold" if self.budget == 1 else f"the threshold for a budget of {self.budget:.4g}"
        rate = _comparison("deferral rate", self.rate_holds, self.promised.deferral_rate, self.held_out.deferral_rate)
        metric = _comparison(metric_name, self.metric_holds, self.promised.metric, self.held_out.metric)
        intervals = " and ".join(
            f"{100 * low:+.1f} to {100 * high:+.1f}" for low, high in (self.rate_difference, self.metric_difference)
        )
        threshold = threshold_text(self.promised.threshold)
        return (
            f"On {self.num_prompts} held-out prompts, {what} ({threshold}): {rate}; {metric}. "
            f"95 % confidence intervals of the differences in percentage points: {intervals}."
        )

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> HeldOutCheck:
        """Read the output of `dataclasses.asdict`."""
        points = {name: CalibrationPoint.from_dict(content[name]) for name in ("promised", "held_out")}
        differences = {name: tuple(content[name]) for name in ("rate_difference", "metric_difference")}
        check = cls(**{**content, **points, **differences})
        check_fields(check)
        return check


def best_within(points: Sequence[CalibrationPoint], budget: float) -> CalibrationPoint:
    """Choose a point as `Calibration.best` does."""
    if not 0 <= budget <= 1:
        raise ConfigError(f"budget is {budget}, expected a deferral rate from 0 to 1")
    allowed = [point for point in points if point.deferral_rate <= budget]
    if not allowed:
        least = min(point.deferral_rate for point in points)
        raise ConfigError(f"budget is {budget}, but the lowest measured deferral rate is {least:.3g}")
    return max(allowed, key=lambda point: (point.metric, -point.deferral_rate, point.threshold))


def _comparison(name: str, holds: bool, promised: float, measured: float) -> str:
    return f"{name} {'holds' if holds else 'does NOT hold'} (promised {promised:.1%}, measured {measured:.1%})"


def _contains_zero(interval: tuple[float, float]) -> bool:
    return interval[0] <= 0 <= interval[1]


@dataclass(frozen=True)
class Calibration:
    """Points measured on one validation set.

    Attributes:
        points: in order of increasing deferral rate.
        metric_name: name of the measured metric.
        num_prompts: number of validation prompts.
        settings: other settings that the measurement depends on (data, sampling, confidence level).
        budgets: deferral rates for which a threshold was chosen in addition to the default.
        checks: held-out checks of the chosen thresholds, if any were made.
    """

    points: Sequence[CalibrationPoint]
    metric_name: str
    num_prompts: int
    settings: dict[str, Any]
    budgets: Sequence[float] = field(default_factory=list)
    checks: Sequence[HeldOutCheck] = field(default_factory=list)

    def best(self, budget: float = 1.0) -> CalibrationPoint:
        """The point with the best metric among those within a deferral rate. A tie goes to the lower deferral rate.

        Raises:
            ConfigError: `budget` is outside [0, 1], or every point exceeds it.
        """
        return best_within(self.points, budget)

    def uses(self, point: CalibrationPoint) -> list[str]:
        """Labels of the choices that a point won: "default" and "within <budget>"."""
        default = ["default"] if point is self.best() else []
        return default + [f"within {budget:.4g}" for budget in self.budgets if point is self.best(budget)]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Calibration:
        """Read the output of `to_dict`.

        Raises:
            KeyError, TypeError, ValueError, ConfigError: `content` has another structure.
        """
        points = [CalibrationPoint.from_dict(point) for point in content["points"]]
        checks = [HeldOutCheck.from_dict(check) for check in content["checks"]]
        calibration = cls(**{**content, "points": points, "checks": checks})
        check_fields(calibration)
        for budget in (1.0, *calibration.budgets):
            calibration.best(budget)
        return calibration
