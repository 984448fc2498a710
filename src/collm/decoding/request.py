"""A request, and the sequence it becomes while it is decoded."""

from __future__ import annotations

import random
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from collm.core.policies import Policy
from collm.core.types import Completion, FinishReason, SamplingParams, TokenStep
from collm.decoding.text import TextStream
from collm.errors import ConfigError


@dataclass(frozen=True)
class Request:
    """One prompt to continue.

    Raises:
        ConfigError: a seed where nothing is drawn.
    """

    prompt_ids: list[int]
    params: SamplingParams
    policy: Policy

    def __post_init__(self) -> None:
        if self.params.seed is not None and self.params.temperature == 0 and not self.policy.draws:
            raise ConfigError(
                f"seed={self.params.seed} has no effect: at temperature 0 nothing is drawn; "
                "set a temperature above 0 or leave the seed out"
            )


class Sequence:
    """A request in progress.

    Attributes:
        token_ids: prompt and completion.
        slots: author -> its slot, opened when that author first reads the sequence.
        steps: what was generated so far.
        finish_reason: set with the last token.
    """

    def __init__(
        self,
        request: Request,
        tokenizer: PreTrainedTokenizerBase,
        eos_ids: frozenset[int],
        max_length: int | None,
    ) -> None:
        self.request = request
        self.token_ids = list(request.prompt_ids)
        self.slots: dict[int, int] = {}
        self.steps: list[TokenStep] = []
        self.rng = random.Random(request.params.seed)
        self.finish_reason: FinishReason | None = None
        self._eos_ids = eos_ids
        self._max_length = max_length
        self._stream = TextStream(tokenizer, request.prompt_ids, request.params.stop)

    def append(self, token_id: int, author: int, defer_prob: float, logprob: float) -> TokenStep:
        """Add a token; sets `finish_reason` when it is the last."""
        self.token_ids.append(token_id)
        text = "" if token_id in self._eos_ids else self._stream.push(token_id)
        self.finish_reason = self._finished(token_id)
        if self.finish_reason in ("eos", "length"):
            text += self._stream.finish()
        step = TokenStep(token_id, text, author, defer_prob, logprob)
        self.steps.append(step)
        return step

    def _finished(self, token_id: int) -> FinishReason | None:
        if token_id in self._eos_ids:
            return "eos"
        if self._stream.stopped:
            return "stop"
        full = self._max_length is not None and len(self.token_ids) >= self._max_length
        if full or len(self.steps) + 1 >= self.request.params.max_new_tokens:
            return "length"
        return None

    def completion(self) -> Completion:
        """What was generated; only of a finished sequence."""
        assert self.finish_reason is not None
        return Completion(
            token_ids=[step.token_id for step in self.steps],
            token_texts=[step.text for step in self.steps],
            authors=[step.author for step in self.steps],
            defer_probs=[step.defer_prob for step in self.steps],
            logprobs=[step.logprob for step in self.steps],
            finish_reason=self.finish_reason,
            prompt_token_ids=self.request.prompt_ids,
        )
