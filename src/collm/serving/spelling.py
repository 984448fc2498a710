"""Log-probabilities with the texts of their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from collm.core.types import TokenStep
from collm.models.token_text import TokenText

_CONTEXT_TOKENS = 8


class Speller:
    """Spells the tokens of one completion, and those that might have stood in their places, as they come.

    Args:
        tokenizer: of all models.
        prompt_ids: what the completion follows.
        most: likeliest tokens to list for each position.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], most: int) -> None:
        self._read = TokenText(tokenizer, prompt_ids[-_CONTEXT_TOKENS:])
        self._start = len(self._read.text)
        self._most = most

    def completion_logprobs(self, steps: Sequence[TokenStep]) -> dict[str, Any]:
        """As /v1/completions has them; offsets are into the completion. The token itself is always listed."""
        found: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for step in steps:
            found["text_offset"].append(len(self._read.text) - self._start)
            token = self._read.spelling(step.token_id)
            likely: dict[str, float] = {}
            for token_id, logprob in step.top_logprobs[: self._most]:
                likely.setdefault(self._read.spelling(token_id), logprob)
            found["tokens"].append(token)
            found["token_logprobs"].append(step.logprob)
            found["top_logprobs"].append({**likely, token: step.logprob})
            self._read.push(step.token_id)
        return found if self._most else {**found, "top_logprobs": None}

    def chat_logprobs(self, steps: Sequence[TokenStep]) -> list[dict[str, Any]]:
        """As `content` of a chat's logprobs has them."""
        found = []
        for step in steps:
            likely = [self._entry(*one) for one in step.top_logprobs[: self._most]]
            found.append({**self._entry(step.token_id, step.logprob), "top_logprobs": likely})
            self._read.push(step.token_id)
        return found

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        length = len(self._read)
        text = self._read.push(token_id)
        self._read.cut(length)
        token = text or self._read.spelling(token_id)
        return {"token": token, "logprob": logprob, "bytes": list(text.encode()) if text else None}
