"""Drawing tokens from logits with a single transfer to the host."""

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
    """An author's next-token logits at one position, shape (V,) each. Both are one tensor if nothing is processed.

    Attributes:
        raw: the author's logits, from which log-probabilities are reported.
        processed: logits after the request's logits processors, from which tokens are drawn.
    """

    raw: Tensor
    processed: Tensor


@dataclass(frozen=True)
class Draw:
    """The token that an author writes at one position.

    Attributes:
        logprob: its log-probability in nats under the author's raw logits.
        top: the author's most probable tokens, as many as the request asks for.
    """

    token_id: int
    logprob: float
    top: TopLogprobs = ()

    @property
    def invalid(self) -> bool:
        """Whether the logits held NaN or no finite number."""
        return math.isnan(self.logprob)


class Sampling(NamedTuple):
    """Sampling settings of one position: the request's parameters and the position's random number from [0, 1)."""

    params: SamplingParams
    uniform: float = 0.0


def draw_tokens(
    logits: Tensor, samplings: Sequence[Sampling], *others: Tensor, raw: Tensor | None = None
) -> tuple[list[Draw], list[list[float]]]:
    """Draw a token from each row of logits, and transfer tokens and other numbers to the host together.

    Args:
        logits: shape (R, V), fp32.
        samplings: sampling settings of each row.
        *others: numbers to transfer along, shape (R, n) each.
        raw: logits from which log-probabilities are computed, shape (R, V); defaults to `logits`.

    Returns:
        R draws, and the numbers of `others` as one list per row.
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
        top = tuple((int(top_id), value) for top_id, value in pairs if value > -math.inf)
        draws.append(Draw(int(token_id), logprob, top))
    return draws, [row[2 : 2 + width] for row in numbers]


def _sampled(samplings: Sequence[Sampling]) -> dict[tuple[float, float, int, float], list[int]]:
    """Group the rows that are not greedy by the sampling arguments of `token_probs`."""
    rows: dict[tuple[float, float, int, float], list[int]] = {}
    for row, (params, _) in enumerate(samplings):
        if params.temperature:
            rows.setdefault((params.temperature, params.top_p, params.top_k, params.min_p), []).append(row)
    return rows
