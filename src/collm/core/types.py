"""The words of the project as types: sampling parameters, one step, one completion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

from collm.errors import ConfigError

BASE = 0
"""Author number of the base; assistants are 1..K."""

MAX_TOP_LOGPROBS = 20

TopLogprobs = tuple[tuple[int, float], ...]
"""Token ids with their log-probabilities in nats, the most probable first."""

FinishReason = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are drawn once their author is known.

    Attributes:
        max_new_tokens: most tokens to generate, at least 1.
        temperature: divides the logits; 0 is greedy (the author's argmax).
        top_p: keep the smallest set of tokens whose probability reaches this share, in (0, 1].
        top_k: keep the k most probable tokens; 0 keeps all.
        seed: makes the draws of this request reproducible, whatever else is in the batch.
        stop: strings that end the text; the text is cut before them.
        top_logprobs: report so many of the author's most probable tokens at every position, 0 to 20.

    Raises:
        ConfigError: a value out of range, or one that has no effect at temperature 0.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        _require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        _require(
            math.isfinite(self.temperature) and self.temperature >= 0,
            "temperature",
            self.temperature,
            "a number >= 0 (0 is greedy)",
        )
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        _require(self.top_k >= 0, "top_k", self.top_k, "at least 0 (0 keeps all tokens)")
        _require(0 <= self.top_logprobs <= MAX_TOP_LOGPROBS, "top_logprobs", self.top_logprobs, "0 to 20")
        _require(all(self.stop), "stop", self.stop, "non-empty strings")
        if self.temperature == 0 and (self.top_p != 1 or self.top_k != 0):
            raise ConfigError(
                f"top_p={self.top_p} and top_k={self.top_k} have no effect at temperature 0; "
                "set a temperature above 0 or leave them out"
            )


def _require(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise ConfigError(f"{name} is {value!r}, expected {expected}")


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


@dataclass
class Completion:
    """Everything generated for one prompt; the lists have one entry per token, as in `TokenStep`.

    Attributes:
        stood_in: places of the tokens that the base wrote in the stead of an assistant that could not be asked.
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
