"""The words of the project as types: one step, one completion, what an author did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

from collm.errors import ConfigError

BASE = 0
"""Author number of the base; assistants are 1..K."""

TopLogprobs = tuple[tuple[int, float], ...]
"""Token ids with their log-probabilities in nats, the most probable first."""

FinishReason = Literal["eos", "stop", "length"]


def check_threshold(threshold: float) -> float:
    """Return `threshold` if it is one: in [-1, 1]; 1 is the base alone, below 0 the assistants alone.

    Raises:
        ConfigError: it is not a number in that range.
    """
    if not -1 <= threshold <= 1:  # also false for NaN
        raise ConfigError(
            f"threshold is {threshold}, expected a number from -1 to 1 "
            "(1: the base alone; below 0: the assistants alone)"
        )
    return float(threshold)


@dataclass(frozen=True)
class TokenStep:
    """One generated token.

    Attributes:
        token_id: the token.
        text: the text that became certain with it; empty while a character or a stop string is incomplete.
        author: 0 for the base, 1..K for the assistants.
        defer_prob: 1 - P(author = base) where the token was decided.
        logprob: log-probability in nats of the token under its author, before temperature and truncation.
        top_logprobs: the author's most probable tokens there, likewise; as many as were asked for.
        stood_in: the base wrote it because the server of an assistant could not be asked.
    """

    token_id: int
    text: str
    author: int
    defer_prob: float
    logprob: float
    top_logprobs: TopLogprobs = ()
    stood_in: bool = False


@dataclass(frozen=True)
class PromptLogprob:
    """A token of the prompt.

    Attributes:
        token_id: the token.
        logprob: its log-probability in nats, given the tokens before it.
        rank: how many tokens are at least as probable, itself among them.
        top: the most probable tokens there, with theirs.
    """

    token_id: int
    logprob: float
    rank: int
    top: TopLogprobs


@dataclass
class Completion:
    """Everything generated for one prompt; the lists have one entry per token, as in `TokenStep`.

    Attributes:
        stood_in: places of the tokens that the base wrote in the stead of an assistant that could not be asked.
        prompt_logprobs: of the prompt's tokens, None for the first; empty where they were not asked for.
    """

    token_ids: list[int]
    token_texts: list[str] = field(repr=False)
    authors: list[int]
    defer_probs: list[float]
    logprobs: list[float]
    finish_reason: FinishReason
    prompt_token_ids: list[int] = field(repr=False)
    top_logprobs: list[TopLogprobs] = field(default_factory=list, repr=False)
    stood_in: list[int] = field(default_factory=list, repr=False)
    prompt_logprobs: list[PromptLogprob | None] = field(default_factory=list, repr=False)

    @property
    def text(self) -> str:
        """What follows the prompt."""
        return "".join(self.token_texts)

    @property
    def deferral_rate(self) -> float:
        """Share of the generated tokens that assistants wrote."""
        return deferral_rate(self.authors)


def deferral_rate(authors: Sequence[int]) -> float:
    """Share of `authors` that are assistants; 0 for an empty list."""
    return sum(author != BASE for author in authors) / len(authors) if authors else 0.0


@dataclass
class ModelUsage:
    """What one author did.

    Attributes:
        forward_passes: of a model; a program has none.
        tokens_read: by those.
        tokens_written: tokens of the text that are its.
        calls: tokens that a program was asked for; requests to a server.
        abstained: of those, where it had nothing to say.
        failed: of those, where it raised, hung or returned no text; tokens that a server could not be asked for.
    """

    forward_passes: int = 0
    tokens_read: int = 0
    tokens_written: int = 0
    calls: int = 0
    abstained: int = 0
    failed: int = 0

    def __sub__(self, earlier: ModelUsage) -> ModelUsage:
        """What was done since `earlier`."""
        return ModelUsage(*(getattr(self, one.name) - getattr(earlier, one.name) for one in fields(self)))
