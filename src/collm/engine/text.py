"""Incremental detokenisation that emits whole characters and holds back possible stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from collm.text.token_text import TokenText

_CONTEXT_TOKENS = 8


class TextStream:
    """Incremental detokeniser of one completion.

    Args:
        tokenizer: any transformers tokenizer.
        prompt_ids: the prompt, whose last tokens may affect the spelling of the completion.
        stop: strings that end the text.
        keep_stop: whether to keep the stop string in the text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_ids: Sequence[int],
        stop: Sequence[str] = (),
        *,
        keep_stop: bool = False,
    ) -> None:
        self._tokens = TokenText(tokenizer, prompt_ids[-_CONTEXT_TOKENS:])
        self._stop = tuple(stop)
        self._keep_stop = keep_stop
        self._held = ""
        self.stopped = False

    def push(self, token_id: int, *, may_stop: bool = True) -> str:
        """Add a token and return the text that is now final. Sets `stopped` once a stop string is complete.

        Args:
            may_stop: whether to look for stop strings in this token.
        """
        new = self._tokens.push(token_id)
        if not may_stop or not new:
            return new
        text = self._held + new
        found = [(text.find(stop), stop) for stop in self._stop if stop in text]
        if found:
            self.stopped, self._held = True, ""
            at, stop = min(found, key=lambda one: one[0])
            return text[: at + len(stop) * self._keep_stop]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """Return the text held back for a possible stop string. An incomplete character is dropped."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
