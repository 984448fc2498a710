"""Tokenizers as byte strings, and incremental tokenisation of a growing text."""

from __future__ import annotations

import bisect
import re
from collections.abc import Collection, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, cast

import torch
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from collm.errors import MismatchError
from collm.text.template import PromptTemplate, continuation_ids, special_ids, tokenize
from collm.text.token_text import CONTEXT_TOKENS

_WINDOW_BYTES = 32
"""Distance in bytes from the end of the known text to the boundary from which it is encoded again."""
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""SentencePiece's character for a space."""
_BYTE = re.compile("<0x[+0-9A-Fa-f][0-9A-Fa-f]>")
"""A token that stands for a byte, as the decoder reads it."""
_BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}
"""Bytes by the characters of byte-level BPE."""


class Encoding(NamedTuple):
    """Token ids of a text, and the end of each token in bytes."""

    ids: list[int]
    ends: list[int]


class TextTokenizer:
    """A tokenizer whose tokens are byte strings.

    Args:
        tokenizer: byte-level BPE, or SentencePiece with byte fallback.
        name: name of its model in error messages.
        template: prompt template of its model.
        eos_ids: tokens that end a text besides the template's `turn_ends`.

    Attributes:
        eos_ids: all tokens that end a text.
        token_bytes: token id -> its bytes; None for special tokens and ids without a token.
        first_byte: the first byte of each token, -1 if it has no bytes, int64, shape (V,).

    Raises:
        MismatchError: the bytes of the tokens cannot be determined.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str = "the base",
        template: PromptTemplate | None = None,
        eos_ids: Collection[int] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.name = name
        self.template = template or PromptTemplate()
        self.eos_ids = frozenset(eos_ids).union(self.template.turn_ends)
        self.token_bytes = bytes_of_tokens(tokenizer, name)
        self.vocab_size = len(self.token_bytes)
        self.first_byte = torch.tensor([spelled[0] if spelled else -1 for spelled in self.token_bytes])
        self._backend = cast(Any, tokenizer).backend_tokenizer
        self._plain = self._backend.truncation is None and self._backend.padding is None

    def spell(self, token_ids: Sequence[int]) -> bytes | None:
        """The bytes of these tokens; None if a token has no bytes."""
        parts = [self.token_bytes[token_id] for token_id in token_ids]
        return None if None in parts else b"".join(cast("list[bytes]", parts))

    def shown(self, token_id: int) -> str:
        """The text of a token, or its name if it has no text or is part of a character."""
        try:
            text = (self.token_bytes[token_id] or b"").decode()
        except UnicodeDecodeError:
            text = ""
        return text or str(self.tokenizer.convert_ids_to_tokens(token_id))

    def ends(self, token_ids: Sequence[int], start: int = 0) -> list[int]:
        """End of each token in bytes, if the first begins at `start`."""
        lengths = (len(self.token_bytes[token_id] or b"") for token_id in token_ids)
        return list(accumulate(lengths, initial=start))[1:]

    def encode_after(self, prompt_ids: Sequence[int], text: str) -> Encoding | None:
        """Tokenise a text that follows a prompt. Returns None if the tokens do not spell exactly this text."""
        context_ids = list(prompt_ids[-CONTEXT_TOKENS:])
        context = str(self.tokenizer.decode(context_ids, clean_up_tokenization_spaces=False))
        if self._plain:  # several times faster than through transformers
            whole = cast("list[int]", self._backend.encode(context + text, add_special_tokens=False).ids)
        else:
            whole = tokenize(self.tokenizer, context + text, special=False)
        follows = whole[: len(context_ids)] == context_ids
        ids = whole[len(context_ids) :] if follows else continuation_ids(self.tokenizer, text)
        spelled, wanted = self.spell(ids), text.encode()
        if spelled not in (wanted, b" " + wanted):  # some tokenizers add a space before the first word
            return None
        return Encoding(ids, self.ends(ids, 0 if spelled == wanted else -1))

    def adds_space(self, prompt_ids: Sequence[int]) -> bool:
        """Whether the tokenizer adds a space before a word that follows this prompt."""
        probe = self.encode_after(prompt_ids, "a")
        return probe is not None and self.spell(probe.ids) == b" a"


class GrowingIds:
    """Token ids of a growing answer, and their ends in bytes, as in `Encoding`.

    They equal those of the whole answer, but only its end is encoded again. `prompt_ids` is the prompt in the author's
    tokens.
    """

    def __init__(self, tokenizer: TextTokenizer, prompt_ids: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.ends: list[int] = []
        self._prompt_ids = prompt_ids[-CONTEXT_TOKENS:]
        self._adds_space = tokenizer.adds_space(prompt_ids)

    def spell(self, token_ids: Sequence[int]) -> bytes | None:
        """The bytes of tokens that follow the answer, without a space that the tokenizer adds at its beginning."""
        spelled = self.tokenizer.spell(token_ids)
        return spelled.removeprefix(b" ") if spelled and self._adds_space and not self.ids else spelled

    def spells(self, answer: bytes) -> bool:
        """Whether the ids are those of `answer`, which must extend the previous one."""
        return (self.ends[-1] if self.ends else 0) == len(answer)

    def grow(self, answer: bytes, boundaries: Sequence[int]) -> bool:
        """Update as in `grown`. Returns False, without a change, if no tokens spell the answer."""
        encoded = self.grown(answer, boundaries)
        if encoded is not None:
            self.ids, self.ends = encoded
        return encoded is not None

    def grown(self, answer: bytes, boundaries: Sequence[int]) -> Encoding | None:
        """The encoding of a longer answer, without updating; None if no tokens spell it.

        Args:
            answer: the whole answer, which extends the previous one.
            boundaries: ascending positions at which a token ends in every encoding.
        """
        if self.spells(answer):
            return Encoding(self.ids, self.ends)
        try:
            extended = self._from_window(answer, boundaries)
            return extended or self.tokenizer.encode_after(self._prompt_ids, answer.decode())
        except UnicodeDecodeError:
            return None

    def _from_window(self, answer: bytes, boundaries: Sequence[int]) -> Encoding | None:
        """Encode from an earlier boundary on. Returns None if the tokens of the overlap differ from the known ones."""
        known = self.ends[-1] if self.ends else 0
        at = bisect.bisect_right(boundaries, known - _WINDOW_BYTES) - 1
        if at < 0 or at + 1 >= len(boundaries) or boundaries[at + 1] >= known:
            return None
        start, seam = boundaries[at], boundaries[at + 1]
        piece = self.tokenizer.encode_after([], answer[start:].decode())
        if piece is None:
            return None
        ids, ends = piece.ids, [start + end for end in piece.ends]
        new, old = bisect.bisect_left(ends, seam), bisect.bisect_left(self.ends, seam)
        if new == len(ends) or ends[new] != seam or self.ends[old] != seam:
            return None
        overlap = self.ids[old + 1 :]
        if ids[new + 1 : new + 1 + len(overlap)] != overlap:
            return None
        return Encoding(self.ids[: old + 1] + ids[new + 1 :], self.ends[: old + 1] + ends[new + 1 :])


def bytes_of_tokens(tokenizer: PreTrainedTokenizerBase, name: str) -> list[bytes | None]:
    """The bytes of each token id as in `TextTokenizer.token_bytes`, which raises the same errors."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise MismatchError(
            f"the tokenizer of {name} has no fast version, so the bytes of its tokens are unknown; "
            "save it as a fast tokenizer, or use models that share one tokenizer"
        )
    steps = "".join(str(one.__getstate__()) for one in (backend.pre_tokenizer, backend.decoder) if one is not None)
    byte_level = '"ByteLevel"' in steps
    if not byte_level and '"ByteFallback"' not in steps:
        raise MismatchError(
            f"the tokenizer of {name} is neither byte-level nor SentencePiece with byte fallback, so it cannot encode "
            "every text; use models that share one tokenizer"
        )
    vocabulary, added, special = tokenizer.get_vocab(), tokenizer.added_tokens_decoder, special_ids(tokenizer)
    found: list[bytes | None] = [None] * (max(vocabulary.values()) + 1)
    for token, token_id in vocabulary.items():
        if token_id in special:
            continue
        if not byte_level:
            is_byte = _BYTE.fullmatch(token)
            found[token_id] = bytes([int(token[3:5], 16)]) if is_byte else token.replace(_SPACE, " ").encode()
        elif token_id in added:
            found[token_id] = token.encode()
        elif _BYTE_OF.keys() >= set(token):
            found[token_id] = bytes(_BYTE_OF[character] for character in token)
    return found
