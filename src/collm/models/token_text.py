"""The text of tokens as they arrive: what each prefix of a token list spells, in whole characters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from transformers import PreTrainedTokenizerBase

_CONTEXT_TOKENS = 8
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TokenText:
    """The text of a token list that grows at its end and may be cut.

    Each token is decoded together with a few before it, so that the text is that of the whole list (spaces between
    words, characters split over tokens). Special tokens spell nothing.

    Args:
        tokenizer: any transformers tokenizer.
        token_ids: the first tokens.

    Attributes:
        token_ids: the tokens.
        text: what they spell, up to the last token that ends where a character does.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, token_ids: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        self.token_ids: list[int] = []
        self.text = ""
        self._ends = [0]  # characters of the text that the first n tokens spell
        self._whole = [True]  # whether those end where a character ends
        self._start, self._known = 0, ""  # the tokens from here on, up to the last whole character, and their text
        for token_id in token_ids:
            self.push(token_id)

    def __len__(self) -> int:
        return len(self.token_ids)

    def end(self, length: int) -> int:
        """How many characters of `text` the first `length` tokens spell."""
        return self._ends[length]

    def whole(self, length: int) -> bool:
        """Whether a character ends where the first `length` tokens end."""
        return self._whole[length]

    def push(self, token_id: int) -> str:
        """Append a token; the text that became certain with it."""
        if self._whole[-1] and len(self.token_ids) - self._start > 3 * _CONTEXT_TOKENS:
            self._look_from(len(self.token_ids) - _CONTEXT_TOKENS)
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
        """What a token would add to the text; its name where it would add nothing, as an end does."""
        length = len(self)
        text = self.push(token_id)
        self.cut(length)
        return text or str(self._tokenizer.convert_ids_to_tokens(token_id))

    def cut(self, length: int) -> None:
        """Forget everything after the first `length` tokens."""
        if length == len(self.token_ids):
            return
        pending = next(n for n in range(length + 1) if self._whole[length - n])  # tokens of an incomplete character
        again = self.token_ids[length - pending : length]
        length -= pending
        del self.token_ids[length:], self._ends[length + 1 :], self._whole[length + 1 :]
        self.text = self.text[: self._ends[-1]]
        self._look_from(length - _CONTEXT_TOKENS)
        for token_id in again:
            self.push(token_id)

    def _look_from(self, start: int) -> None:
        """Decode from here on, or from the nearest place before where a character ends and some text follows."""
        places = range(max(start, 0), -1, -1)
        self._start = next((n for n in places if self._whole[n] and self._ends[n] < len(self.text)), 0)
        self._known = self._decode()

    def _decode(self) -> str:
        # Cleaning up spaces would change text that is already out.
        ids = self.token_ids[self._start :]
        decoded = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return cast(str, decoded)
