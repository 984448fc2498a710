"""Tokenizers as byte strings, and incremental tokenisation of a growing text."""

from __future__ import annotations

import bisect
import re
from collections.abc import Collection, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from collm.errors import MismatchError
from collm.text.guards import TokenizerIdentity
from collm.text.template import PromptTemplate, continuation_ids, special_ids, tokenize

_CONTEXT_TOKENS = 8
_WINDOW_BYTES = 32
"""Distance in bytes from the end of the known text to the boundary from which it is encoded again."""
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""SentencePiece's character for a space."""
_BYTE = re.compile("<0x[+0-9A-Fa-f][0-9A-Fa-f]>")
"""A token that stands for a byte, as the decoder reads it."""


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
        self.identity = TokenizerIdentity.of(tokenizer)
        self.token_bytes = bytes_of_tokens(tokenizer, self.identity, name)
        self._backend = cast(Any, tokenizer).backend_tokenizer
        self._plain = self._backend.truncation is None and self._backend.padding is None
        self.first_byte = torch.tensor([spelled[0] if spelled else -1 for spelled in self.token_bytes])

    @property
    def vocab_size(self) -> int:
        return len(self.token_bytes)

    @cached_property
    def pairs_inside(self) -> Tensor:
        """Whether some token contains byte a followed by byte b, bool, shape (256, 256)."""
        present = [spelled for spelled in self.token_bytes if spelled]
        joined = np.frombuffer(b"".join(present), dtype=np.uint8)
        lasts = np.cumsum([len(spelled) for spelled in present]) - 1
        within = np.ones(len(joined), dtype=bool)
        within[lasts] = False
        inside = np.zeros((256, 256), dtype=bool)
        at = np.flatnonzero(within)
        inside[joined[at], joined[at + 1]] = True
        return torch.from_numpy(inside)

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
        return self.encode_after_context(self.context(prompt_ids), text)

    def context(self, prompt_ids: Sequence[int]) -> Context:
        """The last tokens of a prompt, with their text."""
        ids = list(prompt_ids[-_CONTEXT_TOKENS:])
        return Context(ids, str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)))

    def encode_after_context(self, context: Context, text: str) -> Encoding | None:
        """Like `encode_after`, given the prompt's context."""
        whole = self._tokenize(context.text + text)
        if whole[: len(context.ids)] == context.ids:
            token_ids = whole[len(context.ids) :]
        else:
            token_ids = continuation_ids(self.tokenizer, text)
        return self._checked(token_ids, text)

    def adds_space(self, prompt_ids: Sequence[int]) -> bool:
        """Whether the tokenizer adds a space before a word that follows this prompt."""
        probe = self.encode_after(prompt_ids, "a")
        return probe is not None and self.spell(probe.ids) == b" a"

    def encode_piece(self, text: str) -> Encoding | None:
        """Tokenise a part of a longer text. The first few tokens may be wrong. None as in `encode_after`."""
        return self._checked(self._tokenize(text), text)

    def _tokenize(self, text: str) -> list[int]:
        if self._plain:  # several times faster than through transformers
            return cast("list[int]", self._backend.encode(text, add_special_tokens=False).ids)
        return tokenize(self.tokenizer, text, special=False)

    def _checked(self, token_ids: list[int], text: str) -> Encoding | None:
        """The encoding if it spells the text, apart from a space that some tokenizers add before the first word."""
        spelled, wanted = self.spell(token_ids), text.encode()
        if spelled == wanted:
            return Encoding(token_ids, self.ends(token_ids))
        return Encoding(token_ids, self.ends(token_ids, -1)) if spelled == b" " + wanted else None


class Context(NamedTuple):
    """The last tokens of a prompt, and their text."""

    ids: list[int]
    text: str


class Encoding(NamedTuple):
    """Token ids of a text, and the end of each token in bytes."""

    ids: list[int]
    ends: list[int]


class GrowingIds:
    """Token ids of a growing answer. They equal those of the whole answer, but only its end is encoded again.

    Args:
        tokenizer: the author's tokenizer.
        prompt_ids: the prompt in the author's tokens.

    Attributes:
        ids: token ids of the answer.
        ends: end of each token in bytes.
    """

    def __init__(self, tokenizer: TextTokenizer, prompt_ids: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.ends: list[int] = []
        self._context = tokenizer.context(prompt_ids)
        self._adds_space = tokenizer.adds_space(prompt_ids)

    def spell(self, token_ids: Sequence[int]) -> bytes | None:
        """The bytes of tokens that follow the answer, without a space that the tokenizer adds at its beginning."""
        spelled = self.tokenizer.spell(token_ids)
        if spelled and self._adds_space and not self.ids:
            return spelled.removeprefix(b" ")
        return spelled

    def grow(self, answer: bytes, boundaries: Sequence[int]) -> bool:
        """Update to a longer answer. Returns False, without a change, if no tokens spell it.

        Args:
            answer: the whole answer, which extends the previous one.
            boundaries: ascending positions at which a token ends in every encoding.
        """
        encoded = self.grown(answer, boundaries)
        if encoded is None:
            return False
        self.ids, self.ends = encoded
        return True

    def spells(self, answer: bytes) -> bool:
        """Whether the ids are those of `answer`, which must extend the previous one."""
        return (self.ends[-1] if self.ends else 0) == len(answer)

    def grown(self, answer: bytes, boundaries: Sequence[int]) -> Encoding | None:
        """The encoding of the whole answer, without updating; arguments as in `grow`."""
        if self.spells(answer):
            return Encoding(self.ids, self.ends)
        return self._from_window(answer, boundaries) or self._whole(answer)

    def _from_window(self, answer: bytes, boundaries: Sequence[int]) -> Encoding | None:
        """Encode from an earlier boundary on. Returns None if the tokens of the overlap differ from the known ones."""
        known = self.ends[-1] if self.ends else 0
        at = bisect.bisect_right(boundaries, known - _WINDOW_BYTES) - 1
        if at < 0 or at + 1 >= len(boundaries) or boundaries[at + 1] >= known:
            return None
        start, seam = boundaries[at], boundaries[at + 1]
        try:
            piece = self.tokenizer.encode_piece(answer[start:].decode())
        except UnicodeDecodeError:
            return None
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

    def _whole(self, answer: bytes) -> Encoding | None:
        try:
            return self.tokenizer.encode_after_context(self._context, answer.decode())
        except UnicodeDecodeError:
            return None


def bytes_of_tokens(tokenizer: PreTrainedTokenizerBase, identity: TokenizerIdentity, name: str) -> list[bytes | None]:
    """The bytes of each token id; None for special tokens and ids without a token.

    Raises:
        MismatchError: the bytes of the tokens cannot be determined.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise MismatchError(
            f"the tokenizer of {name} has no fast version, so the bytes of its tokens are unknown; "
            "save it as a fast tokenizer, or use models that share one tokenizer"
        )
    steps = "".join(str(one.__getstate__()) for one in (backend.pre_tokenizer, backend.decoder) if one is not None)
    if '"ByteLevel"' in steps:
        spell = _spell_byte_level
    elif '"ByteFallback"' in steps:
        spell = _spell_sentencepiece
    else:
        raise MismatchError(
            f"the tokenizer of {name} is neither byte-level nor SentencePiece with byte fallback, so it cannot encode "
            "every text; use models that share one tokenizer"
        )
    added, special = tokenizer.added_tokens_decoder, special_ids(tokenizer)
    found: list[bytes | None] = [None] * identity.vocab_size
    for token_id, token in identity.tokens.items():
        if token_id in special:
            continue
        is_text = token_id in added and spell is _spell_byte_level
        found[token_id] = token.encode() if is_text else spell(token)
    return found


def _spell_byte_level(token: str) -> bytes | None:
    try:
        return token.translate(_BYTE_OF).encode("latin-1")
    except UnicodeEncodeError:  # a character that represents no byte
        return None


def _spell_sentencepiece(token: str) -> bytes | None:
    if _BYTE.fullmatch(token):
        return bytes([int(token[3:5], 16)])
    return token.replace(_SPACE, " ").encode()


def _byte_of() -> dict[int, int]:
    """Map byte-level BPE's characters to bytes: printable ones to themselves, 256 and up to the others (GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    unused = dict.fromkeys(others, 0xFFFF)  # these bytes have another character
    return unused | {256 + n: byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_of()
