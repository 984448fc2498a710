"""Whether the defer prob is as good as its word."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from collm.core.objective import defer_probs
from collm.evaluation.intervals import bootstrap_interval
from collm.training.measures import TokenViews


@dataclass(frozen=True)
class ReliabilityBin:
    """Tokens of similar defer prob.

    Attributes:
        defer_prob: their mean.
        assistant_right: of these tokens, each of which either the base or the assistant has right, the share that the
            assistant has; low and high are the ends of its 95 % interval, as if tokens were independent.
        tokens: how many.
    """

    defer_prob: float
    assistant_right: float
    low: float
    high: float
    tokens: int


def reliability(views: TokenViews, num_bins: int = 10) -> list[ReliabilityBin]:
    """The tokens that exactly one of two authors has right, in bins of equal width by defer prob.

    The two are the base and the assistant that would be asked, argmax_k u_k. Where both are right or both are wrong
    nothing hangs on who writes, and the likelihood hardly moves the head there. Empty bins are left out.
    """
    asked = views.defer_logits.argmax(-1, keepdim=True)  # (N, 1)
    theirs = views.assistant_correct.gather(-1, asked).squeeze(-1)
    one_right = theirs != views.base_correct
    probs, right = defer_probs(views.defer_logits)[one_right].double(), theirs[one_right]
    places = (probs * num_bins).long().clamp(max=num_bins - 1)
    return [_bin(probs[places == place], right[places == place]) for place in sorted(set(places.tolist()))]


def _bin(probs: Tensor, right: Tensor) -> ReliabilityBin:
    interval = bootstrap_interval(right.to(torch.float64).tolist())
    return ReliabilityBin(probs.mean().item(), interval.mean, interval.low, interval.high, len(probs))
