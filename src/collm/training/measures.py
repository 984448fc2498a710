"""Measures of a head's choice of author, and of the joint model's predictions of gold tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from collm.core.head import author_logprobs, defer_probs
from collm.core.objective import deferral_cost, marginal_logprobs, pseudo_labels


def auc(scores: Tensor, positive: Tensor) -> float:
    """Area under the ROC curve, with ties counting half. NaN without positives or negatives."""
    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    if num_positive == 0 or num_negative == 0:
        return float("nan")
    _, place, counts = torch.unique(scores, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2).double()[place]
    above: float = ranks[positive].sum().item() - num_positive * (num_positive + 1) / 2
    return above / (num_positive * num_negative)


def head_measures(defer_logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Share of tokens whose most probable author is the label, and AUC of the defer prob for labels of assistants."""
    agreement = (author_logprobs(defer_logits).argmax(-1) == labels).float().mean().item()
    return agreement, auc(defer_probs(defer_logits), labels != 0)


@dataclass(frozen=True)
class TokenViews:
    """Predictions of all authors for N gold tokens.

    Attributes:
        base_logprob: log-probability of the gold token, nats, shape (N,).
        base_correct: whether the base's argmax is the gold token, bool, shape (N,).
        assistant_logprobs, assistant_correct, defer_logits: the same for each assistant, and u, shape (N, K).
        assistant_abstained: whether each assistant has no answer, bool, shape (N, K); None if none ever abstains.
    """

    base_logprob: Tensor
    base_correct: Tensor
    assistant_logprobs: Tensor
    assistant_correct: Tensor
    defer_logits: Tensor
    assistant_abstained: Tensor | None = None

    def split(self, sizes: Sequence[int]) -> list[TokenViews]:
        """Split into consecutive parts of these sizes."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        parts = {name: torch.split(values, list(sizes)) for name, values in found.items() if values is not None}
        return [TokenViews(**dict(zip(parts, one, strict=True))) for one in zip(*parts.values(), strict=True)]

    def measures(self, deferral_costs: Sequence[float] = ()) -> dict[str, float]:
        """Means over the tokens. The costs, in nats per token of each assistant, are part of the loss.

        Returns:
            loss: marginal NLL in nats, plus the deferral costs. base_nll and assistant_nll (assistant_1_nll, ..): NLL
            of each model alone. defer_prob. deferral_rate: share of tokens deferred at threshold 0.5.
            pseudo_label_share: share of tokens that an assistant's argmax predicts and the current base's does not.
            pseudo_label_agreement, head_auc: as in `head_measures`, for these labels.
        """
        marginal = marginal_logprobs(self.base_logprob, self.assistant_logprobs, self.defer_logits)
        labels = pseudo_labels(self.base_correct, self.assistant_correct, self.assistant_logprobs)
        deferring, (agreement, head_auc) = defer_probs(self.defer_logits), head_measures(self.defer_logits, labels)
        cost = deferral_cost(self.defer_logits, deferral_costs).item() if any(deferral_costs) else 0.0
        nlls = -self.assistant_logprobs.mean(0)
        names = ["assistant_nll"] if len(nlls) == 1 else [f"assistant_{k}_nll" for k in range(1, len(nlls) + 1)]
        return {
            "loss": -marginal.mean().item() + cost / len(marginal),
            "base_nll": -self.base_logprob.mean().item(),
            **dict(zip(names, nlls.tolist(), strict=True)),
            "defer_prob": deferring.mean().item(),
            "deferral_rate": (deferring > 0.5).float().mean().item(),
            "pseudo_label_share": (labels != 0).float().mean().item(),
            "pseudo_label_agreement": agreement,
            "head_auc": head_auc,
        }
