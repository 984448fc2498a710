"""Where models with different tokenizers may hand over to each other: boundaries that a text alone decides.

A boundary is a place that lies inside no token of any of the vocabularies, whatever tokens the text was written in: the
two bytes around it stand beside each other in no token. So an author knows from the first byte of its next token alone
whether that token begins a new segment, and segments are what authors decide about in place of tokens. For a segment w
behind a text x the law of author k is

    q_k(w | x) = P_k(t_1 | START) prod_(i >= 2) P_k(t_i) P_k(START | x w),

START being the tokens that begin a segment, and those that end the text. It sums to 1 over all segments, and with START
the whole vocabulary it is the law of a token.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from collm.core.segments import SegmentLaw
from collm.errors import MismatchError
from collm.models.template import Prompt, tokenize
from collm.models.text_tokenizer import GrowingIds, TextTokenizer

ANYTHING = 256
"""Row of the opening table at the beginning of an answer: every token begins a segment."""
ONLY_ENDS = 257
"""Row behind two or more white-space characters: how those are cut into tokens depends on what follows."""
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


@dataclass(frozen=True)
class Alignment:
    """Authors with different tokenizers, the base first.

    Args:
        tokenizers: of each author.

    Attributes:
        opens: whether a segment begins with a byte behind a text, bool, shape (258, 256); a row is the text's last
            byte, `ANYTHING` or `ONLY_ENDS`.

    Raises:
        MismatchError: tokenizers that cannot be aligned.
    """

    tokenizers: Sequence[TextTokenizer]
    opens: Tensor = field(init=False)
    _masks: dict[tuple[int, int, torch.device], Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "opens", _opening_table([one.pairs_inside for one in self.tokenizers]))
        self._check_words()
        for tokenizer in self.tokenizers:
            self._check(tokenizer)

    def row(self, text: bytes) -> int:
        """The row of `opens` behind an answer."""
        if not text:
            return ANYTHING
        if text[-1] >= 0x80 or text[-1:].isspace():
            ending = text[-8:].decode(errors="ignore")[-2:]
            if len(ending) == 2 and ending.isspace():
                return ONLY_ENDS
        return text[-1]

    def is_opening(self, author: int, row: int, token_id: int) -> bool:
        """Whether this token of an author begins a segment there, or ends the text."""
        tokenizer = self.tokenizers[author]
        first = int(tokenizer.first_byte[token_id])
        return token_id in tokenizer.eos_ids or (first >= 0 and bool(self.opens[row, first]))

    def opening_mask(self, author: int, row: int, device: torch.device) -> Tensor:
        """Which tokens of an author begin a segment there, or end the text, bool, shape (V,)."""
        key = author, row, device
        if key not in self._masks:
            self._masks[key] = self.law(author).openings(torch.tensor([row]))[0].to(device)
        return self._masks[key]

    def law(self, author: int) -> SegmentLaw:
        """What begins a segment in an author's tokens."""
        tokenizer = self.tokenizers[author]
        ends = torch.zeros(tokenizer.vocab_size, dtype=torch.bool)
        ends[list(tokenizer.eos_ids)] = True
        return SegmentLaw(self.opens, tokenizer.first_byte, ends)

    def assistant_prompts(self, prompt: Prompt) -> list[list[int]]:
        """A prompt as each assistant reads it: by its own template, in its own tokens.

        Raises:
            RequestError: an assistant's template refuses it.
        """
        base, *assistants = self.tokenizers
        if not isinstance(prompt, str) and all(isinstance(one, int) for one in prompt):
            ids = cast("list[int]", prompt)
            text = str(base.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
            return [list(ids) if one is base else tokenize(one.tokenizer, text) for one in assistants]
        return [one.template.encode_prompt(one.tokenizer, prompt) for one in assistants]

    def boundaries(self, answer: bytes) -> list[int]:
        """Where segments of a whole answer begin: from 0, and with the end of the text for the segment that ends it."""
        opens = self.opens.numpy()
        found = [0] if answer else []
        for at in range(1, len(answer)):
            if opens[answer[at - 1], answer[at]] and self.row(answer[max(at - 8, 0) : at]) != ONLY_ENDS:
                found.append(at)
        return [*found, len(answer)]

    def _check_words(self) -> None:
        letters = torch.tensor(list(string.ascii_letters.encode()))
        if not self.opens[letters, ord(" ")].any():
            names = " and ".join(one.name for one in self.tokenizers)
            raise MismatchError(
                f"the tokenizers of {names} have no place in common between words: one has tokens over several words; "
                "use another pair"
            )

    def _check(self, tokenizer: TextTokenizer) -> None:
        """Probe texts: their bytes come back, and at every boundary a token ends and nothing before it changes.

        Raises:
            MismatchError: naming the probe.
        """
        context = [] if tokenizer.tokenizer.bos_token_id is None else [tokenizer.tokenizer.bos_token_id]
        for probe in _PROBES:
            answer = probe.encode()
            encoded = tokenizer.encode_after(context, probe)
            if encoded is None:
                raise MismatchError(
                    f"the tokenizer of {tokenizer.name} changes texts ({probe[:40]!r} does not come back as it was), "
                    "so other models would read another text; use a tokenizer that keeps texts as they are"
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
                    f"the tokenizer of {tokenizer.name} cuts {probe[:40]!r} differently as it grows, so it cannot be "
                    "aligned with another; use models that share one tokenizer"
                )


def _opening_table(pairs_inside: Sequence[Tensor]) -> Tensor:
    inside = torch.stack(list(pairs_inside)).any(0)
    byte = torch.arange(256)
    letter = ((byte >= 65) & (byte < 91)) | ((byte >= 97) & (byte < 123)) | (byte >= 0x80)
    # First bytes of CJK and Kana, where there are no words to keep whole, and of signs, general or full-width.
    no_word = ((byte >= 0xE2) & (byte <= 0xE9)) | (byte == 0xEF)
    opens = torch.zeros(258, 256, dtype=torch.bool)
    opens[:256] = ~inside & ~(letter.unsqueeze(1) & (letter & ~no_word))
    opens[:, (byte >= 0x80) & (byte < 0xC0)] = False  # within a character
    opens[ANYTHING] = True
    return opens
