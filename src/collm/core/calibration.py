"""Calibration: its options, the deferral rate and metric measured at each threshold, and the choice of a threshold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from collm.core.params import SamplingParams
from collm.errors import ConfigError
from collm.untrusted import check_fields


@dataclass
class CalibrationOptions:
    """How thresholds are chosen. A ConfigError for a rate or budget outside [0, 1], and a negative `refine`.

    Attributes:
        metric: metric of the completions: exact_match, contains, last_number, token_f1 or module:function.
        rates: target deferral rates, by default 0, 0.1, .. 1.
        budgets: maximum deferral rates to find thresholds for, besides the best threshold of all.
        refine: number of thresholds to add near the best one, and near that of each budget.
        max_new_tokens: maximum number of tokens of a completion.
        stop: texts that end a completion.
        max_batch: maximum number of prompts decoded at once.
        params: sampling parameters, greedy and with the two above. Others can be set.
    """

    metric: str = "exact_match"
    rates: list[float] = field(default_factory=lambda: [i / 10 for i in range(11)], metadata={"flag": "--rate"})
    budgets: list[float] = field(default_factory=list, metadata={"flag": "--budget"})
    refine: int = 3
    max_new_tokens: int = 256
    stop: list[str] = field(default_factory=list)
    max_batch: int = 16

    def __post_init__(self) -> None:
        if outside := [rate for rate in (*self.rates, *self.budgets) if not 0 <= rate <= 1]:
            raise ConfigError(f"cannot aim at a deferral rate of {outside[0]}, expected numbers from 0 to 1")
        if self.refine < 0:
            raise ConfigError(f"refine is {self.refine}, expected 0 or more thresholds")
        self.params = SamplingParams(max_new_tokens=self.max_new_tokens, stop=self.stop)


def threshold_text(threshold: float) -> str:
    """A threshold in six digits, or in as many as distinguish it from 1, at which only the base writes."""
    texts = (f"{threshold:.{digits}g}" for digits in range(6, 18))
    return next(text for text in texts if threshold >= 1 or text != "1")


@dataclass(frozen=True)
class CalibrationPoint:
    """Measurements at one threshold.

    Attributes:
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
        rate_difference, metric_difference: confidence intervals of the held-out measurement minus the promised one.
    """

    budget: float
    promised: CalibrationPoint
    held_out: CalibrationPoint
    num_prompts: int
    rate_difference: tuple[float, float]
    metric_difference: tuple[float, float]

    def summary(self, metric_name: str) -> str:
        """Describe both measurements and whether they are consistent, in two sentences."""
        what = "the default threshold" if self.budget == 1 else f"the threshold for a budget of {self.budget:.4g}"
        comparisons, intervals = [], []
        for name, promised, measured, (low, high) in (
            ("deferral rate", self.promised.deferral_rate, self.held_out.deferral_rate, self.rate_difference),
            (metric_name, self.promised.metric, self.held_out.metric, self.metric_difference),
        ):
            verdict = "holds" if low <= 0 <= high else "does NOT hold"
            comparisons.append(f"{name} {verdict} (promised {promised:.1%}, measured {measured:.1%})")
            intervals.append(f"{100 * low:+.1f} to {100 * high:+.1f}")
        return (
            f"On {self.num_prompts} held-out prompts, {what} ({threshold_text(self.promised.threshold)}): "
            f"{'; '.join(comparisons)}. 95 % confidence intervals of the differences in percentage points: "
            f"{' and '.join(intervals)}."
        )


def best_within(points: Sequence[CalibrationPoint], budget: float) -> CalibrationPoint:
    """The point with the best metric among those within a deferral rate. A tie goes to the lower deferral rate.

    Raises:
        ConfigError: `budget` is outside [0, 1], or every point exceeds it.
    """
    if not 0 <= budget <= 1:
        raise ConfigError(f"budget is {budget}, expected a deferral rate from 0 to 1")
    allowed = [point for point in points if point.deferral_rate <= budget]
    if not allowed:
        least = min(point.deferral_rate for point in points)
        raise ConfigError(f"budget is {budget}, but the lowest measured deferral rate is {least:.3g}")
    return max(allowed, key=lambda point: (point.metric, -point.deferral_rate, point.threshold))


@dataclass(frozen=True)
class Calibration:
    """Points measured on one validation set.

    Attributes:
        points: in order of increasing deferral rate.
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
        """The point for a deferral rate, as in `best_within`."""
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
        checks = []
        for check in content["checks"]:
            measured = {name: CalibrationPoint.from_dict(check[name]) for name in ("promised", "held_out")}
            intervals = {name: tuple(check[name]) for name in ("rate_difference", "metric_difference")}
            checks.append(HeldOutCheck(**{**check, **measured, **intervals}))
        calibration = cls(**{**content, "points": points, "checks": checks})
        for record in (*checks, calibration):
            check_fields(record)
        for budget in (1.0, *calibration.budgets):
            calibration.best(budget)
        return calibration
