"""Sampling from logits: penalties, temperature, min-p, top-k, top-p and inverse transform sampling."""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor

_BELOW_ONE = 1 - 2.0**-53


def seeded(seed: int | None) -> random.Random:
    """The random numbers of a seed; of the operating system's entropy if it is None. Python alone ignores the sign."""
    return random.Random(seed if seed is None or seed >= 0 else str(seed))


def penalised(logits: Tensor, counts: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor) -> Tensor:
    """Apply penalties to the logits of tokens that occur in the prompt or the output. All arguments have shape (N,).

    `repetition` first divides a logit x > 0 and multiplies a logit x < 0 (arXiv 1909.05858). The result is
    x - presence * [c > 0] - frequency * c, where c counts the token in the output, as in vLLM.
    """
    scaled = torch.where(logits > 0, logits / repetition, logits * repetition)
    return scaled - presence * (counts > 0) - frequency * counts


def token_probs(logits: Tensor, temperature: float, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0) -> Tensor:
    """The distribution that `sample` draws from, fp32, of the shape of the logits, (..., V).

    Starts from softmax(logits / temperature), keeps tokens at least min_p times as probable as the most probable one,
    then the top_k most probable (with ties for the last place), then the smallest set of the most probable whose share
    reaches top_p, and renormalises. At temperature 0 all mass is on the argmax.
    """
    logits = logits.float()
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    highest = logits.amax(-1, keepdim=True)  # subtracting it prevents overflow at temperatures close to 0
    scaled = (logits - highest) / max(temperature, torch.finfo(logits.dtype).tiny)
    if min_p > 0:
        scaled = scaled.masked_fill(scaled < math.log(min_p), -torch.inf)
    if 0 < top_k < logits.shape[-1]:
        cutoff = scaled.topk(top_k, dim=-1).values[..., -1:]
        scaled = scaled.masked_fill(scaled < cutoff, -torch.inf)
    probs = torch.softmax(scaled, dim=-1)
    if top_p < 1:
        ranked, order = probs.sort(dim=-1, descending=True)
        outside = ranked.cumsum(-1) - ranked >= top_p  # the more probable tokens already reach the share
        probs = probs.masked_fill(outside.gather(-1, order.argsort(-1)), 0.0)
    return probs / probs.sum(-1, keepdim=True)


def sample(probs: Tensor, uniform: Tensor) -> Tensor:
    """Draw by inverse transform sampling: the first token whose cumulative probability exceeds `uniform`.

    Probs have shape (..., V), `uniform` and the token ids (...). A token of probability 0 is never drawn.
    """
    cumulative = probs.double().cumsum(-1)
    target = uniform.double().unsqueeze(-1) * cumulative[..., -1:]
    drawn = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    last = probs.shape[-1] - 1 - (probs.flip(-1) > 0).int().argmax(-1)  # rounding must not leave the support
    return torch.minimum(drawn, last)


def redraw(probs: Tensor, proposal: Tensor, drafted: Tensor, uniform: Tensor, kept: Tensor | None = None) -> Tensor:
    """Draw from `probs` with a draft: speculative sampling (arXiv 2211.17192).

    The draft x stands with probability min(1, P(x) / Q(x)). Otherwise a token is drawn from the positive part of P - Q.
    So the result is distributed as P. It depends on the position's random number alone, not on what was drafted when:
    within the interval that gave x, `uniform` is again uniform, and decides about x and its replacement.

    Args:
        probs, proposal: P and Q, shape (R, V).
        drafted: the tokens that `sample(proposal, uniform)` drew, shape (R,).
        uniform: from [0, 1), shape (R,).
        kept: which drafts stand, shape (R,), if something else decides about it. The other tokens are drawn from P.
    """
    below, x = proposal.double().cumsum(-1), drafted.unsqueeze(-1)
    share = proposal.double().gather(-1, x).squeeze(-1)
    within = (uniform * below[..., -1] - below.gather(-1, x).squeeze(-1) + share) / share
    if kept is None:
        ratio = (probs.double().gather(-1, x).squeeze(-1) / share).clamp(max=1)
        kept, within = within < ratio, (within - ratio) / (1 - ratio)
        probs = (probs - proposal).clamp(min=0)
    return torch.where(kept, drafted, sample(probs, within.nan_to_num().clamp(0, _BELOW_ONE)))
