"""From logits to the tokens that authors write, with as few transfers to the host as possible."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from collm.core.params import SamplingParams
from collm.core.sampling import sample, token_probs
from collm.core.types import TopLogprobs


class Logits(NamedTuple):
    """An author's next-token logits at one position, shape (V,) each; the same tensor where nothing processes them.

    Attributes:
        raw: as the author gave them; log-probabilities are reported of these.
        processed: after what the request does to them; tokens are drawn from these.
    """

    raw: Tensor
    processed: Tensor


@dataclass(frozen=True)
class Draw:
    """What an author writes at one position, and its log-probability in nats, of its raw logits.

    `top` are the author's most probable tokens there, where the request asks for them.
    """

    token_id: int
    logprob: float
    top: TopLogprobs = ()

    @property
    def broken(self) -> bool:
        """The logits held NaN, or nothing finite."""
        return math.isnan(self.logprob)


def greedy_draws(logits: Tensor, *others: Tensor, raw: Tensor | None = None) -> tuple[list[Draw], list[list[float]]]:
    """The argmax of each row, and further numbers for it, fetched together.

    Args:
        logits: shape (R, V), fp32.
        *others: shape (R, n) each.
        raw: what log-probabilities are taken of, shape (R, V); None for the logits themselves.

    Returns:
        R draws, and for each the numbers of `others` in one list.
    """
    token_ids = logits.argmax(-1, keepdim=True)
    raw = logits if raw is None else raw
    logprobs = raw.gather(-1, token_ids) - raw.logsumexp(-1, keepdim=True)
    columns = [token_ids.double(), logprobs.double(), *(other.double() for other in others)]
    rows = torch.cat(columns, dim=-1).tolist()
    return [Draw(int(token_id), logprob) for token_id, logprob, *_ in rows], [row[2:] for row in rows]


def sampled_draw(logits: Logits, params: SamplingParams, uniform: float) -> Draw:
    """A token from processed logits, by inverting the cumulative distribution at `uniform`."""
    probs = token_probs(logits.processed, params.temperature, params.top_p, params.top_k, params.min_p)
    token_id = sample(probs, probs.new_tensor(uniform, dtype=torch.float64))
    return Draw(int(token_id), float(logits.raw[token_id] - logits.raw.logsumexp(-1)))


def top_logprobs(logits: Tensor, most: int) -> TopLogprobs:
    """The most probable tokens of raw logits (V,); none that is ruled out (-inf)."""
    values, token_ids = logits.topk(min(most, logits.shape[-1]))
    logprobs = (values - logits.logsumexp(-1)).tolist()
    return tuple(
        (one, logprob) for one, logprob in zip(token_ids.tolist(), logprobs, strict=True) if logprob > -math.inf
    )
