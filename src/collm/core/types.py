"""Result types shared by all packages: generated tokens, completions and per-author usage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

from collm.errors import ConfigError

BASE = 0
"""Author number of the base model; assistants are 1..K."""

TopLogprobs = tuple[tuple[int, float], ...]
"""Pairs of token id and log-probability in nats, most probable first."""

FinishReason = Literal["eos", "stop", "length"]


def author_name(author: int) -> str:
    """The name of an author, everywhere: base, assistant, assistant-2, .."""
    if author == BASE:
        return "base"
    return "assistant" if author == 1 else f"assistant-{author}"


def check_threshold(threshold: float) -> float:
    """Return `threshold` as a float, or raise a ConfigError if it is outside [-1, 1]."""
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
        text: the text that this token completes; empty while a character or a possible stop string is incomplete.
        author: 0 for the base, 1..K for the assistants.
        defer_prob: 1 - P(author = base).
        logprob: log-probability of the token under its author, in nats, before temperature and truncation. For a
            segment of an assistant that of the segment, at its first token (docs/tokenizers.md).
        top_logprobs: the author's most probable tokens, as many as the request wants.
        stood_in: whether the base wrote the token because an assistant's server was unavailable.
        rejected: the token of the base that a judge replaced by this one, and its text; None if there is none.
    """

    token_id: int
    text: str
    author: int
    defer_prob: float
    logprob: float
    top_logprobs: TopLogprobs = ()
    stood_in: bool = False
    rejected: tuple[int, str] | None = None


@dataclass(frozen=True)
class PromptLogprob:
    """Log-probability of one prompt token in nats, given the tokens before it.

    Attributes:
        rank: 1-based rank by probability: the number of tokens that are at least as probable.
        top: the most probable tokens at this position.
    """

    token_id: int
    logprob: float
    rank: int
    top: TopLogprobs


@dataclass
class Completion:
    """Everything generated for one prompt. Lists have one entry per token, with the meaning it has in `TokenStep`.

    Attributes:
        stood_in: indices of the tokens that the base wrote because an assistant's server was unavailable.
        rejected: index of a token -> the token of the base that a judge replaced by it.
        prompt_logprobs: one entry per prompt token, None for the first; empty unless the request asked for them.
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
    rejected: dict[int, int] = field(default_factory=dict, repr=False)
    prompt_logprobs: list[PromptLogprob | None] = field(default_factory=list, repr=False)

    @property
    def text(self) -> str:
        """The generated text, without the prompt."""
        return "".join(self.token_texts)

    @property
    def deferral_rate(self) -> float:
        return deferral_rate(self.authors)


def deferral_rate(authors: Sequence[int]) -> float:
    """Share of `authors` that are assistants; 0 for an empty list."""
    return sum(author != BASE for author in authors) / len(authors) if authors else 0.0


@dataclass
class ModelUsage:
    """Work done by one author.

    Attributes:
        tokens_read: tokens processed in forward passes.
        tokens_written: generated tokens that are credited to this author.
        calls: calls of a tool (one per token), or requests to a server.
        abstained: calls in which the tool abstained.
        failed: calls in which the tool raised, hung or returned something other than text; for a server, tokens for
            which it was unavailable.
    """

    forward_passes: int = 0
    tokens_read: int = 0
    tokens_written: int = 0
    calls: int = 0
    abstained: int = 0
    failed: int = 0

    def __sub__(self, earlier: ModelUsage) -> ModelUsage:
        """The work done since `earlier`."""
        return ModelUsage(*(getattr(self, one.name) - getattr(earlier, one.name) for one in fields(self)))
