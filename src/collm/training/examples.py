"""Examples: token ids with their targets, as the models read them."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from transformers import PreTrainedTokenizerBase

from collm.core.segments import SegmentLaw
from collm.errors import ConfigError, DataError, RequestError
from collm.models.template import Encoded, PromptTemplate
from collm.training.data import Row

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Segments:
    """How an answer is cut into segments, in the tokens of one author.

    Attributes:
        opens: per token the row of the opening table at which it begins a segment, else -1. The last token may begin
            one that is no target: the answer was cut there.
        law: of the author.
        digest: of the sequence in the tokens of all authors.
    """

    opens: Sequence[int]
    law: SegmentLaw
    digest: str


@dataclass(frozen=True)
class Example:
    """One sequence.

    Attributes:
        token_ids: all tokens.
        is_target: per token, whether it is to be learned. The first token has no context, so it is never a target.
        segments: where models with different tokenizers decide; None where every target is decided about.

    Raises:
        DataError: no target, or lists of different lengths.
    """

    token_ids: Sequence[int]
    is_target: Sequence[bool]
    segments: Segments | None = None

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.is_target):
            raise DataError(
                f"an example has {len(self.token_ids)} token ids but {len(self.is_target)} target marks; give one each"
            )
        if not any(self.is_target[1:]):
            raise DataError("an example has no target token after its first token; expected at least one")

    @property
    def num_targets(self) -> int:
        """What is decided about: target tokens, or segments of them."""
        if self.segments is None:
            return sum(self.is_target[1:])
        opened = zip(self.is_target[1:], self.segments.opens[1:], strict=True)
        return sum(target and row >= 0 for target, row in opened)


class Examples(Sequence[Example]):
    """Examples made from rows, and what did not fit.

    Attributes:
        num_truncated: how many were cut at max_length.
        num_dropped: how many were left out because the cut left no target token.
        num_without_end: how many others were cut inside a target, so that they do not show where it ends.
    """

    def __init__(
        self,
        items: Iterable[Example],
        *,
        num_truncated: int = 0,
        num_dropped: int = 0,
        num_without_end: int = 0,
        of_assistants: Sequence[Sequence[Example]] = (),
    ) -> None:
        self._items = list(items)
        self._of_assistants = of_assistants
        self.num_truncated = num_truncated
        self.num_dropped = num_dropped
        self.num_without_end = num_without_end

    def read_by(self, author: int) -> Sequence[Example]:
        """The same rows in the tokens of an author: these, unless it has another tokenizer."""
        return self._of_assistants[author - 1] if author and self._of_assistants else self

    def part(self, indices: Sequence[int]) -> Examples:
        """Some of them."""
        others = [[each[index] for index in indices] for each in self._of_assistants]
        return Examples([self._items[index] for index in indices], of_assistants=others)

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        return self._items[index]

    def __iter__(self) -> Iterator[Example]:
        return iter(self._items)


def joined(parts: Sequence[Examples]) -> Examples:
    """One set of several; each with the same authors."""
    others = zip(*(part._of_assistants for part in parts), strict=True)
    return Examples(
        [example for part in parts for example in part],
        of_assistants=[[example for each in of_one for example in each] for of_one in others],
    )


def encode_rows(
    rows: Sequence[Row], template: PromptTemplate, tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> Examples:
    """Render and tokenise rows; what exceeds `max_length` tokens is cut from the right.

    A chat whose turns one sequence cannot show as decoding would see them gives one example per assistant turn.
    Examples left without a target token are dropped; their number is logged and returned.

    Raises:
        DataError: a row the template refuses, or no target token in the whole set.
        ConfigError: max_length below 2.
    """
    if max_length < 2:
        raise ConfigError(f"max_length is {max_length}, expected at least 2: a token to read and one to learn")
    encoded = [sequence for row in rows for sequence in _encode_row(row, template, tokenizer)]
    _report_special_tokens(rows, tokenizer)
    kept = [one for one in encoded if any(one.is_target[1:max_length])]
    examples = Examples(
        [Example(one.token_ids[:max_length], one.is_target[:max_length]) for one in kept],
        num_truncated=sum(len(one.token_ids) > max_length for one in encoded),
        num_dropped=len(encoded) - len(kept),
        num_without_end=sum(
            all(one.is_target[max_length - 1 : max_length + 1]) for one in kept if len(one.token_ids) > max_length
        ),
    )
    _report(examples, encoded, max_length)
    return examples


def _encode_row(row: Row, template: PromptTemplate, tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    try:
        if row.messages is not None:
            return template.encode_chat(tokenizer, row.messages, unlearned=row.unlearned)
        assert isinstance(row.prompt, str)
        return [template.encode_completion(tokenizer, row.prompt, row.completion)]
    except (DataError, RequestError) as error:
        raise DataError(f"{row.where}: {error}") from error


def _report_special_tokens(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> None:
    """Say how many rows write out a special token: it is tokenised as that token, as in decoding."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    found = Counter(text for row in rows for text in special if text in row.completion)
    if found:
        count = sum(any(text in row.completion for text in special) for row in rows)
        logger.warning(
            "%d of %d rows have the text of a special token in their completion, most often %r; it is learned as that "
            "token, and a token that ends texts ends the completion there",
            count,
            len(rows),
            found.most_common(1)[0][0],
        )


def _report(examples: Examples, encoded: Sequence[Encoded], max_length: int) -> None:
    if not examples:
        longest = max((_prompt_length(one) for one in encoded), default=0)
        raise DataError(
            f"max_length {max_length} leaves no target token in any of {len(encoded)} examples, whose prompts have "
            f"up to {longest} tokens; set max_length above that, or shorten the prompts"
        )
    if examples.num_truncated:
        logger.warning(
            "%d of %d examples exceed max_length %d and were cut: %d had no target token left and were dropped, "
            "%d lost the token that ends their last target, so they do not teach when to stop",
            examples.num_truncated,
            len(encoded),
            max_length,
            examples.num_dropped,
            examples.num_without_end,
        )


def _prompt_length(encoded: Encoded) -> int:
    return encoded.is_target.index(True) if True in encoded.is_target else len(encoded.token_ids)


def fingerprint(examples: Iterable[Example]) -> str:
    """SHA-256 over all token ids and target marks, in hex: the identity of what models were scored on."""
    digest = hashlib.sha256()
    for example in examples:
        if example.segments is not None:
            digest.update(example.segments.digest.encode())
            continue
        digest.update(np.int64(len(example.token_ids)).tobytes())
        digest.update(np.asarray(example.token_ids, dtype=np.int64).tobytes())
        digest.update(np.asarray(example.is_target, dtype=np.bool_).tobytes())
    return digest.hexdigest()
