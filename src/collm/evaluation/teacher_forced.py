"""All thresholds at once on given texts, without generating."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from collm.core.objective import defer_probs
from collm.core.policies import check_share
from collm.evaluation.gold import Deferred
from collm.training.measures import TokenViews

BASE_ALONE, ASSISTANTS_ALONE = 1.0, -1.0


@dataclass(frozen=True)
class TeacherForcedPoint:
    """A threshold on given texts, where each token follows the gold tokens before it.

    Attributes:
        deferral_rate: share of the gold tokens that assistants would write.
        accuracy: share of the gold tokens that are the argmax of their author.
        nll: mean of -log P of the gold tokens under their authors, nats.
    """

    threshold: float
    deferral_rate: float
    accuracy: float
    nll: float


@dataclass(frozen=True)
class TeacherForcedCurve:
    """All thresholds with different choices of authors, from the base alone to the assistants alone.

    Attributes:
        thresholds: fp64, shape (G + 1,), falling: 1, each distinct defer prob but the highest, -1.
        deferral_rates, accuracies, nlls: fp64, shape (G + 1,), as in `TeacherForcedPoint`.
        reachable: share of the gold tokens that are the argmax of any author: the accuracy of a perfect choice.
        num_tokens: M.
    """

    thresholds: Tensor
    deferral_rates: Tensor
    accuracies: Tensor
    nlls: Tensor
    reachable: float
    num_tokens: int

    def __len__(self) -> int:
        return len(self.thresholds)

    def __getitem__(self, index: int) -> TeacherForcedPoint:
        columns = (self.thresholds, self.deferral_rates, self.accuracies, self.nlls)
        return TeacherForcedPoint(*(column[index].item() for column in columns))

    def best(self, budget: float = 1.0) -> TeacherForcedPoint:
        """The most accurate point within a deferral rate. Ties go to the lower rate.

        Raises:
            ConfigError: the budget is outside [0, 1].
        """
        check_share("budget", budget)
        within = self.accuracies.where(self.deferral_rates <= budget, -torch.inf)
        return self[int((within == within.max()).int().argmax())]

    def at_rates(self, rates: Sequence[float]) -> list[TeacherForcedPoint]:
        """For each rate the last point that does not exceed it.

        Raises:
            ConfigError: a rate outside [0, 1].
        """
        for rate in rates:
            check_share("rate", rate)
        return [self[int((self.deferral_rates <= rate).nonzero().max())] for rate in rates]


def teacher_forced(views: TokenViews, beyond: Deferred) -> TeacherForcedCurve:
    """The exact curve. Tokens are sorted by defer prob, and tokens with equal defer probs are deferred together.

    Args:
        views: the predictions of all authors for the gold tokens.
        beyond: the result of deferring, from `gold.deferred`.
    """
    probs, order = defer_probs(views.defer_logits).sort(descending=True, stable=True)
    values, sizes = torch.unique_consecutive(probs, return_counts=True)
    ends = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)])  # (G + 1,): tokens deferred

    def means(base: Tensor, other: Tensor) -> Tensor:
        """Means over all tokens, with the other author's values for the first `ends` tokens."""
        nothing = torch.zeros(1, dtype=torch.float64)
        deferred = torch.cat([nothing, other[order].double().cumsum(0)])
        kept = torch.cat([base[order].double().flip(0).cumsum(0).flip(0), nothing])
        return (deferred + kept)[ends] / len(order)

    by_base = torch.zeros_like(beyond.by_assistant)
    right = views.base_correct | views.assistant_correct.any(-1)
    return TeacherForcedCurve(
        thresholds=torch.cat([torch.tensor([BASE_ALONE]).double(), values[1:], torch.tensor([ASSISTANTS_ALONE])]),
        deferral_rates=means(by_base, beyond.by_assistant),
        accuracies=means(views.base_correct, beyond.correct),
        nlls=-means(views.base_logprob, beyond.logprob),
        reachable=right.double().mean().item(),
        num_tokens=len(order),
    )
