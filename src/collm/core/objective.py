"""The training objective and the pseudo-labels of Co-LLM (arXiv 2403.03870), for K >= 1 assistants.

Shapes: B batch, T tokens, K assistants. Values at position t belong to the token that follows position t.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from collm.errors import ConfigError

PseudoLabelVariant = Literal["a", "b"]


def author_logprobs(defer_logits: Tensor) -> Tensor:
    """log P(Z = 0..K) = log_softmax([0, u_1..u_K]), in fp32.

    Args:
        defer_logits: u, shape (..., K).

    Returns:
        Shape (..., K + 1), nats; entry 0 is the base. With K = 1 this equals the paper's sigmoid.
    """
    return torch.log_softmax(F.pad(defer_logits.float(), (1, 0)), dim=-1)


def defer_probs(defer_logits: Tensor) -> Tensor:
    """1 - P(Z = 0), computed as sigmoid(logsumexp_k u_k) to avoid cancellation.

    Args:
        defer_logits: u, shape (..., K).

    Returns:
        Shape (...), fp64, so that a head that nearly always defers still ranks tokens. In fp32, every probability above
        1 - 6e-8 would be 1. The smaller of d and 1 - d is rounded to fp32, below which logits are noise.
    """
    logit = torch.logsumexp(defer_logits.float(), dim=-1)
    smaller = torch.sigmoid(-logit.abs()).double()
    return torch.where(logit > 0, 1 - smaller, smaller)


def marginal_logprobs(base_logprob: Tensor, assistant_logprobs: Tensor, defer_logits: Tensor) -> Tensor:
    """log sum_z P(z | x_<t) P_z(x_t | x_<t): the joint model's log-probability of each token.

    Args:
        base_logprob: shape (...), nats.
        assistant_logprobs: shape (..., K), nats.
        defer_logits: u, shape (..., K).

    Returns:
        Shape (...), nats, fp32 (arXiv 2403.03870).
    """
    by_author = torch.cat([base_logprob.unsqueeze(-1), assistant_logprobs], dim=-1).float()
    return torch.logsumexp(author_logprobs(defer_logits) + by_author, dim=-1)


def marginal_nll(base_logprob: Tensor, assistant_logprobs: Tensor, defer_logits: Tensor, mask: Tensor) -> Tensor:
    """Mean negative log marginal likelihood of the target tokens.

    Args:
        base_logprob: log P_0 of each gold token, shape (B, T), nats.
        assistant_logprobs: log P_k of each gold token, shape (B, T, K), nats.
        defer_logits: u, shape (B, T, K).
        mask: true at target tokens, shape (B, T).

    Returns:
        A scalar in nats per target token. Masked positions receive no gradient, even if they hold NaN.

    Raises:
        ConfigError: the mask selects no target token, or the shapes do not match.
    """
    _check_shapes(base_logprob, assistant_logprobs, defer_logits, mask)
    mask = mask.bool()
    if not mask.any():
        raise ConfigError("the mask selects no target token, so the mean is undefined")
    # Select before computing, so that a NaN at a masked position reaches neither the loss nor the gradient.
    return -marginal_logprobs(base_logprob[mask], assistant_logprobs[mask], defer_logits[mask]).mean()


def deferral_cost(defer_logits: Tensor, costs: Sequence[float]) -> Tensor:
    """The sum of c_k P(Z = k) over all positions and assistants, a scalar in nats.

    Args:
        defer_logits: u, shape (..., K).
        costs: c, in nats per token of each assistant, K of them.
    """
    probs = author_logprobs(defer_logits).exp()[..., 1:]
    tokens = probs.reshape(-1, probs.shape[-1]).sum(0)  # (K,), in expectation
    return torch.stack([cost * number for cost, number in zip(costs, tokens, strict=True)]).sum()


def pseudo_labels(
    base_correct: Tensor,
    assistant_correct: Tensor,
    assistant_logprobs: Tensor,
    variant: PseudoLabelVariant = "a",
) -> Tensor:
    """Guess each gold token's author from the models' predictions (weak supervision of arXiv 2403.03870).

    Variant "a": label k if assistant k's argmax is the gold token and the base's is not, else 0. If several
    assistants qualify, take the one that gives the gold token the most probability. Variant "b": wherever the base's
    argmax is wrong, take the assistant that gives the gold token the most probability.

    Args:
        base_correct: whether the base's argmax is the gold token, bool, shape (B, T).
        assistant_correct: the same for each assistant, bool, shape (B, T, K).
        assistant_logprobs: shape (B, T, K), nats.
        variant: "a" or "b".

    Returns:
        Author numbers in 0..K, int64, shape (B, T).

    Raises:
        ConfigError: `variant` is unknown.
    """
    if variant not in get_args(PseudoLabelVariant):
        raise ConfigError(f"pseudo-label variant is {variant!r}, expected 'a' or 'b'")
    usable = assistant_correct.bool() if variant == "a" else torch.ones_like(assistant_correct, dtype=torch.bool)
    usable = usable & ~base_correct.bool().unsqueeze(-1)
    ranked = assistant_logprobs.float().clamp(min=torch.finfo(torch.float32).min)
    best = ranked.masked_fill(~usable, -torch.inf).argmax(dim=-1) + 1
    return torch.where(usable.any(dim=-1), best, torch.zeros_like(best))


def _check_shapes(base_logprob: Tensor, assistant_logprobs: Tensor, defer_logits: Tensor, mask: Tensor) -> None:
    match = (
        assistant_logprobs.shape == defer_logits.shape
        and base_logprob.shape == mask.shape == assistant_logprobs.shape[:-1]
    )
    if not match:
        raise ConfigError(
            "shapes do not match: expected base_logprob (B, T), assistant_logprobs (B, T, K), defer_logits (B, T, K), "
            f"mask (B, T); got {tuple(base_logprob.shape)}, {tuple(assistant_logprobs.shape)}, "
            f"{tuple(defer_logits.shape)}, {tuple(mask.shape)}"
        )
