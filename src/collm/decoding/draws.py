"""From logits to the tokens that authors write, with as few transfers to the host as possible."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from collm.core.params import SamplingParams
from collm.core.sampling import sample, token_probs
from collm.core.transfers import to_device
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


class Sampling(NamedTuple):
    """How a token is drawn: the request's parameters, and a draw from [0, 1) that belongs to its position."""

    params: SamplingParams
    uniform: float = 0.0


def draw_tokens(
    logits: Tensor, samplings: Sequence[Sampling], *others: Tensor, raw: Tensor | None = None
) -> tuple[list[Draw], list[list[float]]]:
    """A token from each row of logits, and further numbers for it, all fetched together: one wait for the device.

    Sampled tokens invert the cumulative distribution at the row's uniform draw.

    Args:
        logits: shape (R, V), fp32.
        samplings: of each row.
        *others: shape (R, n) each.
        raw: what log-probabilities are taken of, shape (R, V); None for the logits themselves.

    Returns:
        R draws, and for each the numbers of `others` in one list.
    """
    raw = logits if raw is None else raw
    token_ids = logits.argmax(-1)
    for params, rows in _sampled(samplings).items():
        whole = len(rows) == len(samplings)
        at = slice(None) if whole else to_device(rows, logits.device)
        probs = token_probs(logits[at], *params)
        uniforms = to_device([samplings[row].uniform for row in rows], logits.device, torch.float64)
        token_ids[at] = sample(probs, uniforms)
    norms = raw.logsumexp(-1, keepdim=True)
    logprobs = raw.gather(-1, token_ids.unsqueeze(-1)) - norms
    columns = [token_ids.unsqueeze(-1), logprobs, *others]
    most = min(max(sampling.params.logprobs or 0 for sampling in samplings), raw.shape[-1])
    if most:
        values, indices = raw.topk(most)
        columns += [indices, values - norms]
    numbers = torch.cat([column.double() for column in columns], dim=-1).tolist()
    width = sum(other.shape[-1] for other in others)
    draws = []
    for row, (token_id, logprob, *rest) in enumerate(numbers):
        wanted = samplings[row].params.logprobs or 0
        pairs = zip(rest[width : width + wanted], rest[width + most :], strict=False)
        draws.append(
            Draw(int(token_id), logprob, tuple((int(one), value) for one, value in pairs if value > -math.inf))
        )
    return draws, [row[2 : 2 + width] for row in numbers]


def _sampled(samplings: Sequence[Sampling]) -> dict[tuple[float, float, int, float], list[int]]:
    """The rows whose token is not the argmax, by what `token_probs` wants to know."""
    rows: dict[tuple[float, float, int, float], list[int]] = {}
    for row, (params, _) in enumerate(samplings):
        if params.temperature:
            rows.setdefault((params.temperature, params.top_p, params.top_k, params.min_p), []).append(row)
    return rows
