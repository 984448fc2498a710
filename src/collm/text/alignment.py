"""Alignment of models with different tokenizers: boundaries at which the author may change.

A boundary is a position between two bytes that are adjacent in no token of any vocabulary. It therefore lies inside no
token, however the text is tokenised, and the first byte of an author's next token decides whether that token begins a
new segment. Policies choose an author per segment instead of per token. For a segment w after a text x, the
probability of author k is

    q_k(w | x) = P_k(t_1 | START) prod_(i >= 2) P_k(t_i) P_k(START | x w),

where START is the set of tokens that begin a segment or end the text. All tokens that end the text are one event. It
sums to 1 over all segments. If START is the whole vocabulary, it is the probability of a token.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, cast

import torch
from torch import Tensor

from collm.core.segments import SegmentLaw
from collm.errors import MismatchError
from collm.text.template import Prompt, tokenize
from collm.text.text_tokenizer import GrowingIds, TextTokenizer

ANYTHING = 256
"""Row of the opening table at the beginning of an answer, where every token begins a segment."""
ONLY_ENDS = 257
"""Row after two or more white-space characters, whose tokenisation depends on the following text."""
NO_BOUNDARY = -1

_PROBES = (
    "The capital of France is Paris. It has 2,165,423 inhabitants (2019)!",
    "48 + 24 = 72; <<48+24=72>>72\n#### 72",
    "def f(x):\n    return x ** 2\n\n\nprint(f(3))\t# nine",
    "\N{LATIN SMALL LETTER N}a\N{LATIN SMALL LETTER I WITH DIAERESIS}ve caf\N{LATIN SMALL LETTER E WITH ACUTE} \u2014 "
    "\u201cquoted\u201d \u2026 don't, we'll, I'm",
    "\u6211\u4eec\u4eca\u5929\u53bb\u516c\u56ed\u6563\u6b65\uff0c\u5929\u6c14\u5f88\u597d\u3002",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \U0001f44d\U0001f3fd end\r\nof\u00a0it",
)


class Masks(NamedTuple):
    """Tokens of one author at one place in a segment, bool, shape (V,) or (R, V) each.

    Attributes:
        follows: may come next.
        opens: begin a segment here or end the text.
        ends: end the text.
    """

    follows: Tensor
    opens: Tensor
    ends: Tensor

    @classmethod
    def stacked(cls, rows: Sequence[Masks]) -> Masks:
        return cls(*(torch.stack(each) for each in zip(*rows, strict=True)))


class Alignment:
    """Alignment of authors with different tokenizers, the base first.

    Attributes:
        opens: the opening table: whether a byte begins a segment, bool, shape (258, 256). The row is the last byte of
            the text before, `ANYTHING` or `ONLY_ENDS`.

    Raises:
        MismatchError: the tokenizers cannot be aligned.
    """

    def __init__(self, tokenizers: Sequence[TextTokenizer]) -> None:
        self.tokenizers = tokenizers
        self.opens = _opening_table(tokenizers)
        self._opens: list[list[bool]] = self.opens.tolist()  # single entries of a tensor are slow to read
        self._masks: dict[tuple[int, int, torch.device], Tensor] = {}
        if not any(self._opens[letter][ord(" ")] for letter in string.ascii_letters.encode()):
            names = " and ".join(one.name for one in tokenizers)
            raise MismatchError(
                f"the tokenizers of {names} have no common boundaries between words, because one has tokens that span "
                "several words; use another pair"
            )
        for tokenizer in tokenizers:
            self._check(tokenizer)

    def row(self, text: bytes) -> int:
        """The row of `opens` after this text."""
        if not text:
            return ANYTHING
        if text[-1] >= 0x80 or text[-1:].isspace():
            ending = text[-8:].decode(errors="ignore")[-2:]
            if len(ending) == 2 and ending.isspace():
                return ONLY_ENDS
        return text[-1]

    def is_opening(self, author: int, row: int, token_id: int) -> bool:
        """Whether an author's token begins a segment in this row, or ends the text."""
        tokenizer = self.tokenizers[author]
        text = tokenizer.token_bytes[token_id]
        return token_id in tokenizer.eos_ids or bool(text and self._opens[row][text[0]])

    def opening_mask(self, author: int, row: int, device: torch.device) -> Tensor:
        """The author's tokens that begin a segment in this row or end the text, bool, shape (V,)."""
        key = author, row, device
        if key not in self._masks:
            self._masks[key] = self.law(author).openings(torch.tensor([row]))[0].to(device)
        return self._masks[key]

    def law(self, author: int) -> SegmentLaw:
        """The author's tokens that begin a segment."""
        tokenizer = self.tokenizers[author]
        ends = torch.zeros(tokenizer.vocab_size, dtype=torch.bool)
        ends[list(tokenizer.eos_ids)] = True
        return SegmentLaw(self.opens, tokenizer.first_byte, ends)

    def assistant_prompts(self, prompt: Prompt) -> list[list[int]]:
        """Render a prompt with each assistant's own template and tokenizer, which may raise a `RequestError`."""
        base, *assistants = self.tokenizers
        if not isinstance(prompt, str) and all(isinstance(one, int) for one in prompt):
            ids = cast("list[int]", prompt)
            text = str(base.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
            return [list(ids) if one is base else tokenize(one.tokenizer, text) for one in assistants]
        return [one.template.encode_prompt(one.tokenizer, prompt) for one in assistants]

    def boundaries(self, answer: bytes) -> list[int]:
        """Positions in bytes at which segments of a whole answer begin, and the end of the answer."""
        found = [0] if answer else []
        for at in range(1, len(answer)):
            if self._opens[answer[at - 1]][answer[at]] and self.row(answer[max(at - 8, 0) : at]) != ONLY_ENDS:
                found.append(at)
        return [*found, len(answer)]

    def _check(self, tokenizer: TextTokenizer) -> None:
        """Check on probe texts that bytes are preserved, and tokens end at boundaries and stay as the text grows."""
        context = [] if tokenizer.tokenizer.bos_token_id is None else [tokenizer.tokenizer.bos_token_id]
        for probe in _PROBES:
            answer = probe.encode()
            encoded = tokenizer.encode_after(context, probe)
            if encoded is None:
                raise MismatchError(
                    f"the tokenizer of {tokenizer.name} changes texts (decoding does not return {probe[:40]!r}), "
                    "so other models would read another text; use a tokenizer that preserves texts"
                )
            boundaries = self.boundaries(answer)
            missing = set(boundaries) - {0, *encoded.ends}
            growing, done = GrowingIds(tokenizer, context), list[int]()
            for at in boundaries[1:]:
                if not growing.grow(answer[:at], done):
                    missing.add(at)
                done.append(at)
            if missing or growing.ids != encoded.ids:
                raise MismatchError(
                    f"the tokenizer of {tokenizer.name} splits {probe[:40]!r} differently as the text grows, so it "
                    "cannot be aligned with another; use models that share one tokenizer"
                )


def _opening_table(tokenizers: Sequence[TextTokenizer]) -> Tensor:
    pairs = {pair for one in tokenizers for token in one.token_bytes for pair in pairwise(token or b"")}
    inside = torch.zeros(256, 256, dtype=torch.bool)
    for first, second in pairs:
        inside[first, second] = True
    byte = torch.arange(256)
    letter = ((byte >= 65) & (byte < 91)) | ((byte >= 97) & (byte < 123)) | (byte >= 0x80)
    # First bytes of CJK and Kana, which have no words to keep whole, and of general and full-width punctuation.
    no_word = ((byte >= 0xE2) & (byte <= 0xE9)) | (byte == 0xEF)
    opens = torch.zeros(258, 256, dtype=torch.bool)
    opens[:256] = ~inside & ~(letter.unsqueeze(1) & (letter & ~no_word))
    opens[:, (byte >= 0x80) & (byte < 0xC0)] = False  # within a character
    opens[ANYTHING] = True
    return opens
