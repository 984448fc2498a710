"""Rows become examples: token ids with target marks, for each author if tokenizers differ. They become tensors."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from collm.core.segments import SegmentLaw
from collm.errors import ConfigError, DataError, RequestError
from collm.text.alignment import Alignment
from collm.text.template import Encoded, PromptTemplate
from collm.text.text_tokenizer import TextTokenizer
from collm.training.data import Row

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """One training sequence. With `law`, models have different tokenizers, and a decision is about a segment.

    Attributes:
        token_ids: all tokens.
        is_target: whether each token is a training target. The first token has no context, so it is never a target.
        opens: row of the opening table for each token that begins a segment, else -1. Where the answer was truncated,
            the last token begins a segment that is not a target.
        law: the author's tokens that begin a segment.
        digest: digest of the sequence in the tokens of all authors.
    """

    token_ids: Sequence[int]
    is_target: Sequence[bool]
    opens: Sequence[int] = ()
    law: SegmentLaw | None = None
    digest: str = ""

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.is_target):
            counts = f"{len(self.token_ids)} token ids but {len(self.is_target)} target marks"
            raise DataError(f"an example has {counts}; expected the same number")
        if not any(self.is_target[1:]):
            raise DataError("an example has no target token after its first token; expected at least one")

    @property
    def num_targets(self) -> int:
        """Number of decisions: target tokens, or segments of them."""
        if self.law is None:
            return sum(self.is_target[1:])
        return sum(target and row >= 0 for target, row in zip(self.is_target[1:], self.opens[1:], strict=True))


class Examples(list[Example]):
    """The base's examples, with `assistant_examples`, the same in each assistant's tokens, if tokenizers differ."""

    def __init__(self, items: Iterable[Example], assistant_examples: Sequence[Sequence[Example]] = ()) -> None:
        super().__init__(items)
        self.assistant_examples = assistant_examples

    def read_by(self, author: int) -> Sequence[Example]:
        """The examples in the tokens of an author; self if the author shares the base's tokenizer."""
        return self.assistant_examples[author - 1] if author and self.assistant_examples else self

    def part(self, indices: Sequence[int]) -> Examples:
        """The examples with these indices."""
        others = [[each[index] for index in indices] for each in self.assistant_examples]
        return Examples([self[index] for index in indices], others)


def joined(parts: Sequence[Examples]) -> Examples:
    """Concatenate sets of examples of the same authors."""
    others = zip(*(part.assistant_examples for part in parts), strict=True)
    return Examples(chain.from_iterable(parts), [[*chain.from_iterable(by_part)] for by_part in others])


def fingerprint(examples: Iterable[Example]) -> str:
    """SHA-256 of all token ids and target marks in hex, which identifies scored examples."""
    digest = hashlib.sha256()
    for example in examples:
        if example.law is not None:
            digest.update(example.digest.encode())
        else:
            digest.update(np.asarray([len(example.token_ids), *example.token_ids], dtype=np.int64).tobytes())
            digest.update(np.asarray(example.is_target, dtype=np.bool_).tobytes())
    return digest.hexdigest()


def encode(
    rows: Sequence[Row],
    template: PromptTemplate,
    tokenizer: PreTrainedTokenizerBase,
    alignment: Alignment | None = None,
    *,
    max_length: int,
) -> Examples:
    """Render and tokenise rows, truncated on the right at `max_length` tokens.

    A chat becomes one example, or one per assistant turn if its template renders earlier turns differently later on.
    With an alignment, a row is encoded for each author, and truncated at a boundary if any author exceeds `max_length`.
    Examples without a target token are dropped. A warning gives the numbers of truncated and dropped examples.
    """
    if max_length < 2:
        raise ConfigError(f"max_length is {max_length}, expected at least 2: a token to read and a target")
    named = [] if alignment is None else alignment.tokenizers
    authors = [(one.template, one.tokenizer, f"{one.name}: ") for one in named] or [(template, tokenizer, "")]
    encoded = [(row, each) for row in rows for each in _encode_row(row, authors)]
    _report_special_tokens(rows, tokenizer)
    made = []
    for row, each in encoded:
        made.append(_aligned(each, alignment, max_length, row.where) if alignment else _truncated(each[0], max_length))
    _report_truncation([each for _, each in encoded], made, max_length)
    base, *assistants = (list(each) for each in zip(*(examples for examples, _ in made if examples), strict=True))
    return Examples(base, assistants)


def aligned_example(alignment: Alignment, prompts: Sequence[list[int]], answer: str, *, end: bool = True) -> Examples:
    """Encode one answer after a prompt in each author's tokens. `end` makes the end of the text a target."""
    sequences = []
    for tokenizer, prompt in zip(alignment.tokenizers, prompts, strict=True):
        encoded = tokenizer.encode_after(prompt, answer)
        if encoded is None:
            raise RequestError(f"the tokenizer of {tokenizer.name} has no tokens for {answer!r:.60}")
        ids = [*encoded.ids, min(tokenizer.eos_ids)]
        sequences.append(Encoded([*prompt, *ids], [False] * len(prompt) + [True] * len(ids)))
    longest = max(len(one.token_ids) for one in sequences)
    (base, *assistants), _ = _aligned(sequences, alignment, longest, "the answer", end=end)
    return Examples([base], [[one] for one in assistants])


def windows(examples: Examples, max_length: int) -> list[Examples]:
    """Divide one answer in windows, in which each author reads at most `max_length` tokens.

    Each segment is a target of one window, after as much of the text before it as fits.

    Raises:
        RequestError: a segment does not fit.
    """
    authors = [own for (own,) in (examples, *examples.assistant_examples)]
    starts = [[place for place, row in enumerate(one.opens) if row >= 0] for one in authors]
    found, first, end = list[Examples](), 0, len(starts[0]) - 1
    while first < end:
        fits = [n for n in range(first + 1, end + 1) if all(at[n] - at[first] < max_length for at in starts)]
        if not fits:
            longest = max(at[first + 1] - at[first] for at in starts)
            raise RequestError(
                f"a segment has {longest} tokens, expected fewer than {max_length}, which the models read"
            )
        last = fits[-1]
        base, *assistants = (
            _window(one, at[first], at[last], max_length) for one, at in zip(authors, starts, strict=True)
        )
        found.append(Examples([base], [[one] for one in assistants]))
        first = last
    return found


def _window(example: Example, begin: int, end: int, max_length: int) -> Example:
    """The targets from `begin` to before `end`, after what precedes, and the token `end`, which begins a segment."""
    places = range(max(end - max_length, 0), end + 1)
    return replace(
        example,
        token_ids=[example.token_ids[place] for place in places],
        is_target=[begin <= place < end for place in places],
        opens=[example.opens[place] if begin <= place else -1 for place in places],
    )


def _encode_row(
    row: Row, authors: Sequence[tuple[PromptTemplate, PreTrainedTokenizerBase, str]]
) -> list[list[Encoded]]:
    """The sequences of a row, each for all authors: one, or several of a chat whose turns cannot be in one for all."""
    for apart in (False, True):
        by_author = []
        for template, tokenizer, name in authors:
            try:
                if row.messages is None:
                    encoded = [template.encode_completion(tokenizer, str(row.prompt), row.completion)]
                else:
                    encoded = template.encode_chat(tokenizer, row.messages, unlearned=row.unlearned, apart=apart)
            except (DataError, RequestError) as error:
                raise DataError(f"{row.where}: {name}{error}") from error
            by_author.append(encoded)
        if len({len(encoded) for encoded in by_author}) == 1:
            break
    return [list(each) for each in zip(*by_author, strict=True)]


def _report_special_tokens(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> None:
    """Log how many rows contain the text of a special token, which is tokenised as that token, as in decoding."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    found = [texts for row in rows if (texts := [text for text in special if text in row.completion])]
    if found:
        [(most, _)] = Counter(chain.from_iterable(found)).most_common(1)
        what = f"{len(found)} of {len(rows)} rows have the text of a special token in their completion"
        effect = "it is tokenised as that token, and an EOS token ends the completion there"
        logger.warning(f"{what}, most often {most!r}; {effect}")


def _report_truncation(
    encoded: Sequence[Sequence[Encoded]], made: Sequence[tuple[list[Example], bool]], max_length: int
) -> None:
    kept = sum(bool(examples) for examples, _ in made)
    if not kept:
        longest = max(([*one.is_target, True].index(True) for each in encoded for one in each), default=0)
        prompts = f"as their prompts have up to {longest} tokens; set max_length above that, or shorten the prompts"
        raise DataError(f"max_length {max_length} leaves no target token in any of {len(made)} examples, {prompts}")
    truncated = sum(max(len(one.token_ids) for one in each) > max_length for each in encoded)
    if truncated:
        without_end = sum(bool(examples) and not ends for examples, ends in made)
        what = f"{truncated} of {len(made)} examples exceed max_length {max_length} and were truncated"
        dropped = f"{len(made) - kept} had no target token left and were dropped"
        cut = f"{without_end} lost the token that ends their last target, so they do not train the model to stop"
        logger.warning(f"{what}: {dropped}, {cut}")


def _truncated(sequence: Encoded, max_length: int) -> tuple[list[Example], bool]:
    """The example, none if no target is left, and whether it has the end of its last target."""
    is_target = sequence.is_target[:max_length]
    made = [Example(sequence.token_ids[:max_length], is_target)] if any(is_target[1:]) else []
    return made, not (len(sequence.is_target) > max_length and all(sequence.is_target[max_length - 1 : max_length + 1]))


class _Answer(NamedTuple):
    """One answer within an author's sequence, with the token that begins at a byte or, at the end, ends the text."""

    text: bytes
    token_at: Mapping[int, int]
    finished: bool  # whether it has that token


def _aligned(
    sequences: Sequence[Encoded], alignment: Alignment, max_length: int, where: str, *, end: bool = True
) -> tuple[list[Example], bool]:
    """An example for each author, none if no target is left, and whether all answers are complete."""
    by_author = [_answers(*each, where) for each in zip(alignment.tokenizers, sequences, strict=True)]
    for author, theirs in zip(alignment.tokenizers, by_author, strict=True):
        if [one.text for one in theirs] != [one.text for one in by_author[0]]:
            raise DataError(f"{where}: {author.name} reads another answer than the base; a chat template changed it")
    opens: list[dict[int, int]] = [{} for _ in sequences]
    targets: list[set[int]] = [set() for _ in sequences]
    complete = True
    for versions in zip(*by_author, strict=True):
        text = versions[0].text
        boundaries = alignment.boundaries(text)
        try:
            tokens = [[answer.token_at[at] for at in boundaries] for answer in versions]
        except KeyError as at:
            raise DataError(f"{where}: no token ends at byte {at} of the answer, where a segment begins") from None
        count = min(sum(token < max_length for token in each) for each in tokens)
        complete = count == len(boundaries) and versions[0].finished and end
        if not complete and count < 2:
            break
        rows = [alignment.row(text[:at]) for at in boundaries[:count]]
        for number, each in enumerate(tokens):
            opens[number] |= zip(each, rows, strict=False)
            targets[number].update(range(each[0], each[count - 1] + complete))
        if not complete:  # only the beginning of the last segment is used
            break
    if not opens[0]:
        return [], False
    lengths = [max(each) + 1 for each in opens]
    digest = hashlib.sha256()
    for sequence, length in zip(sequences, lengths, strict=True):
        digest.update(np.asarray(sequence.token_ids[:length], dtype=np.int64).tobytes())
    examples = []
    for number, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
        rows = [opens[number].get(token, -1) for token in range(length)]
        is_target = [token in targets[number] for token in range(length)]
        law, name = alignment.law(number), digest.hexdigest()
        examples.append(Example(sequence.token_ids[:length], is_target, rows, law, name))
    return examples, complete


def _answers(author: TextTokenizer, sequence: Encoded, where: str) -> list[_Answer]:
    """The runs of target tokens. Each ends with a token that ends the text, unless the row lacks one."""
    answers, start = list[_Answer](), 0
    for learned, run in groupby(sequence.is_target):
        end = start + len(list(run))
        if learned:
            finished = sequence.token_ids[end - 1] in author.eos_ids
            ids = sequence.token_ids[start : end - finished]
            text = author.spell(ids)
            if text is None:
                raise DataError(
                    f"{where}: the answer has a special token of {author.name}, unknown to other models; remove it"
                )
            added = author.adds_space(sequence.token_ids[:start]) and text.startswith(b" ")
            ends = reversed(list(enumerate(author.ends(ids, -added), start + 1)))  # the first token to end at a byte
            answers.append(_Answer(text[added:], {**{byte: token for token, byte in ends}, 0: start}, finished))
        start = end
    return answers


def shift(example: Example) -> dict[str, Tensor]:
    """An example of N tokens as N - 1 predictions. Values at position t belong to the token after position t.

    This is the only shift: all scoring and training reads examples through it.

    Returns:
        Shape (N - 1,) each. input_ids, gold: input tokens and gold tokens, int64. target_mask: whether an author is
        chosen for the gold token or for the segment it begins, bool. For models with different tokenizers also scored,
        whether the gold token is a target, bool, and rows, the row of the opening table if the gold token begins a
        segment, else -1, int64.
    """
    token_ids = torch.tensor(example.token_ids, dtype=torch.int64)
    targets = torch.tensor(example.is_target, dtype=torch.bool)[1:]
    shifted = {"input_ids": token_ids[:-1], "gold": token_ids[1:], "target_mask": targets}
    if example.law is not None:
        rows = torch.tensor(example.opens, dtype=torch.int64)[1:]
        shifted |= {"target_mask": targets & (rows >= 0), "scored": targets, "rows": rows}
    return shifted


def collate(items: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Join shifted examples and their scores to a batch (B, T, ...), padded on the right with tokens 0, unattended."""
    items = [{**item, "attention_mask": torch.ones_like(item["input_ids"])} for item in items]
    padding = dict.fromkeys(items[0], 0) | {"rows": -1}
    return {name: pad_sequence([item[name] for item in items], True, padding[name]) for name in items[0]}


def collate_padding_free(items: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Join examples to one row with position ids that restart at each example, without an attention mask."""
    items = [{**item, "position_ids": torch.arange(len(item["input_ids"]))} for item in items]
    return {name: torch.cat([item[name] for item in items]).unsqueeze(0) for name in items[0]}


@torch.compiler.disable  # type: ignore[untyped-decorator]
def scatter(values: Tensor, mask: Tensor) -> Tensor:
    """Values of N target positions, shape (N, ...), at their places in the mask's shape, with 0 elsewhere."""
    scattered = values.new_zeros(*mask.shape, *values.shape[1:])
    scattered[mask] = values
    return scattered


def batch_tokens_on(device: torch.device) -> int:
    """Number of tokens per batch that uses a device well. On a CPU, larger batches do not fit its caches."""
    return 512 if device.type == "cpu" else 16384


def longest_first(lengths: Sequence[int]) -> list[int]:
    """Indices by decreasing length."""
    return sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))


def batches_by_length(lengths: Sequence[int], max_batch_tokens: int) -> list[list[int]]:
    """Group indices into batches of at most `max_batch_tokens` tokens with padding (or one example), longest first."""
    batches: list[list[int]] = []
    for index in longest_first(lengths):
        if not batches or lengths[batches[-1][0]] * (len(batches[-1]) + 1) > max_batch_tokens:
            batches.append([])
        batches[-1].append(index)
    return batches
