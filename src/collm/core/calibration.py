"""What calibration found: thresholds with the deferral rate and the metric each gave, and the choice among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
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
    """

    threshold: float
    deferral_rate: float
    metric: float
    low: float
    high: float


@dataclass(frozen=True)
class Calibration:
    """Points measured on one validation set.

    Attributes:
        points: in order of rising deferral rate.
        metric_name: what was measured.
        num_prompts: on how many prompts.
        settings: what else the measurement depended on (data, sampling, confidence).
    """

    points: Sequence[CalibrationPoint]
    metric_name: str
    num_prompts: int
    settings: dict[str, Any]

    def best(self, budget: float = 1.0) -> CalibrationPoint:
        """The point of the best metric among those whose deferral rate is within the budget, ties to the lower rate.

        Raises:
            ConfigError: the budget is outside [0, 1], or no point is within it.
        """
        if not 0 <= budget <= 1:
            raise ConfigError(f"budget is {budget}, expected a deferral rate from 0 to 1")
        allowed = [point for point in self.points if point.deferral_rate <= budget]
        if not allowed:
            least = min(point.deferral_rate for point in self.points)
            raise ConfigError(f"budget is {budget}, but the least deferral rate that was measured is {least:.3g}")
        return max(allowed, key=lambda point: (point.metric, -point.deferral_rate, point.threshold))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Calibration:
        """Read what `to_dict` wrote; a KeyError or TypeError where it is something else."""
        points = [CalibrationPoint(**point) for point in content["points"]]
        return cls(points, content["metric_name"], content["num_prompts"], content["settings"])
