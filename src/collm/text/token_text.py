"""Incremental detokenisation: the text of each prefix of a token list, in whole characters, and stop strings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

from transformers import PreTrainedTokenizerBase

CONTEXT_TOKENS = 8
"""Number of tokens before a text that its spelling may depend on."""
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TokenText:
    """The text of a token list that can be appended to and truncated.

    Each token is decoded together with a few tokens before it, so that spaces between words and characters split over
    tokens come out as in the whole list. Special tokens have no text.

    Attributes:
        text: the text of `token_ids`, up to the last token that completes a character.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, token_ids: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        # Cleaning up spaces would change text that was already returned.
        self._decode = partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self.token_ids: list[int] = []
        self.text = ""
        self._ends = [0]  # length of the text of the first n tokens
        self._whole = [True]  # whether the first n tokens end with a whole character
        self._start, self._known = 0, ""  # first token to decode, and the text from there to the last whole character
        for token_id in token_ids:
            self.push(token_id)

    def __len__(self) -> int:
        return len(self.token_ids)

    def end(self, length: int) -> int:
        """Number of characters in the text of the first `length` tokens."""
        return self._ends[length]

    def whole(self, length: int) -> bool:
        """Whether the first `length` tokens end with a whole character."""
        return self._whole[length]

    def push(self, token_id: int) -> str:
        """Append a token and return the text that it completes."""
        if self._whole[-1] and len(self.token_ids) - self._start > 3 * CONTEXT_TOKENS:
            self._decode_from(len(self.token_ids) - CONTEXT_TOKENS)
        self.token_ids.append(token_id)
        decoded = str(self._decode(self.token_ids[self._start :]))
        whole = not decoded.endswith(_INCOMPLETE)
        new = decoded[len(self._known) :] if whole else ""
        if whole:
            self._known = decoded
            self.text += new
        self._ends.append(len(self.text))
        self._whole.append(whole)
        return new

    def added(self, token_id: int) -> str:
        """The text that a token would complete."""
        length = len(self.token_ids)
        text = self.push(token_id)
        self.cut(length)
        return text

    def spelling(self, token_id: int) -> str:
        """The text that a token would complete, or its name if there is none."""
        return self.added(token_id) or str(self._tokenizer.convert_ids_to_tokens(token_id))

    def cut(self, length: int) -> None:
        """Drop everything after the first `length` tokens."""
        if length == len(self.token_ids):
            return
        pending = next(n for n in range(length + 1) if self._whole[length - n])  # tokens of an incomplete character
        again = self.token_ids[length - pending : length]
        length -= pending
        del self.token_ids[length:], self._ends[length + 1 :], self._whole[length + 1 :]
        self.text = self.text[: self._ends[-1]]
        self._decode_from(length - CONTEXT_TOKENS)
        for token_id in again:
            self.push(token_id)

    def _decode_from(self, start: int) -> None:
        """Decode from `start` on, or from the nearest earlier token that begins a character and is followed by text."""
        candidates = range(max(start, 0), -1, -1)
        self._start = next((n for n in candidates if self._whole[n] and self._ends[n] < len(self.text)), 0)
        self._known = str(self._decode(self.token_ids[self._start :]))


class TextStream:
    """Incremental detokeniser of a completion, which holds back what may become a stop string.

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
        self._tokens = TokenText(tokenizer, prompt_ids[-CONTEXT_TOKENS:])
        self._stop = tuple(stop)
        self._keep_stop = keep_stop
        self._longest = max(map(len, stop), default=0)
        self._held = ""
        self.stopped = False

    def push(self, token_id: int, *, may_stop: bool = True) -> str:
        """Add a token and return the text that is now final. Sets `stopped` once a stop string is complete.

        Args:
            may_stop: whether to look for stop strings in this token.
        """
        new = self._tokens.push(token_id)
        if not (self._stop and may_stop and new):
            return new
        text = self._held + new
        found = [(text.find(stop), stop) for stop in self._stop if stop in text]
        if found:
            self.stopped, self._held = True, ""
            at, stop = min(found, key=lambda one: one[0])
            return text[: at + len(stop) * self._keep_stop]
        lengths = range(min(len(text), self._longest), 0, -1)
        held = next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self._stop)), 0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """Return the text held back for a possible stop string. An incomplete character is dropped."""
        held, self._held = self._held, ""
        return held
