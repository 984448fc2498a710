"""Calibration of the defer prob: a reliability diagram."""

from __future__ import annotations

from dataclasses import dataclass

from collm.core.objective import defer_probs
from collm.evaluation.intervals import bootstrap_interval
from collm.training.measures import TokenViews


@dataclass(frozen=True)
class ReliabilityBin:
    """Tokens with similar defer probs, each predicted correctly by exactly one of base and assistant.

    Attributes:
        defer_prob: mean defer prob.
        assistant_right: share that the assistant predicts correctly. low and high are its 95 % interval, which treats
            tokens as independent.
        tokens: number of tokens.
    """

    defer_prob: float
    assistant_right: float
    low: float
    high: float
    tokens: int


def reliability(views: TokenViews, num_bins: int = 10) -> list[ReliabilityBin]:
    """The tokens that exactly one of two authors predicts correctly, in bins of equal width by defer prob.

    The authors are the base and the assistant with the highest defer logit. If both are right or both are wrong, the
    choice does not matter, and the likelihood hardly trains the head there. Empty bins are left out.
    """
    asked = views.defer_logits.argmax(-1, keepdim=True)  # (N, 1)
    theirs = views.assistant_correct.gather(-1, asked).squeeze(-1)
    one_right = theirs != views.base_correct
    probs, right = defer_probs(views.defer_logits)[one_right], theirs[one_right]
    places = (probs * num_bins).long().clamp(max=num_bins - 1)
    bins = []
    for place in sorted(set(places.tolist())):
        inside = right[places == place].double().tolist()
        interval = bootstrap_interval(inside)
        mean = probs[places == place].mean().item()
        bins.append(ReliabilityBin(mean, interval.mean, interval.low, interval.high, len(inside)))
    return bins
