"""Incremental detokenisation that emits whole characters and holds back possible stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from collm.text.token_text import TokenText

_CONTEXT_TOKENS = 8


class TextStream:
    """Incremental detokeniser of one completion.

    Args:
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
        # Hold back the longest end of the text with which a stop string begins.
        longest = min(len(text), max(map(len, self._stop), default=0))
        held = next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self._stop)), 0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """Return the text held back for a possible stop string. An incomplete character is dropped."""
        held, self._held = self._held, ""
        return held
