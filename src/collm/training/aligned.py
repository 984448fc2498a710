"""Examples for authors with different tokenizers: the same answers and segments in each author's tokens."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from collm.errors import ConfigError, DataError, RequestError
from collm.text.alignment import Alignment
from collm.text.template import Encoded, PromptTemplate
from collm.text.text_tokenizer import TextTokenizer
from collm.training.data import Row
from collm.training.examples import Example, Examples, Segments, encode_row, encode_rows

_LOG = logging.getLogger(__name__)
_NONE = -1


@dataclass(frozen=True)
class _Answer:
    """One answer within an author's sequence.

    Attributes:
        start: index of its first token.
        text: its text.
        ends: end of each token in bytes.
        finished: whether a token that ends the text follows.
    """

    start: int
    text: bytes
    ends: list[int]
    finished: bool

    def token_at(self, boundary: int, where: str) -> int:
        """Index of the token that begins at a boundary; at the end of the text, of the token that ends it."""
        if boundary == 0:
            return self.start
        place = bisect.bisect_left(self.ends, boundary)
        if place == len(self.ends) or self.ends[place] != boundary:
            raise DataError(f"{where}: no token ends at byte {boundary} of the answer, where a segment begins")
        return self.start + place + 1


def encode(
    rows: Sequence[Row],
    template: PromptTemplate,
    tokenizer: PreTrainedTokenizerBase,
    alignment: Alignment | None,
    *,
    max_length: int,
) -> Examples:
    """Encode rows with `encode_aligned` if there is an alignment, else with `encode_rows`."""
    if alignment is not None:
        return encode_aligned(rows, alignment, max_length=max_length)
    return encode_rows(rows, template, tokenizer, max_length=max_length)


def encode_aligned(rows: Sequence[Row], alignment: Alignment, *, max_length: int) -> Examples:
    """Render and tokenise rows for each author, truncated at a boundary if any author exceeds `max_length` tokens.

    Returns:
        The base's examples. `Examples.read_by` returns the corresponding examples of an assistant.

    Raises:
        DataError: a template rejects a row, an answer is not the same text for all authors, or no target is left.
        ConfigError: `max_length` is below 2.
    """
    if max_length < 2:
        raise ConfigError(f"max_length is {max_length}, expected at least 2: a token to read and a target")
    examples: list[list[Example]] = []
    truncated = dropped = 0
    for row in rows:
        for sequences in zip(*_encoded(row, alignment), strict=True):
            row_examples, was_truncated = _aligned(row, list(sequences), alignment, max_length)
            examples += [row_examples] if row_examples else []
            truncated, dropped = truncated + was_truncated, dropped + (not row_examples)
    if not examples:
        raise DataError(f"max_length {max_length} leaves no target in any of {len(rows)} rows; set max_length higher")
    if truncated:
        _LOG.warning(
            "%d of %d examples exceed max_length %d in the tokens of some author and were truncated: %d had no target "
            "left and were dropped, the others do not train the model to stop",
            truncated,
            len(examples) + dropped,
            max_length,
            dropped,
        )
    by_author = [list(each) for each in zip(*examples, strict=True)]
    return Examples(
        by_author[0],
        num_truncated=truncated,
        num_dropped=dropped,
        num_without_end=truncated - dropped,
        assistant_examples=by_author[1:],
    )


def aligned_example(alignment: Alignment, prompts: Sequence[list[int]], answer: str, *, end: bool = True) -> Examples:
    """Encode one answer after a prompt for each author.

    Args:
        prompts: the prompt in each author's tokens.
        end: whether the end of the text is a target.

    Raises:
        RequestError: a vocabulary cannot spell the answer.
    """
    sequences = []
    for tokenizer, prompt in zip(alignment.tokenizers, prompts, strict=True):
        encoded = tokenizer.encode_after(prompt, answer)
        if encoded is None:
            raise RequestError(f"the tokenizer of {tokenizer.name} cannot spell {answer!r:.60}")
        ids = [*encoded.ids, min(tokenizer.eos_ids)]
        sequences.append(Encoded([*prompt, *ids], [False] * len(prompt) + [True] * len(ids)))
    longest = max(len(one.token_ids) for one in sequences)
    examples, _ = _aligned(None, sequences, alignment, longest, unfinished=not end)
    return Examples(examples[:1], assistant_examples=[[one] for one in examples[1:]])


def _encoded(row: Row, alignment: Alignment) -> list[list[Encoded]]:
    """Each author's sequences of a row, the same number for all authors."""
    for apart in (False, True):
        encoded = [
            encode_row(row, author.template, author.tokenizer, apart=apart, author=f"{author.name}: ")
            for author in alignment.tokenizers
        ]
        if len({len(sequences) for sequences in encoded}) == 1:
            break
    return encoded


@dataclass(frozen=True)
class _KeptSegments:
    """The segments of an answer that remain after truncation.

    Attributes:
        tokens: for each author, index of the token that begins each segment.
        rows: row of the opening table of each segment.
        whole: whether the answer is complete. If not, only the beginning of the last segment is used.
    """

    tokens: list[list[int]]
    rows: list[int]
    whole: bool


def _aligned(
    row: Row | None, sequences: list[Encoded], alignment: Alignment, max_length: int, *, unfinished: bool = False
) -> tuple[list[Example], bool]:
    """An example for each author (none if no target is left), and whether it was truncated."""
    where = "the answer" if row is None else row.where
    authors = zip(alignment.tokenizers, sequences, strict=True)
    answers = [_answers(author, sequence, where) for author, sequence in authors]
    for author, theirs in zip(alignment.tokenizers[1:], answers[1:], strict=True):
        if [one.text for one in theirs] != [one.text for one in answers[0]]:
            raise DataError(
                f"{where}: {author.name} reads another answer than the base; chat templates must not change the "
                "assistant's messages"
            )
    spans = list[_KeptSegments]()
    for versions in zip(*answers, strict=True):
        span = _kept_segments(list(versions), alignment, max_length, where, unfinished=unfinished)
        spans += [] if span is None else [span]
        if span is None or not span.whole:
            break
    if not spans:
        return [], True
    digest = hashlib.sha256()
    for number, sequence in enumerate(sequences):
        kept = sequence.token_ids[: spans[-1].tokens[number][-1] + 1]
        digest.update(np.asarray(kept, dtype=np.int64).tobytes())
    examples = [
        _example(sequence, spans, number, alignment, digest.hexdigest()) for number, sequence in enumerate(sequences)
    ]
    return examples, len(spans) < len(answers[0]) or not (spans[-1].whole or unfinished)


def _kept_segments(
    answers: list[_Answer], alignment: Alignment, max_length: int, where: str, *, unfinished: bool
) -> _KeptSegments | None:
    """The segments of an answer that fit `max_length` for all authors; None if there is none."""
    text = answers[0].text
    boundaries = alignment.boundaries(text)
    tokens = [[answer.token_at(at, where) for at in boundaries] for answer in answers]
    count = min(sum(token < max_length for token in each) for each in tokens)
    whole = count == len(boundaries) and answers[0].finished and not unfinished
    if not whole and count < 2:
        return None
    rows = [alignment.row(text[:at]) for at in boundaries[:count]]
    return _KeptSegments([each[:count] for each in tokens], rows, whole)


def _example(sequence: Encoded, spans: list[_KeptSegments], author: int, alignment: Alignment, digest: str) -> Example:
    length = spans[-1].tokens[author][-1] + 1
    opens, is_target = [_NONE] * length, [False] * length
    for span in spans:
        tokens = span.tokens[author]
        for token, row in zip(tokens, span.rows, strict=True):
            opens[token] = row
        for token in range(tokens[0], tokens[-1] + span.whole):
            is_target[token] = True
    return Example(sequence.token_ids[:length], is_target, Segments(opens, alignment.law(author), digest))


def _answers(author: TextTokenizer, sequence: Encoded, where: str) -> list[_Answer]:
    """The runs of target tokens. Each ends with a token that ends the text, unless the row lacks one."""
    answers, start = list[_Answer](), 0
    for learned, run in itertools.groupby(sequence.is_target):
        end = start + len(list(run))
        if learned:
            finished = sequence.token_ids[end - 1] in author.eos_ids
            ids = sequence.token_ids[start : end - finished]
            text = author.spell(ids)
            if text is None:
                raise DataError(
                    f"{where}: the answer has a special token of {author.name}, which other models cannot read; "
                    "remove it"
                )
            added = author.adds_space(sequence.token_ids[:start]) and text.startswith(b" ")
            answers.append(_Answer(start, text[added:], author.ends(ids, -added), finished))
        start = end
    return answers
