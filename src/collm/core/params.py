"""Sampling parameters of a request, with vLLM's names and meanings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from collm.errors import ConfigError

MAX_LOGPROBS = 20
"""Largest number of log-probabilities reported per position."""
_OFF = {"top_p": 1, "top_k": 0, "min_p": 0}
"""Values at which truncation of the distribution is off."""


@dataclass(frozen=True)
class StructuredOutputs:
    """A constraint on the generated text. Exactly one attribute must be set.

    Attributes:
        json: the text is JSON that satisfies this schema, an object or JSON text.
        json_object: the text is any JSON object.
        regex: the whole text matches this regular expression (Rust's syntax, without look-around).
        choice: the text is one of these.
        grammar: the text follows this context-free grammar in llguidance's Lark syntax, or in GBNF ("root ::= ...").

    Raises:
        ConfigError: no attribute is set, several are, or `choice` is not a list of non-empty texts.
    """

    # Metadata are for the command line (`cli.options`).
    json: str | Mapping[str, Any] | bool | None = field(default=None, metadata={"flag": "--json-schema", "file": True})
    json_object: bool = False
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = field(default=None, metadata={"file": True})

    def __post_init__(self) -> None:
        given = [one.name for one in fields(self) if getattr(self, one.name) not in (None, False)]
        given += ["json"] * (self.json is False)  # false is a valid schema, which nothing satisfies
        if len(given) != 1:
            got = " and ".join(given) or "none"
            raise ConfigError(f"expected exactly one of json, json_object, regex, choice and grammar, got {got}")
        if self.choice is not None:
            texts = not isinstance(self.choice, str) and all(isinstance(one, str) and one for one in self.choice)
            _require(texts and len(self.choice) > 0, "choice", self.choice, "a list of non-empty texts")


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of one request.

    Names and meanings are vLLM's. Penalties, biases and constraints apply to the logits
    of every author before anything else uses them, and penalties count the tokens of all authors. A tool abstains
    where its next token is forbidden. Reported log-probabilities are those of the unmodified logits.

    Attributes:
        max_tokens: largest number of tokens to generate, at least 1.
        temperature: divides the logits; 0 is greedy (the author's argmax). The default is 1 if top_p, top_k or min_p
            is set, else 0.
        top_p: keep the smallest set of tokens whose probability reaches this share, in (0, 1].
        top_k: keep the k most probable tokens; 0 keeps all.
        seed: makes this request reproducible, independently of the other requests in the batch.
        stop: strings that end the text; the text is cut before them.
        min_p: keep tokens whose probability is at least this share of the largest one, in [0, 1].
        presence_penalty: subtracted from the logits of tokens already generated, -2 to 2.
        frequency_penalty: subtracted from a token's logit once per earlier occurrence in the output, -2 to 2.
        repetition_penalty: divides positive logits of tokens in the prompt or the output and multiplies negative
            ones, above 0; 1 changes nothing (arXiv 1909.05858).
        logit_bias: token id -> number added to its logit.
        allowed_token_ids: the only tokens that may be generated; None allows all.
        bad_words: texts that must not be generated; the last token of such a text is forbidden after the others.
        min_tokens: number of tokens before which no EOS, stop token or stop string ends the text.
        stop_token_ids: tokens besides EOS that end the text.
        ignore_eos: continue after EOS.
        include_stop_str_in_output: keep the stop string or stop token in the text.
        structured_outputs: a constraint on the text, such as a JSON schema.
        logprobs: number of the author's most probable tokens to report per position, 0 to 20.
        prompt_logprobs: number of most probable tokens to report per prompt token, 0 to 20, with the log-probability
            of the prompt token under the collaboration; None reports nothing.

    Raises:
        ConfigError: a value is out of range, or has no effect at temperature 0.
    """

    max_tokens: int = 256
    temperature: float = None  # type: ignore[assignment]  # __post_init__ replaces None
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, metadata={"metavar": "ID=BIAS"})
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
        for name in ("stop_token_ids", "allowed_token_ids"):
            token_ids = getattr(self, name)
            object.__setattr__(self, name, None if token_ids is None else tuple(dict.fromkeys(token_ids)))
        truncating = [name for name, off in _OFF.items() if getattr(self, name) != off]
        if self.temperature is None:
            object.__setattr__(self, "temperature", 1.0 if truncating else 0.0)  # type: ignore[unreachable]
        checks = {
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "min_tokens": (0 <= self.min_tokens <= self.max_tokens, f"0 to {self.max_tokens} (max_tokens)"),
            "stop": (all(self.stop), "non-empty strings"),
            "temperature": (0 <= self.temperature < math.inf, "a number >= 0 (0 is greedy)"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "top_k": (self.top_k >= 0, "at least 0 (0 keeps all tokens)"),
            "min_p": (0 <= self.min_p <= 1, "0 to 1"),
            "presence_penalty": (-2 <= self.presence_penalty <= 2, "-2 to 2"),
            "frequency_penalty": (-2 <= self.frequency_penalty <= 2, "-2 to 2"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "a number above 0 (1 changes nothing)"),
            "logit_bias": (all(map(math.isfinite, self.logit_bias.values())), "finite numbers"),
            "allowed_token_ids": (self.allowed_token_ids != (), "some tokens"),
            "bad_words": (all(self.bad_words), "non-empty texts"),
            "logprobs": (0 <= self.logprobs <= MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}"),
            "prompt_logprobs": (0 <= (self.prompt_logprobs or 0) <= MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}"),
        }
        for name, (valid, expected) in checks.items():
            _require(valid, name, getattr(self, name), expected)
        if self.temperature == 0 and truncating:
            raise ConfigError(
                f"{truncating[0]}={getattr(self, truncating[0])} has no effect at temperature 0; leave it out, "
                "or raise the temperature"
            )

    @property
    def penalises(self) -> bool:
        """Whether logits depend on the tokens already in the text."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)

    @property
    def changes_logits(self) -> bool:
        """Whether penalties, biases or constraints modify the logits."""
        constrained = self.bad_words or self.min_tokens or self.structured_outputs or self.allowed_token_ids
        return bool(self.penalises or self.logit_bias or constrained)


def _require(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise ConfigError(f"{name} is {value!r:.80}, expected {expected}")
