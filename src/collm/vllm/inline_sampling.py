"""Sampling of both authors' tokens with vLLM's sampler. Each request uses its own parameters and generator.

vLLM keeps the sampling state of a batch by row, and requests change their rows. Here the sampler receives only the
requests that get a token, from either author. So a request with a seed draws once for each token, independently of the
batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata

from collm.engine.decision import Draw
from collm.vllm import AUTHORS
from collm.vllm.drafting import Drafted

_GREEDY_BELOW = 1e-5
"""vLLM samples greedily at temperatures below this one."""


def wants_authors(one: Drafted) -> bool:
    """Whether the log-probabilities of a request describe the author of each token."""
    return bool((one.state.sampling_params.extra_args or {}).get(AUTHORS))


def sample(sampler: Any, logits: Tensor, requests: Sequence[Drafted], drafted: Sequence[Sequence[int]]) -> list[Draw]:
    """Draw a token for each request.

    Args:
        sampler: vLLM's `v1.sample.sampler.Sampler`.
        logits: shape (R, V), for R requests.
        drafted: tokens of each request that vLLM's state does not have yet.
    """
    params = [one.state.sampling_params for one in requests]
    texts = [[*one.state.output_token_ids, *new] for one, new in zip(requests, drafted, strict=True)]
    processed = logits.to(torch.float32, copy=True)
    for row, (one, text) in enumerate(zip(params, texts, strict=True)):
        if len(text) < one.min_tokens:
            processed[row, list(one.all_stop_token_ids)] = -math.inf
    chosen = sampler(processed, _metadata(processed, requests, params, texts)).sampled_token_ids.flatten()
    drawn = [Draw(token_id, 0.0) for token_id in chosen.tolist()]
    most = {row: one.num_logprobs for row, one in enumerate(params) if one.num_logprobs is not None}
    if most:
        rows = list(most)
        logprobs = logits[rows].log_softmax(-1, dtype=torch.float32)
        own = logprobs.gather(-1, chosen[rows, None].long()).flatten().tolist()
        values, ids = (part.tolist() for part in logprobs.topk(max(most.values()), dim=-1))
        for i, row in enumerate(rows):
            count = max(most[row] - wants_authors(requests[row]), 0)  # one of them describes the author
            drawn[row] = Draw(drawn[row].token_id, own[i], tuple(zip(ids[i], values[i], strict=True))[:count])
    return drawn


def _metadata(
    logits: Tensor, requests: Sequence[Drafted], params: Sequence[Any], texts: list[list[int]]
) -> SamplingMetadata:
    """The sampler's metadata for these requests, in order."""
    vocab_size, device = logits.shape[1], logits.device
    greedy = [one.temperature < _GREEDY_BELOW for one in params]
    penalised = any(one.presence_penalty or one.frequency_penalty or one.repetition_penalty != 1.0 for one in params)
    prompts = None
    if penalised:
        given = [torch.tensor(one.state.prompt_token_ids) for one in requests]
        prompts = torch.nn.utils.rnn.pad_sequence(given, batch_first=True, padding_value=vocab_size).to(device)

    def column(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    top_k = [one.top_k if 0 < one.top_k < vocab_size else vocab_size for one in params]
    return SamplingMetadata(
        temperature=None if all(greedy) else column([one.temperature for one in params]),
        all_greedy=all(greedy),
        all_random=not any(greedy),
        top_p=column([one.top_p for one in params]) if any(one.top_p < 1 for one in params) else None,
        top_k=column(top_k, torch.int32) if min(top_k) < vocab_size else None,
        generators={row: one.generator for row, one in enumerate(requests) if one.generator is not None},
        max_num_logprobs=None,
        no_penalties=not penalised,
        prompt_token_ids=prompts,
        frequency_penalties=column([one.frequency_penalty for one in params]),
        presence_penalties=column([one.presence_penalty for one in params]),
        repetition_penalties=column([one.repetition_penalty for one in params]),
        output_token_ids=texts,
        allowed_token_ids_mask=_disallowed(params, logits),
        bad_words_token_ids={row: one.bad_words_token_ids for row, one in enumerate(params) if one.bad_words_token_ids},
        logitsprocs=LogitsProcessors(),
    )


def _disallowed(params: Sequence[Any], logits: Tensor) -> Tensor | None:
    """Mask of the tokens that requests exclude, shape (R, V); None if no request excludes any."""
    if not any(one.allowed_token_ids for one in params):
        return None
    mask = torch.ones_like(logits, dtype=torch.bool)
    for row, one in enumerate(params):
        mask[row, one.allowed_token_ids or slice(None)] = False
    return mask
