"""How the tokens of a request are drawn: sampling parameters, with vLLM's names and meanings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from collm.errors import ConfigError

MAX_LOGPROBS = 20
"""Most tokens whose log-probabilities are reported for one position."""


@dataclass(frozen=True)
class StructuredOutputs:
    """What the text must be; exactly one of these.

    Attributes:
        json: a JSON schema, as an object or as its text; the answer is JSON that satisfies it.
        json_object: the answer is any JSON object.
        regex: a regular expression that matches the whole answer (Rust's syntax, without look-around).
        choice: texts of which the answer is one.
        grammar: a context-free grammar in llguidance's Lark syntax, or in GBNF ("root ::= ...").

    Raises:
        ConfigError: none of them came, or several.
    """

    json: str | Mapping[str, Any] | bool | None = None
    json_object: bool = False
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        given = [one.name for one in fields(self) if getattr(self, one.name) not in (None, False)]
        given += ["json"] * (self.json is False)  # the schema that nothing satisfies
        if len(given) != 1:
            came = " and ".join(given) or "none"
            raise ConfigError(
                f"of json, json_object, regex, choice and grammar {came} came; give exactly one: a text has one form"
            )
        if self.choice is not None:
            texts = not isinstance(self.choice, str) and all(isinstance(one, str) and one for one in self.choice)
            _require(texts and len(self.choice) > 0, "choice", self.choice, "a list of non-empty texts")


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are drawn once their author is known.

    Names and meanings are vLLM's, but for `max_new_tokens`. Penalties, biases and constraints change the logits of
    every author alike, before anything is made of them; what they count is the whole text, whoever wrote it. A tool
    whose next token they forbid abstains. Reported log-probabilities are those before all this.

    Attributes:
        max_new_tokens: most tokens to generate, at least 1.
        temperature: divides the logits; 0 is greedy (the author's argmax). Default: 1 where top_p, top_k or min_p ask
            for sampling, else 0.
        top_p: keep the smallest set of tokens whose probability reaches this share, in (0, 1].
        top_k: keep the k most probable tokens; 0 keeps all.
        seed: makes the draws of this request reproducible, whatever else is in the batch.
        stop: strings that end the text; the text is cut before them.
        min_p: keep tokens that are at least this probable, relative to the most probable one, in [0, 1].
        presence_penalty: subtracted from the logits of tokens that were generated, -2 to 2.
        frequency_penalty: subtracted from a token's logit for each time it was generated, -2 to 2.
        repetition_penalty: divides positive logits of tokens in the prompt or the generated text and multiplies
            negative ones, above 0; 1 changes nothing (arXiv 1909.05858).
        logit_bias: token id -> what is added to its logit.
        allowed_token_ids: the only tokens that may be generated; None for all.
        bad_words: texts whose last token is not generated where the tokens before it stand.
        min_tokens: no EOS, stop token or stop string ends the text before so many tokens.
        stop_token_ids: further tokens that end the text.
        ignore_eos: go on after EOS.
        include_stop_str_in_output: keep the stop string or stop token in the text.
        structured_outputs: what the text must be.
        logprobs: report so many of the author's most probable tokens at every position, 0 to 20.
        prompt_logprobs: report log-probabilities of the prompt's tokens under the collaboration, and so many of the
            most probable tokens there, 0 to 20; None for none.

    Raises:
        ConfigError: a value out of range, or one that has no effect at temperature 0.
    """

    max_new_tokens: int = 256
    temperature: float = None  # type: ignore[assignment]  # a number once made
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] = ()
    min_tokens: int = 0
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    structured_outputs: StructuredOutputs | None = None
    logprobs: int = 0
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        for name in ("stop", "bad_words"):
            texts = getattr(self, name)
            object.__setattr__(self, name, (texts,) if isinstance(texts, str) else tuple(texts))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        if self.temperature is None:
            object.__setattr__(self, "temperature", 1.0 if self._truncates else 0.0)  # type: ignore[unreachable]
        self._check_lengths()
        self._check_sampling()
        self._check_logits()
        for name, most in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs or 0)):
            _require(0 <= most <= MAX_LOGPROBS, name, most, f"0 to {MAX_LOGPROBS}")

    @property
    def _truncates(self) -> bool:
        return self.top_p != 1 or self.top_k != 0 or self.min_p != 0

    def _check_lengths(self) -> None:
        _require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        _require(
            0 <= self.min_tokens <= self.max_new_tokens,
            "min_tokens",
            self.min_tokens,
            f"0 to {self.max_new_tokens}, the most tokens to generate",
        )
        _require(all(self.stop), "stop", self.stop, "non-empty strings")

    def _check_sampling(self) -> None:
        finite = math.isfinite(self.temperature) and self.temperature >= 0
        _require(finite, "temperature", self.temperature, "a number >= 0 (0 is greedy)")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        _require(self.top_k >= 0, "top_k", self.top_k, "at least 0 (0 keeps all tokens)")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "0 to 1")
        if self.temperature == 0 and self._truncates:
            given = {"top_p": self.top_p != 1, "top_k": self.top_k != 0, "min_p": self.min_p != 0}
            name = next(name for name, came in given.items() if came)
            raise ConfigError(
                f"{name}={getattr(self, name)} has no effect at temperature 0; leave it out, or raise the temperature"
            )

    def _check_logits(self) -> None:
        for name in ("presence_penalty", "frequency_penalty"):
            _require(-2 <= getattr(self, name) <= 2, name, getattr(self, name), "-2 to 2")
        repetition = self.repetition_penalty
        _require(0 < repetition < math.inf, "repetition_penalty", repetition, "a number above 0 (1 changes nothing)")
        _require(all(map(math.isfinite, self.logit_bias.values())), "logit_bias", self.logit_bias, "finite numbers")
        _require(self.allowed_token_ids is None or bool(self.allowed_token_ids), "allowed_token_ids", [], "some tokens")
        _require(all(self.bad_words), "bad_words", self.bad_words, "non-empty texts")

    @property
    def penalises(self) -> bool:
        """Whether tokens of the text count."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)

    @property
    def changes_logits(self) -> bool:
        """Whether anything is done to the logits before tokens are drawn from them."""
        constrained = self.bad_words or self.min_tokens or self.structured_outputs or self.allowed_token_ids
        return bool(self.penalises or self.logit_bias or constrained)


def _require(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise ConfigError(f"{name} is {value!r:.80}, expected {expected}")
