"""Token ids to text as they arrive: whole characters only, and nothing that may still become a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from collm.models.token_text import TokenText

_CONTEXT_TOKENS = 8


class TextStream:
    """Incremental detokeniser of one completion, whose text continues the prompt's exactly.

    Args:
        tokenizer: any transformers tokenizer.
        prompt_ids: what the completion follows.
        stop: strings that end the text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._tokens = TokenText(tokenizer, prompt_ids[-_CONTEXT_TOKENS:])
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; sets `stopped` once a stop string is complete."""
        new = self._tokens.push(token_id)
        return self._release(new) if new else ""

    def finish(self) -> str:
        """What was held back for a stop string that did not come; an incomplete character is dropped."""
        held, self._held = self._held, ""
        return held

    def _release(self, text: str) -> str:
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
