"""Sampling of both authors' tokens with vLLM's sampler. Each request uses its own parameters and generator.

vLLM keeps the sampling state of a batch by row, and requests change their rows. Here the sampler receives only the
requests that get a token, from either author. So a request with a seed draws once for each token, independently of the
batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata

from collm.engine.sequence import Draw

_GREEDY_BELOW = 1e-5
"""vLLM samples greedily at temperatures below this one."""


@dataclass(frozen=True)
class SamplingRequest:
    """A request that gets a token.

    Attributes:
        state: vLLM's state of the request.
        output_ids: tokens generated so far, including drafts.
        generator: random generator of a request with a seed; else None.
        top: number of most probable tokens to report; None if no log-probabilities are requested.
    """

    state: Any
    output_ids: Sequence[int]
    generator: torch.Generator | None
    top: int | None

    @property
    def params(self) -> Any:
        return self.state.sampling_params


def sample(sampler: Any, logits: Tensor, requests: Sequence[SamplingRequest]) -> list[Draw]:
    """Draw a token for each request.

    Args:
        sampler: vLLM's `v1.sample.sampler.Sampler`.
        logits: shape (R, V).
        requests: the R requests.
    """
    with_logprobs = [row for row, one in enumerate(requests) if one.top is not None]
    logprobs = logits[with_logprobs].log_softmax(-1, dtype=torch.float32) if with_logprobs else None
    processed = logits.to(torch.float32, copy=True)
    for row, one in enumerate(requests):
        if len(one.output_ids) < one.params.min_tokens:
            processed[row, list(one.params.all_stop_token_ids)] = -math.inf
    chosen = sampler(processed, _metadata(processed, requests)).sampled_token_ids.flatten()
    drawn = [Draw(token_id, 0.0) for token_id in chosen.tolist()]
    if logprobs is not None:
        token_logprobs = logprobs.gather(-1, chosen[with_logprobs, None].long()).flatten().tolist()
        values, ids = (part.tolist() for part in logprobs.topk(max(one.top or 0 for one in requests), dim=-1))
        for i, row in enumerate(with_logprobs):
            top = tuple(zip(ids[i], values[i], strict=True))[: requests[row].top]
            drawn[row] = Draw(drawn[row].token_id, token_logprobs[i], top)
    return drawn


def _metadata(logits: Tensor, requests: Sequence[SamplingRequest]) -> SamplingMetadata:
    """The sampler's metadata for these requests, in order."""
    params, device = [one.params for one in requests], logits.device
    greedy = [one.temperature < _GREEDY_BELOW for one in params]
    penalised = any(one.presence_penalty or one.frequency_penalty or one.repetition_penalty != 1.0 for one in params)

    def column(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor([getattr(one, name) for one in params], dtype=dtype, device=device)

    top_k = [one.top_k if 0 < one.top_k < logits.shape[1] else logits.shape[1] for one in params]
    return SamplingMetadata(
        temperature=None if all(greedy) else column("temperature"),
        all_greedy=all(greedy),
        all_random=not any(greedy),
        top_p=column("top_p") if any(one.top_p < 1 for one in params) else None,
        top_k=torch.tensor(top_k, dtype=torch.int32, device=device) if min(top_k) < logits.shape[1] else None,
        generators={row: one.generator for row, one in enumerate(requests) if one.generator is not None},
        max_num_logprobs=None,
        no_penalties=not penalised,
        prompt_token_ids=_prompts(requests, logits.shape[1]).to(device) if penalised else None,
        frequency_penalties=column("frequency_penalty"),
        presence_penalties=column("presence_penalty"),
        repetition_penalties=column("repetition_penalty"),
        output_token_ids=[list(one.output_ids) for one in requests],
        allowed_token_ids_mask=_disallowed(params, logits),
        bad_words_token_ids={row: one.bad_words_token_ids for row, one in enumerate(params) if one.bad_words_token_ids},
        logitsprocs=LogitsProcessors(),
    )


def _prompts(requests: Sequence[SamplingRequest], vocab_size: int) -> Tensor:
    """Prompts, padded with an id outside the vocabulary, shape (R, P)."""
    prompts = [torch.tensor(one.state.prompt_token_ids) for one in requests]
    return torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=vocab_size)


def _disallowed(params: Sequence[Any], logits: Tensor) -> Tensor | None:
    """Mask of the tokens that requests exclude, shape (R, V); None if no request excludes any."""
    if not any(one.allowed_token_ids for one in params):
        return None
    mask = torch.zeros_like(logits, dtype=torch.bool)
    for row, one in enumerate(params):
        if one.allowed_token_ids:
            mask[row] = True
            mask[row, one.allowed_token_ids] = False
    return mask
