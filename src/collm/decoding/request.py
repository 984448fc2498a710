"""A request: a prompt, how its tokens are drawn, and who writes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from collm.core.params import SamplingParams
from collm.core.policies import Policy
from collm.errors import ConfigError, RequestError
from collm.models.runner import Assistant, Limited


@dataclass(frozen=True)
class Request:
    """One prompt to continue.

    Attributes:
        assistant_prompts: the prompt in the tokens of each assistant; empty where all read the same tokens.

    Raises:
        ConfigError: a seed where nothing is drawn.
    """

    prompt_ids: list[int]
    params: SamplingParams
    policy: Policy
    assistant_prompts: Sequence[list[int]] = ()

    def __post_init__(self) -> None:
        if self.params.seed is not None and self.params.temperature == 0 and not self.policy.draws:
            raise ConfigError(
                f"seed={self.params.seed} has no effect: at temperature 0 nothing is drawn; "
                "set a temperature above 0 or leave the seed out"
            )


class PromptIds(NamedTuple):
    """A prompt in the tokens of the base, and in those of each assistant where they have others."""

    base: list[int]
    assistants: list[list[int]]


def check_params(params: SamplingParams, vocab_size: int) -> None:
    """Raise a RequestError for token ids in the parameters that are none."""
    for name in ("logit_bias", "allowed_token_ids", "stop_token_ids"):
        outside = sorted(token for token in getattr(params, name) or () if not 0 <= token < vocab_size)
        if outside:
            raise RequestError(f"{name} has token id {outside[0]}, outside the vocabulary of {vocab_size} tokens")


def check_names_author(policy: Policy, num_assistants: int) -> None:
    """Raise a ConfigError for a policy that models with different tokenizers cannot follow."""
    if policy.consults(num_assistants):
        raise ConfigError(
            f"{policy} compares the tokens of several authors, which needs one vocabulary, and these have different "
            "tokenizers; use the threshold rule, or another policy that names an author"
        )


def check_segment_params(params: SamplingParams) -> None:
    """Raise a ConfigError for parameters that models with different tokenizers cannot follow."""
    given = [name for name in ("logit_bias", "allowed_token_ids", "structured_outputs") if getattr(params, name)]
    if given:
        raise ConfigError(
            f"{given[0]} is about the tokens of one vocabulary, and the models have different tokenizers; leave it out"
        )


def check_prompt(authors: Sequence[Limited], vocab_size: int, prompt_ids: Sequence[int], room: int = 1) -> None:
    """Whether all authors can read a prompt and write so many tokens after it.

    Raises:
        RequestError: it is empty, holds unknown token ids or leaves no room in an author's context.
    """
    if not prompt_ids:
        raise RequestError("the prompt is empty; expected at least one token")
    outside = [token for token in prompt_ids if not 0 <= token < vocab_size]
    if outside:
        raise RequestError(f"token id {outside[0]} is outside the vocabulary of {vocab_size} tokens")
    for author in authors:
        if author.max_length is not None and len(prompt_ids) + room > author.max_length:
            raise RequestError(
                f"the prompt has {len(prompt_ids)} tokens, but {author.name} reads at most {author.max_length} "
                "including what it writes; shorten the prompt"
            )


def check_cache(authors: Sequence[Assistant], prompt_ids: Sequence[int]) -> None:
    """Raise a RequestError for a prompt that leaves no room in an author's cache, were it alone there."""
    for author in authors:
        if author.capacity is not None and len(prompt_ids) >= author.capacity:
            raise RequestError(
                f"the prompt has {len(prompt_ids):,} tokens, but the key-value cache of {author.name} holds "
                f"{author.capacity:,} including what is written; shorten the prompt or raise cache_memory"
            )
