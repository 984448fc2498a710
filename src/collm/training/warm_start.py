"""Warm start: fit the deferral head to pseudo-labels, on hidden states of the frozen base."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from collm.core.head import DeferralHead
from collm.core.objective import label_nll
from collm.errors import DataError
from collm.models.language_model import LanguageModel
from collm.training.config import CoLLMConfig
from collm.training.examples import Example
from collm.training.fitting import HELD_OUT, Loss, concatenated, fit_layers, read_by
from collm.training.inspection import LabelReport, head_measures
from collm.training.scores import Scores, stored_examples
from collm.training.scoring import OnProgress, read_scores


def warm_start(
    base: LanguageModel | Scores,
    head: DeferralHead,
    examples: Sequence[Example],
    labels: tuple[Tensor, LabelReport],
    config: CoLLMConfig,
    progress: OnProgress = lambda done, total: None,
) -> dict[str, float]:
    """Set the head by a weighted logistic regression of the pseudo-labels on the base's hidden states.

    The paper uses one pass of AdamW (arXiv 2403.03870). This finds the optimum of the same objective (`fit_layers`).

    Args:
        base: the frozen base, which is not modified, or its scores of these examples with hidden states.
        labels: from `label_tokens`.
        config: its warm_start_tokens are used, of examples in the random order of its seed.

    Returns:
        loss_nats, the weighted negative log-likelihood of the pseudo-labels, accuracy and auc (`head_measures`), on
        held-out examples, or on all if there are too few to hold any out; share and num_tokens, the share of positives
        among all used tokens, and their number; penalty, the chosen L2 penalty.
    """
    (values, report), counts = labels, torch.tensor([example.num_targets for example in examples])
    max_tokens, positive_weight = map(config.resolved, ("warm_start_tokens", "positive_weight"))
    order = torch.randperm(len(counts), generator=torch.Generator().manual_seed(config.seed))
    counts, by_example = counts[order], torch.split(values, counts.tolist())
    indices = order[counts.cumsum(0) - counts < max_tokens].tolist()  # with less than max_tokens before them
    targets = torch.cat([by_example[index] for index in indices])[:max_tokens]
    if not (targets != 0).any():
        raise DataError(f"the warm start found no positive label among {len(targets)} tokens; {report}")
    if isinstance(base, LanguageModel):
        used = [examples[index] for index in indices]
        read = read_scores(base, used, hidden_states=True, logprobs=head.doubt, progress=progress)
    else:
        stored = stored_examples(base, [])
        read = concatenated([stored[index] for index in indices])
    inputs = read_by(head, {name: values[:max_tokens] for name, values in read.items()})
    targets = targets.to(head.weight.device)
    cut = int(counts[: round((1 - HELD_OUT) * len(indices))].sum())
    if not all((part != 0).any() for part in (targets[:cut], targets[cut:])):  # a part without positives tells nothing
        cut = 0
    loss: Loss = lambda u, rows: weighted_nll(u, targets[rows], positive_weight)  # noqa: E731
    least, penalty, output = fit_layers(head, inputs, cut, loss)
    accuracy, area = head_measures(output, targets[-len(output) :])
    share = (targets != 0).float().mean().item()
    quality = {"loss_nats": least, "accuracy": accuracy, "auc": area}
    return {**quality, "share": share, "num_tokens": len(targets), "penalty": penalty}


def weighted_nll(defer_logits: Tensor, labels: Tensor, positive_weight: float) -> Tensor:
    """sum_i c_i (-log P(Z = y_i)) / sum_i c_i in nats for u (M, K) and y (M,); c_i = positive_weight if y_i else 1."""
    weights = torch.where(labels != 0, positive_weight, 1.0)
    return label_nll(defer_logits, labels, positive_weight).sum() / weights.sum()
