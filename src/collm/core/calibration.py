"""What calibration found: thresholds with the deferral rate and the metric each gave, and the choice among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from collm.errors import ConfigError


@dataclass(frozen=True)
class CalibrationPoint:
    """One threshold, generated with.

    Attributes:
        threshold: what was set.
        deferral_rate: share of the generated tokens that assistants wrote.
        metric: mean over the validation prompts, in [0, 1].
        low, high: interval of that mean.
        rate_low, rate_high: interval of the deferral rate.
    """

    threshold: float
    deferral_rate: float
    metric: float
    low: float
    high: float
    rate_low: float
    rate_high: float


@dataclass(frozen=True)
class HeldOutCheck:
    """A chosen threshold, generated with once more on prompts that had no part in choosing it.

    Attributes:
        budget: the deferral rate it was chosen for; 1 for the default threshold.
        promised: what calibration measured.
        came: what came on the new prompts.
        num_prompts: of these.
        rate_difference: interval of the deferral rate that came, less the promised one.
        metric_difference: likewise of the metric.
    """

    budget: float
    promised: CalibrationPoint
    came: CalibrationPoint
    num_prompts: int
    rate_difference: tuple[float, float]
    metric_difference: tuple[float, float]

    @property
    def rate_holds(self) -> bool:
        """The promised deferral rate is one that what came allows."""
        return _around_zero(self.rate_difference)

    @property
    def metric_holds(self) -> bool:
        """The promised metric is one that what came allows."""
        return _around_zero(self.metric_difference)

    def words(self, metric_name: str) -> str:
        """Whether both hold, with what was promised and what came."""
        what = "the default threshold" if self.budget == 1 else f"the threshold for a budget of {self.budget:.4g}"
        rate = _kept("deferral rate", self.rate_holds, self.promised.deferral_rate, self.came.deferral_rate)
        metric = _kept(metric_name, self.metric_holds, self.promised.metric, self.came.metric)
        ends = " and ".join(
            f"{100 * low:+.1f} to {100 * high:+.1f}" for low, high in (self.rate_difference, self.metric_difference)
        )
        return (
            f"On {self.num_prompts} other prompts, {what} ({self.promised.threshold:.4g}): {rate}; {metric}. "
            f"95 % intervals of the differences in points: {ends}."
        )

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> HeldOutCheck:
        """Read what `asdict` made of one."""
        points = {name: CalibrationPoint(**content[name]) for name in ("promised", "came")}
        differences = {name: tuple(content[name]) for name in ("rate_difference", "metric_difference")}
        return cls(**{**content, **points, **differences})


def best_within(points: Sequence[CalibrationPoint], budget: float) -> CalibrationPoint:
    """As `Calibration.best`."""
    if not 0 <= budget <= 1:
        raise ConfigError(f"budget is {budget}, expected a deferral rate from 0 to 1")
    allowed = [point for point in points if point.deferral_rate <= budget]
    if not allowed:
        least = min(point.deferral_rate for point in points)
        raise ConfigError(f"budget is {budget}, but the least deferral rate that was measured is {least:.3g}")
    return max(allowed, key=lambda point: (point.metric, -point.deferral_rate, point.threshold))


def _kept(name: str, holds: bool, promised: float, came: float) -> str:
    return f"{name} {'holds' if holds else 'does NOT hold'} (promised {promised:.1%}, came {came:.1%})"


def _around_zero(interval: tuple[float, float]) -> bool:
    return interval[0] <= 0 <= interval[1]


@dataclass(frozen=True)
class Calibration:
    """Points measured on one validation set.

    Attributes:
        points: in order of rising deferral rate.
        metric_name: what was measured.
        num_prompts: on how many prompts.
        settings: what else the measurement depended on (data, sampling, confidence).
        budgets: deferral rates that thresholds were looked for, besides the default one.
        checks: of these and of the default on other prompts, where they were made.
    """

    points: Sequence[CalibrationPoint]
    metric_name: str
    num_prompts: int
    settings: dict[str, Any]
    budgets: Sequence[float] = field(default_factory=list)
    checks: Sequence[HeldOutCheck] = field(default_factory=list)

    def best(self, budget: float = 1.0) -> CalibrationPoint:
        """The point of the best metric among those whose deferral rate is within the budget, ties to the lower rate.

        Raises:
            ConfigError: the budget is outside [0, 1], or no point is within it.
        """
        return best_within(self.points, budget)

    def uses(self, point: CalibrationPoint) -> list[str]:
        """What a point is the best for, in words: the default threshold, and within which budgets."""
        default = ["default"] if point is self.best() else []
        return default + [f"within {budget:.4g}" for budget in self.budgets if point is self.best(budget)]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Calibration:
        """Read what `to_dict` wrote; a KeyError or TypeError where it is something else."""
        points = [CalibrationPoint(**point) for point in content["points"]]
        checks = [HeldOutCheck.from_dict(check) for check in content["checks"]]
        return cls(**{**content, "points": points, "checks": checks})
