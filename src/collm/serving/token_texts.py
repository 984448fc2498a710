"""Log-probabilities with token texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from collm.core.types import PromptLogprob, TokenStep, TopLogprobs
from collm.text.token_text import TokenText

_CONTEXT_TOKENS = 8

Spelled = tuple[int, float | None, TopLogprobs]
"""A token, its log-probability in nats, and the most probable tokens in its place."""


class TokenTexts:
    """Spells the tokens of a completion and their alternatives, step by step.

    Args:
        tokenizer: the tokenizer of all models.
        prompt_ids: the prompt of the completion.
        most: number of most probable tokens to list at each position.
        scored: log-probabilities of the prompt, if the text begins with it.
        as_ids: name tokens by their ids, as in vLLM.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_ids: Sequence[int],
        most: int,
        scored: Sequence[PromptLogprob | None] | None = None,
        *,
        as_ids: bool = False,
    ) -> None:
        self._read = TokenText(tokenizer, () if scored is not None else prompt_ids[-_CONTEXT_TOKENS:])
        self._start = len(self._read.text)
        self._most = most
        self._as_ids = as_ids
        self._prompt: list[Spelled] = []
        if scored is not None:
            self._prompt = [
                (token_id, one.logprob if one else None, one.top if one else ())
                for token_id, one in zip(prompt_ids, scored, strict=True)
            ]

    def completion_logprobs(self, steps: Sequence[TokenStep]) -> dict[str, Any]:
        """`logprobs` of /v1/completions, with offsets into the text. The chosen token is always listed."""
        found: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        prompt, self._prompt = self._prompt, []
        for token_id, logprob, top in [*prompt, *((step.token_id, step.logprob, step.top_logprobs) for step in steps)]:
            found["text_offset"].append(len(self._read.text) - self._start)
            token = self._name(token_id)
            found["tokens"].append(token)
            found["token_logprobs"].append(logprob)
            found["top_logprobs"].append(None if logprob is None else self._likely(top) | {token: logprob})
            self._read.push(token_id)
        return found if self._most else {**found, "top_logprobs": None}

    def _likely(self, top: TopLogprobs) -> dict[str, float]:
        likely: dict[str, float] = {}
        for token_id, logprob in top[: self._most]:
            likely.setdefault(self._name(token_id), logprob)
        return likely

    def _name(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_ids else self._read.spelling(token_id)

    def chat_logprobs(self, steps: Sequence[TokenStep]) -> list[dict[str, Any]]:
        """`logprobs.content` of /v1/chat/completions."""
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
        token = text if text and not self._as_ids else self._name(token_id)
        return {"token": token, "logprob": logprob, "bytes": list(text.encode()) if text else None}


def spelled_prompt(
    tokenizer: PreTrainedTokenizerBase, scored: Sequence[PromptLogprob | None], most: int
) -> list[dict[str, dict[str, Any]] | None]:
    """`prompt_logprobs` of vLLM: for each token its own entry and the most probable tokens, by token id."""
    read = TokenText(tokenizer)
    found: list[dict[str, dict[str, Any]] | None] = []
    for one in scored:
        if one is None:
            found.append(None)
            continue
        ranked = [(token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(one.top[:most], start=1)]
        entries = dict.fromkeys([*ranked, (one.token_id, one.logprob, one.rank)])
        found.append(
            {
                str(token_id): {"logprob": logprob, "rank": rank, "decoded_token": read.spelling(token_id)}
                for token_id, logprob, rank in entries
            }
        )
        read.push(one.token_id)
    return found
