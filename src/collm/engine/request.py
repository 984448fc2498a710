"""Requests to the decoding loop, and checks of their prompts and parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from collm.core.params import SamplingParams
from collm.core.policies import Policy, SingleAuthorPolicy
from collm.errors import ConfigError, RequestError
from collm.models.assistant import Assistant, Limited
from collm.text.alignment import Alignment


@dataclass(frozen=True)
class Request:
    """One prompt to continue.

    Attributes:
        assistant_prompts: the prompt in each assistant's tokens; empty if all authors share a tokenizer.

    Raises:
        ConfigError: a seed is set although nothing is random.
    """

    prompt_ids: list[int]
    params: SamplingParams
    policy: Policy
    assistant_prompts: Sequence[list[int]] = ()

    def __post_init__(self) -> None:
        if self.params.seed is not None and self.params.temperature == 0 and not self.policy.draws:
            raise ConfigError(
                f"seed={self.params.seed} has no effect because nothing is random at temperature 0; "
                "set a temperature above 0 or leave the seed out"
            )


def check_request(request: Request, authors: Sequence[Assistant], vocab_size: int, alignment: Alignment | None) -> None:
    """Check that the authors can decode a request.

    Args:
        vocab_size: the size of the base's vocabulary.
        alignment: alignment of authors with different tokenizers.

    Raises:
        RequestError: a prompt is empty, holds unknown token ids or leaves no room in a model's context or cache; or the
            parameters name unknown tokens.
        ConfigError: the policy names an author that does not exist.
    """
    prompts = [(authors, vocab_size, request.prompt_ids)]
    if alignment is not None:
        by_author = zip(authors, alignment.tokenizers, [request.prompt_ids, *request.assistant_prompts], strict=True)
        prompts = [([author], tokenizer.vocab_size, prompt_ids) for author, tokenizer, prompt_ids in by_author]
    for readers, size, prompt_ids in prompts:
        check_prompt(readers, size, prompt_ids)
        check_cache(readers, prompt_ids)
    check_params(request.params, vocab_size)
    policy = request.policy
    named = [policy.writer] if isinstance(policy, SingleAuthorPolicy) else policy.consults(len(authors) - 1)
    unknown = [author for author in named if not 0 <= author < len(authors)]
    if unknown:
        raise ConfigError(f"{policy} asks for author {unknown[0]}, expected 0 to {len(authors) - 1}")


class PromptIds(NamedTuple):
    """A prompt in the base's tokens, and in each assistant's if tokenizers differ."""

    base: list[int]
    assistants: list[list[int]]


def check_params(params: SamplingParams, vocab_size: int) -> None:
    """Raise a RequestError if the parameters hold token ids outside the vocabulary."""
    for name in ("logit_bias", "allowed_token_ids", "stop_token_ids"):
        token_ids = getattr(params, name) or (0,)
        if min(token_ids) < 0 or max(token_ids) >= vocab_size:
            outside = min(token for token in token_ids if not 0 <= token < vocab_size)
            raise RequestError(f"{name} has token id {outside}, outside the vocabulary of {vocab_size} tokens")


def check_names_author(policy: Policy, num_assistants: int) -> None:
    """Raise a ConfigError if the policy needs a vocabulary that all authors share."""
    if policy.consults(num_assistants) or policy.judge is not None:
        raise ConfigError(
            f"{policy} compares tokens of several authors, but these have different tokenizers; "
            "use the threshold rule or another policy that chooses an author"
        )


def check_segment_params(params: SamplingParams) -> None:
    """Raise a ConfigError if a parameter needs a vocabulary that all authors share."""
    given = [name for name in ("logit_bias", "allowed_token_ids", "structured_outputs") if getattr(params, name)]
    if given:
        raise ConfigError(f"{given[0]} needs one vocabulary, but the models have different tokenizers; leave it out")


def check_prompt(authors: Sequence[Limited], vocab_size: int, prompt_ids: Sequence[int], room: int = 1) -> None:
    """Check that all authors can read a prompt and write `room` tokens after it.

    Raises:
        RequestError: the prompt is empty, holds unknown token ids or leaves no room in an author's context.
    """
    if not prompt_ids:
        raise RequestError("the prompt is empty; expected at least one token")
    outside = [token for token in prompt_ids if not 0 <= token < vocab_size]
    if outside:
        raise RequestError(f"token id {outside[0]} is outside the vocabulary of {vocab_size} tokens")
    for author in authors:
        if author.max_length is not None and len(prompt_ids) + room > author.max_length:
            raise RequestError(
                f"the prompt has {len(prompt_ids)} tokens, but the context of {author.name} is {author.max_length} "
                "tokens including its output; shorten the prompt"
            )


def check_cache(authors: Sequence[Assistant], prompt_ids: Sequence[int]) -> None:
    """Raise a RequestError if a prompt does not fit an author's KV cache even without other requests."""
    for author in authors:
        if author.capacity is not None and len(prompt_ids) >= author.capacity:
            raise RequestError(
                f"the prompt has {len(prompt_ids):,} tokens, but the KV cache of {author.name} holds "
                f"{author.capacity:,} tokens including the output; shorten the prompt or raise cache_memory"
            )
