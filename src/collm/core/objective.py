"""Training objectives and the pseudo-labels of Co-LLM (arXiv 2403.03870), for K >= 1 assistants.

Shapes: B batch, T tokens, K assistants. Values at position t belong to the token that follows position t.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from collm.core.head import author_logprobs
from collm.errors import ConfigError

PseudoLabelVariant = Literal["a", "b"]
Objective = Literal["marginal", "separate", "weak", "gain"]
"""What training optimises: the marginal likelihood of the paper; the likelihoods of base and head apart; those of the
base and of pseudo-labels, the paper's baseline of weak supervision; or the squared error of a head that predicts the
assistants' gain (`training.gain`)."""

WEAK_POSITIVE_WEIGHT = 5.0
"""Weight of tokens that are labelled with an assistant, in the authors' weak supervision."""


def marginal_logprobs(base_logprob: Tensor, assistant_logprobs: Tensor, defer_logits: Tensor) -> Tensor:
    """log sum_z P(z | x_<t) P_z(x_t | x_<t): the joint model's log-probability of each token (arXiv 2403.03870).

    In nats. `base_logprob` and the result have shape (...), the other arguments (..., K). The result is fp32.
    """
    by_author = torch.cat([base_logprob.unsqueeze(-1), assistant_logprobs], dim=-1).float()
    return torch.logsumexp(author_logprobs(defer_logits) + by_author, dim=-1)


def token_nll(
    base_logprob: Tensor, assistant_logprobs: Tensor, defer_logits: Tensor, objective: Objective = "marginal"
) -> Tensor:
    """The loss of each token, without the deferral cost, in nats, fp32, shape (...). Arguments as for the marginal.

    It is the negative marginal log-likelihood. With "separate", that has no gradient in the base, whose own negative
    log-likelihood is added: the base learns as if it wrote alone, the head when to ask. With "weak" it is 2/3 of the
    latter, and the rest of the loss is `label_nll` / 3 with `WEAK_POSITIVE_WEIGHT`.
    """
    if objective == "weak":
        return -2 / 3 * base_logprob.float()
    if objective == "separate":
        return -base_logprob.float() - marginal_logprobs(base_logprob.detach(), assistant_logprobs, defer_logits)
    return -marginal_logprobs(base_logprob, assistant_logprobs, defer_logits)


def label_nll(defer_logits: Tensor, labels: Tensor, positive_weight: float) -> Tensor:
    """c (-log P(Z = label)) in nats, with c = positive_weight for labels of assistants, 1 for the base, shape (M,).

    From u of shape (M, K) and authors 0..K of shape (M,). With K = 1 it is a binary cross-entropy.
    """
    weights = torch.where(labels != 0, positive_weight, 1.0)
    return weights * F.nll_loss(author_logprobs(defer_logits), labels, reduction="none")


def clipped_gains(base_logprob: Tensor, assistant_logprobs: Tensor, clip: float) -> Tensor:
    """log P_k(x_t) - log P_0(x_t) within [-clip, clip], in nats, shape (..., K), from shapes (...) and (..., K)."""
    return (assistant_logprobs - base_logprob.unsqueeze(-1)).clamp(-clip, clip)


def deferral_cost(defer_logits: Tensor, costs: Sequence[float]) -> Tensor:
    """The sum of c_k P(Z = k) over all decisions and assistants, a scalar in nats, from u of shape (..., K).

    `costs` are c_k in nats per decision, K of them. A decision is about a token, or a segment whatever its length.
    """
    probs = author_logprobs(defer_logits).exp()[..., 1:]
    deferrals = probs.reshape(-1, probs.shape[-1]).sum(0)  # (K,), in expectation
    return torch.stack([cost * number for cost, number in zip(costs, deferrals, strict=True)]).sum()


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
