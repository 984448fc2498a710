"""From logits to the tokens that authors write, with as few transfers to the host as possible."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from collm.core.sampling import sample, token_probs
from collm.core.types import SamplingParams, TopLogprobs


@dataclass(frozen=True)
class Draw:
    """What an author writes at one position, and its log-probability in nats before temperature and truncation.

    `top` are the author's most probable tokens there, where the request asks for them.
    """

    token_id: int
    logprob: float
    top: TopLogprobs = ()

    @property
    def broken(self) -> bool:
        """The logits held NaN, or nothing finite."""
        return math.isnan(self.logprob)


def greedy_draws(logits: Tensor, *others: Tensor) -> tuple[list[Draw], list[list[float]]]:
    """The argmax of each row, and further numbers for it, fetched together.

    Args:
        logits: shape (R, V), fp32.
        *others: shape (R, n) each.

    Returns:
        R draws, and for each the numbers of `others` in one list.
    """
    token_ids = logits.argmax(-1, keepdim=True)
    logprobs = logits.gather(-1, token_ids) - logits.logsumexp(-1, keepdim=True)
    columns = [token_ids.double(), logprobs.double(), *(other.double() for other in others)]
    rows = torch.cat(columns, dim=-1).tolist()
    return [Draw(int(token_id), logprob) for token_id, logprob, *_ in rows], [row[2:] for row in rows]


def sampled_draw(logits: Tensor, params: SamplingParams, uniform: float) -> Draw:
    """A token from logits (V,), by inverting the cumulative distribution at `uniform`."""
    probs = token_probs(logits, params.temperature, params.top_p, params.top_k)
    token_id = sample(probs, probs.new_tensor(uniform, dtype=torch.float64))
    return Draw(int(token_id), float(logits[token_id] - logits.logsumexp(-1)))


def top_logprobs(logits: Tensor, most: int) -> TopLogprobs:
    """The most probable tokens of logits (V,), before temperature and truncation; none that is ruled out (-inf)."""
    values, token_ids = logits.topk(min(most, logits.shape[-1]))
    logprobs = (values - logits.logsumexp(-1)).tolist()
    return tuple(
        (one, logprob) for one, logprob in zip(token_ids.tolist(), logprobs, strict=True) if logprob > -math.inf
    )
