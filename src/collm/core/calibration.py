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
        metric: metric of the completions: exact_match, contains, last_number, token_f1 or module:function. By default
            one that suits the validation rows.
        rates: target deferral rates, by default 0, 0.05, 0.1, 0.2, .. 1.
        budgets: limits for the deferral rate, each to hold with 95 %, to find thresholds for besides the best of all.
        choose: "best" by the metric, or by the curve if that tells nothing apart; or "youden": the threshold with the
            largest sensitivity + specificity - 1 for the pseudo-labels of the reference completions, and no others.
        judge: a judge beside each threshold, such as regret:nats=2, which is then used with the calibrated ones.
        refine: number of thresholds to add near the best one, and near that of each budget.
        max_tokens: maximum number of tokens of a completion.
        stop: texts that end a completion.
        max_batch: maximum number of prompts decoded at once.
        params: sampling parameters, greedy and with the two above. Others can be set.
    """

    metric: str | None = None
    rates: list[float] = field(
        default_factory=lambda: sorted([0.05, *(i / 10 for i in range(11))]), metadata={"flag": "--rate"}
    )
    budgets: list[float] = field(default_factory=list, metadata={"flag": "--budget"})
    choose: str = "best"
    judge: str | None = None
    refine: int = 3
    max_tokens: int = 256
    stop: list[str] = field(default_factory=list)
    max_batch: int = 16

    def __post_init__(self) -> None:
        if outside := [rate for rate in (*self.rates, *self.budgets) if not 0 <= rate <= 1]:
            raise ConfigError(f"cannot aim at a deferral rate of {outside[0]}, expected numbers from 0 to 1")
        if self.choose not in ("best", "youden"):
            raise ConfigError(f"choose is {self.choose!r}, expected best or youden")
        if self.choose == "youden" and self.budgets:
            raise ConfigError(
                "budgets have no effect with choose 'youden', which measures one threshold; leave one out"
            )
        if self.refine < 0:
            raise ConfigError(f"refine is {self.refine}, expected 0 or more thresholds")
        self.params = SamplingParams(max_tokens=self.max_tokens, stop=self.stop)


def threshold_text(threshold: float) -> str:
    """A threshold in six digits, or in as many as distinguish it from 1, at which only the base writes."""
    texts = (f"{threshold:.{digits}g}" for digits in range(6, 18))
    return next(text for text in texts if threshold >= 1 or text != "1")


BUDGET_NOTE = (
    "A budget is a limit that holds with 95 %: the upper end of the interval of the deferral rate is within it, for "
    "prompts of the same kind."
)


@dataclass(frozen=True)
class CalibrationPoint:
    """Measurements at one threshold.

    Attributes:
        metric: mean over the validation prompts, in [0, 1].
        low, high: confidence interval of the metric.
        rate_low, rate_high: confidence interval of the deferral rate; both 0 at threshold 1: only the base writes.
        differs: whether the metric differs from that of the base alone: the 95 % interval of the paired difference is
            without 0. Each threshold is tested alone, so among many one may differ by chance.
        rejected: share of the tokens that a judge put in place of the base's. None without a judge.
        assistant_passes: forward passes of the assistants for each token. None without a judge.
        gold_accuracy: share of the tokens of the reference completions that are the argmax of the author that the
            threshold names there (teacher-forced), in [0, 1]. None if it was not measured.
    """

    threshold: float
    deferral_rate: float
    metric: float
    low: float
    high: float
    rate_low: float
    rate_high: float
    differs: bool = True
    gold_accuracy: float | None = None
    rejected: float | None = None
    assistant_passes: float | None = None

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> CalibrationPoint:
        point = cls(**content)
        check_fields(point)
        others = ("threshold", "assistant_passes")
        shares = [value for name, value in content.items() if name not in others and value is not None]
        if not -1 <= point.threshold <= 1 or not all(0 <= share <= 1 for share in shares):
            raise ConfigError(f"{point!s:.300} is impossible, expected shares from 0 to 1")
        return point


@dataclass(frozen=True)
class HeldOutCheck:
    """A second measurement of a chosen threshold, on held-out prompts.

    Attributes:
        budget: the limit that the threshold was chosen for; 1 for the default threshold.
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
        """Judge the threshold by its held-out measurement, in two sentences.

        A budget is kept if the interval of the deferral rate ends within it, broken if the interval begins above it,
        otherwise undecided. A metric, and the rate of the default threshold, hold if the interval of their difference
        to what was promised includes 0.
        """
        promised, found = self.promised, self.held_out
        if self.budget == 1:
            what = "the default threshold"
            rate = _comparison("deferral rate", promised.deferral_rate, found.deferral_rate, self.rate_difference)
        else:
            what = f"the threshold for a budget of {self.budget:.4g}"
            within, above = found.rate_high <= self.budget, found.rate_low > self.budget
            verdict = "kept" if within else "BROKEN" if above else "undecided"
            ends = f"{100 * found.rate_low:.1f} to {found.rate_high:.1%}"
            rate = f"budget {verdict} (deferral rate {found.deferral_rate:.1%}, {ends})"
        metric = _comparison(metric_name, promised.metric, found.metric, self.metric_difference)
        return (
            f"On {self.num_prompts} held-out prompts, {what} ({threshold_text(promised.threshold)}): {rate}; {metric}. "
            "The intervals are 95 % confidence intervals."
        )


def _comparison(name: str, promised: float, measured: float, difference: tuple[float, float]) -> str:
    low, high = difference
    verdict = "holds" if low <= 0 <= high else "does NOT hold"
    points = f"{100 * low:+.1f} to {100 * high:+.1f} points"
    return f"{name} {verdict} (promised {promised:.1%}, measured {measured:.1%}, difference {points})"


def best_within(points: Sequence[CalibrationPoint], budget: float) -> CalibrationPoint:
    """The point with the best metric among those whose deferral rate is within a budget with 95 %. A tie goes to the
    lower deferral rate, then to the threshold nearest to 1/2, or to 1 if nothing is deferred.

    A point is within a budget if the upper end of the 95 % interval of its deferral rate is. So the rate over many more
    prompts of the same kind exceeds the budget in at most 5 % of calibrations. Never deferring is always within.

    If the metric does not tell these points apart, the one with the best gold accuracy, where it was measured.

    Raises:
        ConfigError: `budget` is outside [0, 1], or no point is within it.
    """
    if not 0 <= budget <= 1:
        raise ConfigError(f"budget is {budget}, expected a deferral rate from 0 to 1")
    allowed = _within(points, budget)
    if not allowed:
        least = min(point.rate_high for point in points)
        raise ConfigError(f"budget is {budget}, but the lowest measured deferral rate is up to {least:.3g} with 95 %")
    by_metric = _tells_apart(allowed) or any(point.gold_accuracy is None for point in allowed)

    def rank(point: CalibrationPoint) -> tuple[float, float, float]:
        measured = point.metric if by_metric else point.gold_accuracy or 0.0
        near = -abs(point.threshold - 0.5) if point.deferral_rate else point.threshold
        return measured, -point.deferral_rate, near

    return max(allowed, key=rank)


def _within(points: Sequence[CalibrationPoint], budget: float) -> list[CalibrationPoint]:
    return [point for point in points if point.rate_high <= budget]


def _tells_apart(points: Sequence[CalibrationPoint]) -> bool:
    """Whether the metric of any point differs from that of the base alone. A single point needs no choice."""
    return len(points) == 1 or any(point.differs for point in points)


def _listed(budgets: Sequence[float]) -> str:
    return " and ".join(f"{budget:.4g}" for budget in budgets)


@dataclass(frozen=True)
class Calibration:
    """Points measured on one validation set.

    Attributes:
        points: in order of increasing deferral rate.
        num_prompts: number of validation prompts.
        settings: other settings that the measurement depends on (data, sampling, confidence level).
        budgets: limits for the deferral rate for which a threshold was chosen in addition to the default.
        checks: held-out checks of the chosen thresholds, if any were made.
    """

    points: Sequence[CalibrationPoint]
    metric_name: str
    num_prompts: int
    settings: dict[str, Any]
    budgets: Sequence[float] = field(default_factory=list)
    checks: Sequence[HeldOutCheck] = field(default_factory=list)

    @property
    def judge(self) -> str | None:
        """The judge beside each threshold, or None."""
        return self.settings.get("judge")

    def best(self, budget: float = 1.0) -> CalibrationPoint:
        """The point for a budget, as in `best_within`."""
        return best_within(self.points, budget)

    def uses(self, point: CalibrationPoint) -> list[str]:
        """Labels of the choices that a point won: "default" and "within <budget>"."""
        default = ["default"] if point is self.best() else []
        return default + [f"within {budget:.4g}" for budget in self.budgets if point is self.best(budget)]

    def warning(self) -> str | None:
        """Says which budgets no threshold that defers is within, which choices the metric could not make, and what was
        chosen there. None if there are no such budgets and choices.
        """
        said, defers = [], any(point.deferral_rate for point in self.points)
        unreached = [
            budget
            for budget in self.budgets
            if budget and defers and not any(point.deferral_rate for point in _within(self.points, budget))
        ]
        if unreached:
            said.append(
                f"On {self.num_prompts} prompts, no threshold that defers is within {_listed(unreached)} with 95 %, so "
                "only the base writes there. Use more rows or a higher budget."
            )
        choices = [one for one in (1.0, *self.budgets) if one not in unreached]
        if budgets := [one for one in choices if not _tells_apart(_within(self.points, one))]:
            said.append(self._not_told_apart(budgets))
        return " ".join(said) or None

    def _not_told_apart(self, budgets: Sequence[float]) -> str:
        which = "" if 1.0 in budgets else f" within {_listed(budgets)}"
        values = [point.metric for point in _within(self.points, max(budgets))]
        how = "chosen teacher-forced, by the tokens of the reference completions that are predicted right"
        if any(point.gold_accuracy is None for point in self.points):
            how = "the best by chance, or the one that asks the assistants least"
        return (
            f"{self.metric_name} does not tell the thresholds{which} apart: on {self.num_prompts} prompts it is "
            f"{min(values):.3f} to {max(values):.3f}, which may be chance. So the threshold is {how}. Use another "
            "metric or more rows."
        )

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
