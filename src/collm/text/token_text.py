"""Incremental detokenisation: the text of each prefix of a token list, in whole characters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from transformers import PreTrainedTokenizerBase

_CONTEXT_TOKENS = 8
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
        if self._whole[-1] and len(self.token_ids) - self._start > 3 * _CONTEXT_TOKENS:
            self._decode_from(len(self.token_ids) - _CONTEXT_TOKENS)
        self.token_ids.append(token_id)
        decoded = self._decode()
        whole = not decoded.endswith(_INCOMPLETE)
        new = decoded[len(self._known) :] if whole else ""
        if whole:
            self._known = decoded
            self.text += new
        self._ends.append(len(self.text))
        self._whole.append(whole)
        return new

    def spelling(self, token_id: int) -> str:
        """The text that a token would add, or its name if it would add none."""
        length = len(self)
        text = self.push(token_id)
        self.cut(length)
        return text or str(self._tokenizer.convert_ids_to_tokens(token_id))

    def cut(self, length: int) -> None:
        """Drop everything after the first `length` tokens."""
        if length == len(self.token_ids):
            return
        pending = next(n for n in range(length + 1) if self._whole[length - n])  # tokens of an incomplete character
        again = self.token_ids[length - pending : length]
        length -= pending
        del self.token_ids[length:], self._ends[length + 1 :], self._whole[length + 1 :]
        self.text = self.text[: self._ends[-1]]
        self._decode_from(length - _CONTEXT_TOKENS)
        for token_id in again:
            self.push(token_id)

    def _decode_from(self, start: int) -> None:
        """Decode from `start` on, or from the nearest earlier token that begins a character and is followed by text."""
        candidates = range(max(start, 0), -1, -1)
        self._start = next((n for n in candidates if self._whole[n] and self._ends[n] < len(self.text)), 0)
        self._known = self._decode()

    def _decode(self) -> str:
        # Cleaning up spaces would change text that was already returned.
        ids = self.token_ids[self._start :]
        decoded = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return cast(str, decoded)
