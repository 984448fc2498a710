"""Rows as examples of authors that do not share a tokenizer: the same answers and segments, each in its own tokens."""

from __future__ import annotations

import bisect
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from collm.errors import ConfigError, DataError, RequestError
from collm.models.alignment import Alignment
from collm.models.template import Encoded, PromptTemplate
from collm.models.text_tokenizer import TextTokenizer
from collm.training.data import Row
from collm.training.examples import Example, Examples, Segments, encode_rows

_LOG = logging.getLogger(__name__)
_NONE = -1


@dataclass(frozen=True)
class _Answer:
    """One answer within a sequence of an author.

    Attributes:
        start: its first token.
        text: what its tokens spell.
        ends: where each token ends, in bytes.
        finished: a token that ends the text follows.
    """

    start: int
    text: bytes
    ends: list[int]
    finished: bool

    def token_at(self, boundary: int) -> int:
        """The token that begins at a boundary: at the end of the text the one that ends it.

        Raises:
            ValueError: none does.
        """
        if boundary == 0:
            return self.start
        place = bisect.bisect_left(self.ends, boundary)
        if place == len(self.ends) or self.ends[place] != boundary:
            raise ValueError(boundary)
        return self.start + place + 1


def encode(
    rows: Sequence[Row],
    template: PromptTemplate,
    tokenizer: PreTrainedTokenizerBase,
    alignment: Alignment | None,
    *,
    max_length: int,
) -> Examples:
    """Rows for the authors of a collaboration, whether or not they share the base's tokenizer (`encode_rows`)."""
    if alignment is not None:
        return encode_aligned(rows, alignment, max_length=max_length)
    return encode_rows(rows, template, tokenizer, max_length=max_length)


def encode_aligned(rows: Sequence[Row], alignment: Alignment, *, max_length: int) -> Examples:
    """Render and tokenise rows for each author; what exceeds `max_length` tokens of any author is cut at a boundary.

    Returns:
        The base's examples; `Examples.read_by` gives those of the assistants, one for each of the base's.

    Raises:
        DataError: a row that a template refuses or whose answer is not the same text for all authors, or nothing to
            learn.
        ConfigError: max_length below 2.
    """
    if max_length < 2:
        raise ConfigError(f"max_length is {max_length}, expected at least 2: a token to read and one to learn")
    examples: list[list[Example]] = []
    cut = dropped = 0
    for row in rows:
        for sequences in zip(*_encoded(row, alignment), strict=True):
            made, was_cut = _aligned(row, list(sequences), alignment, max_length)
            examples += [made] if made else []
            cut, dropped = cut + was_cut, dropped + (not made)
    if not examples:
        raise DataError(
            f"max_length {max_length} leaves nothing to learn in any of {len(rows)} rows; set max_length higher"
        )
    if cut:
        _LOG.warning(
            "%d of %d examples exceed max_length %d in the tokens of some author and were cut: %d had nothing left to "
            "learn and were dropped, the others do not teach when to stop",
            cut,
            len(examples) + dropped,
            max_length,
            dropped,
        )
    by_author = [list(each) for each in zip(*examples, strict=True)]
    return Examples(
        by_author[0], num_truncated=cut, num_dropped=dropped, num_without_end=cut - dropped, of_assistants=by_author[1:]
    )


def aligned_example(alignment: Alignment, prompts: Sequence[list[int]], answer: str, *, end: bool = True) -> Examples:
    """One answer behind a prompt, for each author.

    Args:
        prompts: of each author, in its tokens.
        end: whether the end of the text is to be told.

    Raises:
        RequestError: a vocabulary that cannot spell the answer.
    """
    sequences = []
    for tokenizer, prompt in zip(alignment.tokenizers, prompts, strict=True):
        encoded = tokenizer.encode_after(prompt, answer)
        if encoded is None:
            raise RequestError(f"the tokenizer of {tokenizer.name} cannot spell {answer!r:.60}")
        ids = [*encoded.ids, min(tokenizer.eos_ids)]
        sequences.append(Encoded([*prompt, *ids], [False] * len(prompt) + [True] * len(ids)))
    longest = max(len(one.token_ids) for one in sequences)
    made, _ = _aligned(None, sequences, alignment, longest, unfinished=not end)
    return Examples(made[:1], of_assistants=[[one] for one in made[1:]])


def _encoded(row: Row, alignment: Alignment) -> list[list[Encoded]]:
    """For each author the sequences of a row, as many of each."""
    made = [_encode(row, tokenizer, apart=False) for tokenizer in alignment.tokenizers]
    if len({len(sequences) for sequences in made}) > 1:
        made = [_encode(row, tokenizer, apart=True) for tokenizer in alignment.tokenizers]
    return made


def _encode(row: Row, author: TextTokenizer, *, apart: bool) -> list[Encoded]:
    try:
        if row.messages is None:
            return [author.template.encode_completion(author.tokenizer, str(row.prompt), row.completion)]
        return author.template.encode_chat(author.tokenizer, row.messages, unlearned=row.unlearned, apart=apart)
    except (DataError, RequestError) as error:
        raise DataError(f"{row.where}: {author.name}: {error}") from error


@dataclass(frozen=True)
class _Span:
    """The segments of one answer that are kept.

    Attributes:
        tokens: for each author the token that begins each of them.
        rows: of the opening table there.
        whole: the answer was not cut; else the last segment is there for where it begins alone.
    """

    tokens: list[list[int]]
    rows: list[int]
    whole: bool


def _aligned(
    row: Row | None, sequences: list[Encoded], alignment: Alignment, max_length: int, *, unfinished: bool = False
) -> tuple[list[Example], bool]:
    """An example for each author, and whether something was cut; no example if nothing is left."""
    where = "the answer" if row is None else row.where
    authors = zip(alignment.tokenizers, sequences, strict=True)
    answers = [_answers(author, sequence, where) for author, sequence in authors]
    for author, theirs in zip(alignment.tokenizers[1:], answers[1:], strict=True):
        if [one.text for one in theirs] != [one.text for one in answers[0]]:
            raise DataError(
                f"{where}: {author.name} reads another answer than the base; chat templates must leave the "
                "assistant's messages as they are"
            )
    spans = list[_Span]()
    for of_all in zip(*answers, strict=True):
        span = _span(list(of_all), alignment, max_length, where, unfinished=unfinished)
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


def _span(
    answers: list[_Answer], alignment: Alignment, max_length: int, where: str, *, unfinished: bool
) -> _Span | None:
    """The segments of an answer that all authors can read; None if there is none."""
    text = answers[0].text
    boundaries = alignment.boundaries(text)
    tokens = [[_token_at(answer, at, where) for at in boundaries] for answer in answers]
    count = min(sum(token < max_length for token in each) for each in tokens)
    whole = count == len(boundaries) and answers[0].finished and not unfinished
    if not whole and count < 2:
        return None
    rows = [alignment.row(text[:at]) for at in boundaries[:count]]
    return _Span([each[:count] for each in tokens], rows, whole)


def _example(sequence: Encoded, spans: list[_Span], author: int, alignment: Alignment, digest: str) -> Example:
    length = spans[-1].tokens[author][-1] + 1
    opens, is_target = [_NONE] * length, [False] * length
    for span in spans:
        tokens = span.tokens[author]
        for token, row in zip(tokens, span.rows, strict=True):
            opens[token] = row
        for token in range(tokens[0], tokens[-1] + span.whole):
            is_target[token] = True
    return Example(sequence.token_ids[:length], is_target, Segments(opens, alignment.law(author), digest))


def _token_at(answer: _Answer, boundary: int, where: str) -> int:
    try:
        return answer.token_at(boundary)
    except ValueError:
        raise DataError(f"{where}: no token ends at byte {boundary} of the answer, where segments begin") from None


def _answers(author: TextTokenizer, sequence: Encoded, where: str) -> list[_Answer]:
    """The stretches of targets; each ends with a token that ends the text, unless the row lacks one."""
    answers, start = list[_Answer](), None
    for place, target in enumerate([*sequence.is_target, False]):
        if target and start is None:
            start = place
        if not target and start is not None:
            answers.append(_answer(author, sequence.token_ids[:place], start, where))
            start = None
    return answers


def _answer(author: TextTokenizer, token_ids: list[int], start: int, where: str) -> _Answer:
    finished = token_ids[-1] in author.eos_ids
    ids = token_ids[start:-1] if finished else token_ids[start:]
    text = author.spell(ids)
    if text is None:
        raise DataError(
            f"{where}: the answer holds a special token of {author.name}, which no other model can read; take it out"
        )
    added = author.adds_space(token_ids[:start]) and text.startswith(b" ")
    return _Answer(start, text[added:], author.ends(ids, -added), finished)
