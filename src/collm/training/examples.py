"""Examples: token ids with target marks, made from rows."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from collm.core.segments import SegmentLaw
from collm.errors import ConfigError, DataError, RequestError
from collm.text.template import Encoded, PromptTemplate
from collm.training.data import Row

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Segments:
    """Segments of an answer in the tokens of one author.

    Attributes:
        opens: row of the opening table for each token that begins a segment, else -1. The last token may begin a
            segment that is not a target, because the answer was truncated there.
        law: the author's tokens that begin a segment.
        digest: digest of the sequence in the tokens of all authors.
    """

    opens: Sequence[int]
    law: SegmentLaw
    digest: str


@dataclass(frozen=True)
class Example:
    """One training sequence.

    Attributes:
        token_ids: all tokens.
        is_target: whether each token is a training target. The first token has no context, so it is never a target.
        segments: segments of models with different tokenizers; None if every target has a decision of its own.

    Raises:
        DataError: there is no target, or the lists have different lengths.
    """

    token_ids: Sequence[int]
    is_target: Sequence[bool]
    segments: Segments | None = None

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.is_target):
            raise DataError(
                f"an example has {len(self.token_ids)} token ids but {len(self.is_target)} target marks; "
                "expected the same number"
            )
        if not any(self.is_target[1:]):
            raise DataError("an example has no target token after its first token; expected at least one")

    @property
    def num_targets(self) -> int:
        """Number of decisions: target tokens, or segments of them."""
        if self.segments is None:
            return sum(self.is_target[1:])
        opened = zip(self.is_target[1:], self.segments.opens[1:], strict=True)
        return sum(target and row >= 0 for target, row in opened)


class Examples(list[Example]):
    """Examples made from rows, with counts of truncated ones.

    Attributes:
        num_truncated: number of examples truncated at max_length.
        num_dropped: number of truncated examples that were dropped because no target token remained.
        num_without_end: number of other examples truncated within a target, which therefore lack its end.
        assistant_examples: the same examples in the tokens of each assistant, if tokenizers differ.
    """

    def __init__(
        self,
        items: Iterable[Example],
        *,
        num_truncated: int = 0,
        num_dropped: int = 0,
        num_without_end: int = 0,
        assistant_examples: Sequence[Sequence[Example]] = (),
    ) -> None:
        super().__init__(items)
        self.assistant_examples = assistant_examples
        self.num_truncated = num_truncated
        self.num_dropped = num_dropped
        self.num_without_end = num_without_end

    def read_by(self, author: int) -> Sequence[Example]:
        """The examples in the tokens of an author; self if the author shares the base's tokenizer."""
        return self.assistant_examples[author - 1] if author and self.assistant_examples else self

    def part(self, indices: Sequence[int]) -> Examples:
        """The examples with these indices."""
        others = [[each[index] for index in indices] for each in self.assistant_examples]
        return Examples([self[index] for index in indices], assistant_examples=others)


def joined(parts: Sequence[Examples]) -> Examples:
    """Concatenate sets of examples of the same authors."""
    others = zip(*(part.assistant_examples for part in parts), strict=True)
    return Examples(
        [example for part in parts for example in part],
        assistant_examples=[[example for each in by_part for example in each] for by_part in others],
    )


def encode_rows(
    rows: Sequence[Row], template: PromptTemplate, tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> Examples:
    """Render and tokenise rows, truncated on the right at `max_length` tokens.

    A chat becomes one example, or one per assistant turn if its template renders earlier turns differently later on.
    Examples without a target token are dropped, and their number is logged and returned.

    Raises:
        DataError: the template rejects a row, or no target token is left.
        ConfigError: `max_length` is below 2.
    """
    if max_length < 2:
        raise ConfigError(f"max_length is {max_length}, expected at least 2: a token to read and a target")
    encoded = [sequence for row in rows for sequence in encode_row(row, template, tokenizer)]
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
    _report_truncation(examples, encoded, max_length)
    return examples


def encode_row(
    row: Row, template: PromptTemplate, tokenizer: PreTrainedTokenizerBase, *, apart: bool = False, author: str = ""
) -> list[Encoded]:
    """Render and tokenise a row: one sequence, or several of a chat.

    Args:
        apart: as in `PromptTemplate.encode_chat`.
        author: whose tokens these are, for the message of an error.

    Raises:
        DataError: the template rejects the row.
    """
    try:
        if row.messages is None:
            return [template.encode_completion(tokenizer, str(row.prompt), row.completion)]
        return template.encode_chat(tokenizer, row.messages, unlearned=row.unlearned, apart=apart)
    except (DataError, RequestError) as error:
        raise DataError(f"{row.where}: {author}{error}") from error


def _report_special_tokens(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> None:
    """Log how many rows contain the text of a special token, which is tokenised as that token, as in decoding."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    found = Counter(text for row in rows for text in special if text in row.completion)
    if found:
        count = sum(any(text in row.completion for text in special) for row in rows)
        logger.warning(
            "%d of %d rows have the text of a special token in their completion, most often %r; it is tokenised as "
            "that token, and an EOS token ends the completion there",
            count,
            len(rows),
            found.most_common(1)[0][0],
        )


def _report_truncation(examples: Examples, encoded: Sequence[Encoded], max_length: int) -> None:
    if not examples:
        longest = max(([*one.is_target, True].index(True) for one in encoded), default=0)
        raise DataError(
            f"max_length {max_length} leaves no target token in any of {len(encoded)} examples, as their prompts have "
            f"up to {longest} tokens; set max_length above that, or shorten the prompts"
        )
    if examples.num_truncated:
        logger.warning(
            "%d of %d examples exceed max_length %d and were truncated: %d had no target token left and were dropped, "
            "%d lost the token that ends their last target, so they do not train the model to stop",
            examples.num_truncated,
            len(encoded),
            max_length,
            examples.num_dropped,
            examples.num_without_end,
        )


def fingerprint(examples: Iterable[Example]) -> str:
    """SHA-256 of all token ids and target marks in hex, which identifies scored examples."""
    digest = hashlib.sha256()
    for example in examples:
        if example.segments is not None:
            digest.update(example.segments.digest.encode())
            continue
        digest.update(np.int64(len(example.token_ids)).tobytes())
        digest.update(np.asarray(example.token_ids, dtype=np.int64).tobytes())
        digest.update(np.asarray(example.is_target, dtype=np.bool_).tobytes())
    return digest.hexdigest()
