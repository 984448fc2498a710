"""Weighted multinomial logistic regression over authors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from collm.core.objective import author_logprobs


def weighted_nll(defer_logits: Tensor, labels: Tensor, positive_weight: float) -> Tensor:
    """sum_i c_i (-log P(Z = y_i)) / sum_i c_i, with c_i = positive_weight where y_i != 0, else 1.

    Args:
        defer_logits: u, shape (M, K).
        labels: author numbers y in 0..K, shape (M,).

    Returns:
        A scalar in nats.
    """
    weights = torch.where(labels != 0, positive_weight, 1.0)
    nll = F.nll_loss(author_logprobs(defer_logits), labels, reduction="none")
    return (weights * nll).sum() / weights.sum()


def fit_authors(
    features: Tensor, labels: Tensor, start: tuple[Tensor, Tensor], *, positive_weight: float, penalty: float
) -> tuple[Tensor, Tensor]:
    """Minimise weighted_nll(x W^T + b) + penalty / 2 |W|^2 by L-BFGS. The bias is not penalised.

    Args:
        features: x, standardised, fp32, shape (M, H).
        labels: author numbers in 0..K, shape (M,).
        start: initial weight (K, H) and bias (K,).

    Returns:
        Weight and bias.
    """
    weight, bias = (tensor.detach().clone().requires_grad_() for tensor in start)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=200,
        history_size=10,
        tolerance_grad=1e-6,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = weighted_nll(F.linear(features, weight, bias), labels, positive_weight)
        loss = loss + penalty / 2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()
