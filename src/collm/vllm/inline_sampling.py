"""Tokens of both authors drawn by vLLM's own sampler, each request by its own parameters and generator.

vLLM's state of a batch goes by rows, and rows move. Here the sampler is given the requests that get a token, whoever
writes it, so a request with a seed draws once for each token, whatever else is in the batch.
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

from collm.decoding.draws import Draw

_GREEDY_BELOW = 1e-5
"""Temperatures that vLLM takes for 0."""


@dataclass(frozen=True)
class Asking:
    """A request that gets a token.

    Attributes:
        state: vLLM's.
        output_ids: what it has been given so far, drafts included.
        generator: of a request with a seed.
        top: most probable tokens that are wanted; None if not even the log-probability of the token is.
    """

    state: Any
    output_ids: Sequence[int]
    generator: torch.Generator | None
    top: int | None

    @property
    def params(self) -> Any:
        return self.state.sampling_params


def sample(sampler: Any, logits: Tensor, asking: Sequence[Asking]) -> list[Draw]:
    """A token for each request.

    Args:
        sampler: vLLM's `v1.sample.sampler.Sampler`.
        logits: shape (R, V).
    """
    wanting = [row for row, one in enumerate(asking) if one.top is not None]
    logprobs = logits[wanting].log_softmax(-1, dtype=torch.float32) if wanting else None
    processed = logits.to(torch.float32, copy=True)
    for row, one in enumerate(asking):
        if len(one.output_ids) < one.params.min_tokens:
            processed[row, list(one.params.all_stop_token_ids)] = -math.inf
    chosen = sampler(processed, _metadata(processed, asking)).sampled_token_ids.flatten()
    drawn = [Draw(token_id, 0.0) for token_id in chosen.tolist()]
    if logprobs is not None:
        of_tokens = logprobs.gather(-1, chosen[wanting, None].long()).flatten().tolist()
        values, ids = (part.tolist() for part in logprobs.topk(max(one.top or 0 for one in asking), dim=-1))
        for place, row in enumerate(wanting):
            top = tuple(zip(ids[place], values[place], strict=True))[: asking[row].top]
            drawn[row] = Draw(drawn[row].token_id, of_tokens[place], top)
    return drawn


def _metadata(logits: Tensor, asking: Sequence[Asking]) -> SamplingMetadata:
    """What the sampler is to know of these requests, row by row."""
    params, device = [one.params for one in asking], logits.device
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
        generators={row: one.generator for row, one in enumerate(asking) if one.generator is not None},
        max_num_logprobs=None,
        no_penalties=not penalised,
        prompt_token_ids=_prompts(asking, logits.shape[1]).to(device) if penalised else None,
        frequency_penalties=column("frequency_penalty"),
        presence_penalties=column("presence_penalty"),
        repetition_penalties=column("repetition_penalty"),
        output_token_ids=[list(one.output_ids) for one in asking],
        allowed_token_ids_mask=_disallowed(params, logits),
        bad_words_token_ids={row: one.bad_words_token_ids for row, one in enumerate(params) if one.bad_words_token_ids},
        logitsprocs=LogitsProcessors(),
    )


def _prompts(asking: Sequence[Asking], vocab_size: int) -> Tensor:
    """Prompts, padded with an id that is no token, (R, P)."""
    prompts = [torch.tensor(one.state.prompt_token_ids) for one in asking]
    return torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=vocab_size)


def _disallowed(params: Sequence[Any], logits: Tensor) -> Tensor | None:
    """Tokens that requests rule out, (R, V); None if none does."""
    if not any(one.allowed_token_ids for one in params):
        return None
    mask = torch.zeros_like(logits, dtype=torch.bool)
    for row, one in enumerate(params):
        if one.allowed_token_ids:
            mask[row] = True
            mask[row, one.allowed_token_ids] = False
    return mask
