"""Token ids to text as they arrive: whole characters only, and nothing that may still become a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from transformers import PreTrainedTokenizerBase

_CONTEXT_TOKENS = 8
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Incremental detokeniser of one completion.

    Decodes each token together with a few before it, the prompt's last included, so that the text continues the
    prompt exactly (spaces between words, characters split over tokens).

    Args:
        tokenizer: any transformers tokenizer.
        prompt_ids: what the completion follows.
        stop: strings that end the text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids[-_CONTEXT_TOKENS:])  # what is decoded together
        self._known = self._decode()  # the text of those that is out, or held for a stop string
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; sets `stopped` once a stop string is complete."""
        self._ids.append(token_id)
        text = self._decode()
        if text.endswith(_INCOMPLETE) or len(text) <= len(self._known):
            return ""
        new, self._known = text[len(self._known) :], text
        if len(self._ids) > 3 * _CONTEXT_TOKENS:
            self._ids = self._ids[-_CONTEXT_TOKENS:]
            self._known = self._decode()
        return self._release(new)

    def finish(self) -> str:
        """What was held back for a stop string that did not come; an incomplete character is dropped."""
        held, self._held = self._held, ""
        return held

    def _decode(self) -> str:
        # Cleaning up spaces would change text that is already out.
        decoded = self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return cast(str, decoded)

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
