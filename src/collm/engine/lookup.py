"""Prompt lookup: drafts copied from an earlier occurrence of the text's last tokens."""

from __future__ import annotations

from collections.abc import Sequence

_NGRAMS = (3, 2)  # lengths of the n-grams that are looked up, in order


class PromptLookup:
    """Finds the most recent earlier occurrence of a text's last n-gram (prompt lookup decoding, Saxena 2023).

    The text may be appended to between calls.
    """

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._token_ids = token_ids
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> end of its last occurrence before the end of the text
        self._indexed = 0

    def draft(self, length: int) -> list[int]:
        """Draft at most `length` tokens; none if the last n-gram is new."""
        text = self._token_ids
        for end in range(self._indexed, len(text)):
            self._after |= {tuple(text[end - n : end]): end for n in _NGRAMS if end >= n}
        self._indexed = max(self._indexed, len(text))
        found = (self._after.get(tuple(text[-n:])) for n in _NGRAMS if len(text) >= n)
        at = next((at for at in found if at is not None), len(text))
        return list(text[at : at + length])

    def next_token(self) -> int | None:
        """The first draft token, or None."""
        return next(iter(self.draft(1)), None)
