"""Fit the rows of new assistants in a trained head. The base and the rows of the other assistants stay."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor
from torch.nn import functional as F

from collm.core.head import DeferralHead
from collm.core.objective import pseudo_labels
from collm.training.fitting import (
    PENALTIES,
    Examples,
    for_raw_inputs,
    gathered,
    likelihood_loss,
    minimum,
    standardisation,
)
from collm.training.warm_start import weighted_nll

POSITIVE = 8.0
"""Weight of a token whose pseudo-label is an assistant, as in a warm start."""
RARELY = -4.0
"""The bias that new rows start from. A new assistant then first writes 2 % of the tokens."""


def fit_new_rows(
    head: DeferralHead, count: int, data: Examples, *, costs: Sequence[float], seed: int, old_biases: bool = False
) -> dict[str, float]:
    """Set the last `count` rows of a head by the marginal likelihood (arXiv 2403.03870), with all else fixed.

    The L2 penalty is the one with the least loss on a fifth of the examples, held out by the seed. Then all are used.

    Args:
        data: examples as in `scores.stored_examples`, with the scores of all assistants.
        costs: deferral cost of each assistant, in nats per decision.
        old_biases: fit the biases of the other rows too.

    Returns:
        before_nats and after_nats: loss per held-out token without and with the new rows. num_tokens: number of target
        tokens, held out or not. penalty: the chosen L2 penalty.
    """
    head, first, trained = deepcopy(head).cpu(), head.num_assistants - count, head
    inputs, cut, values = gathered(head, data, seed)
    mean, scale = standardisation(inputs)
    features = (inputs - mean) * scale
    old = head(inputs[:, : head.hidden_size], inputs[:, head.hidden_size :])[:, :first].detach()
    labels = pseudo_labels(values["base_correct"], values["assistant_correct"], values["assistant_logprobs"])
    loss, train, test = likelihood_loss(values, costs), slice(0, cut), slice(cut, None)

    def logits(at: slice, weight: Tensor, bias: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        return torch.cat([old[at] + shift, F.linear(features[at], weight, bias)], dim=-1)

    def fitted(at: slice, start: Sequence[Tensor], penalty: float) -> list[Tensor]:
        return minimum(lambda *fit: loss(logits(at, *fit), at) + penalty / 2 * fit[0].square().sum(), start)

    # The likelihood has local optima where a row stays silent. That of the pseudo-labels is convex.
    def label_loss(*fit: Tensor) -> Tensor:
        return weighted_nll(logits(train, *fit), labels[train], POSITIVE) + PENALTIES[2] * fit[0].square().sum()

    silent = [inputs.new_zeros(count, inputs.shape[1]), inputs.new_full((count,), RARELY)]
    start = minimum(label_loss, [*silent, inputs.new_zeros(first)] if old_biases else silent)
    fits = {penalty: fitted(train, start, penalty) for penalty in PENALTIES}
    losses = {penalty: loss(logits(test, *fit), test).item() for penalty, fit in fits.items()}
    penalty = min(losses, key=losses.__getitem__)
    weight, bias, *shift = fitted(slice(None), fits[penalty], penalty)
    with torch.no_grad():
        trained.weight[first:], trained.bias[first:] = for_raw_inputs(weight, bias, mean, scale)
        trained.bias[:first] += shift[0].to(trained.bias) if shift else 0.0
    nats = {"before_nats": loss(old[test], test).item(), "after_nats": losses[penalty]}
    return {**nats, "num_tokens": len(inputs), "penalty": penalty}
