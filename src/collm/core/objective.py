"""The training objective and the pseudo-labels of Co-LLM (arXiv 2403.03870), for K >= 1 assistants.

Shapes: B batch, T tokens, K assistants. Values at position t belong to the token that follows position t.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from collm.core.head import author_logprobs
from collm.errors import ConfigError

PseudoLabelVariant = Literal["a", "b"]


def marginal_logprobs(base_logprob: Tensor, assistant_logprobs: Tensor, defer_logits: Tensor) -> Tensor:
    """log sum_z P(z | x_<t) P_z(x_t | x_<t): the joint model's log-probability of each token (arXiv 2403.03870).

    In nats. `base_logprob` and the result have shape (...), the other arguments (..., K). The result is fp32.
    """
    by_author = torch.cat([base_logprob.unsqueeze(-1), assistant_logprobs], dim=-1).float()
    return torch.logsumexp(author_logprobs(defer_logits) + by_author, dim=-1)


def deferral_cost(defer_logits: Tensor, costs: Sequence[float]) -> Tensor:
    """The sum of c_k P(Z = k) over all positions and assistants, a scalar in nats, from u of shape (..., K).

    `costs` are c_k in nats per token, K of them.
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

    It is the base where its argmax is the gold token. Elsewhere it is the assistant that gives the gold token the most
    probability: in variant "a" among those whose argmax is the gold token (the base if there are none), in "b" among
    all.

    `base_correct` and the author numbers 0..K that are returned have shape (B, T), the others (B, T, K).

    Raises:
        ConfigError: `variant` is unknown.
    """
    if variant not in get_args(PseudoLabelVariant):
        raise ConfigError(f"pseudo-label variant is {variant!r}, expected 'a' or 'b'")
    usable = (assistant_correct.bool() | (variant == "b")) & ~base_correct.bool().unsqueeze(-1)
    ranked = assistant_logprobs.float().clamp(min=torch.finfo(torch.float32).min)
    best = ranked.masked_fill(~usable, -torch.inf).argmax(dim=-1) + 1
    return torch.where(usable.any(dim=-1), best, 0)
