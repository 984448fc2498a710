"""Conversion of examples to tensors, and of hidden states to log-probabilities at target positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from collm.core.segments import (
    SegmentLaw,
    Spans,
    TokenTerms,
    segment_logprobs,
    segments_correct,
    stop_logprobs,
    token_terms,
)
from collm.models.language_model import LanguageModel
from collm.training.examples import Example

MAX_LOGITS = 2**25
"""Largest number of logits in memory at once; 128 MB in fp32."""


@dataclass(frozen=True)
class Shifted:
    """An example of N tokens as N - 1 predictions. Values at position t belong to the token after position t.

    Attributes:
        input_ids: input tokens, int64, shape (N - 1,).
        gold: gold tokens, int64, shape (N - 1,).
        mask: whether an author is chosen for the gold token or for the segment it begins, bool, shape (N - 1,).
        scored: whether the gold token is a target, bool, shape (N - 1,).
        rows: row of the opening table if the gold token begins a segment, else -1, int64, shape (N - 1,); None for
            models that share a tokenizer, for which `scored` equals `mask`.
    """

    input_ids: Tensor
    gold: Tensor
    mask: Tensor
    scored: Tensor
    rows: Tensor | None = None


def shift(example: Example) -> Shifted:
    """Shift an example by one token. All scoring and training reads examples through this function."""
    token_ids = torch.tensor(example.token_ids, dtype=torch.int64)
    scored = torch.tensor(example.is_target, dtype=torch.bool)[1:]
    if example.segments is None:
        return Shifted(token_ids[:-1], token_ids[1:], scored, scored)
    rows = torch.tensor(example.segments.opens, dtype=torch.int64)[1:]
    return Shifted(token_ids[:-1], token_ids[1:], scored & (rows >= 0), scored, rows)


@dataclass(frozen=True)
class Batch:
    """Shifted examples padded on the right.

    Attributes:
        input_ids: int64, shape (B, T).
        attention_mask: 1 at real tokens, int64, shape (B, T).
        gold: int64, shape (B, T).
        mask, scored, rows: as in `Shifted`, shape (B, T).
    """

    input_ids: Tensor
    attention_mask: Tensor
    gold: Tensor
    mask: Tensor
    scored: Tensor
    rows: Tensor | None = None

    @property
    def read(self) -> Tensor:
        """Positions whose logits are needed, bool, shape (B, T)."""
        return self.scored if self.rows is None else self.scored | (self.rows >= 0)

    def to(self, device: torch.device) -> Batch:
        return Batch(
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            gold=self.gold.to(device),
            mask=self.mask.to(device),
            scored=self.scored.to(device),
            rows=None if self.rows is None else self.rows.to(device),
        )


def pad(shifted: Sequence[Shifted]) -> Batch:
    """Pad to the longest example with token 0, which is neither attended to nor a target."""
    rows = [one.rows for one in shifted if one.rows is not None]
    return Batch(
        input_ids=pad_sequence([one.input_ids for one in shifted], batch_first=True),
        attention_mask=pad_sequence([torch.ones_like(one.input_ids) for one in shifted], batch_first=True),
        gold=pad_sequence([one.gold for one in shifted], batch_first=True),
        mask=pad_sequence([one.mask for one in shifted], batch_first=True),
        scored=pad_sequence([one.scored for one in shifted], batch_first=True),
        rows=pad_sequence(rows, batch_first=True, padding_value=-1) if rows else None,
    )


def batch_tokens_on(device: torch.device) -> int:
    """Number of tokens per batch that uses a device well. On a CPU, larger batches do not fit its caches."""
    return 512 if device.type == "cpu" else 16384


def batches_by_length(lengths: Sequence[int], max_batch_tokens: int) -> list[list[int]]:
    """Group indices into batches of at most `max_batch_tokens` tokens with padding (or one example), longest first."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batches: list[list[int]] = []
    for index in order:
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= max_batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


@torch.compiler.disable  # type: ignore[untyped-decorator]
def read_segments(
    model: LanguageModel, hidden: Tensor, gold: Tensor, rows: Tensor, is_target: Tensor, law: SegmentLaw
) -> tuple[Tensor, Tensor, Tensor]:
    """Score segments. At most `MAX_LOGITS` logits are in memory; gradients recompute them.

    Args:
        hidden: last hidden states at the positions of `Batch.read`, shape (N, H).
        gold, rows, is_target: as in `Shifted` (`is_target` is `scored`), shape (N,).
        law: the model's tokens that begin a segment.

    Returns:
        Shape (D,) each: log-probability of the segment in nats, fp32; whether greedy decoding writes it, bool;
        log P(START) after it, nats (`core.segments`).
    """
    gold, rows, is_target = (values.to(model.device) for values in (gold, rows, is_target))
    law = law.to(model.device)
    size = max(1, MAX_LOGITS // model.vocab_size)

    def read(states: Tensor, gold: Tensor, rows: Tensor) -> TokenTerms:
        return token_terms(model.logits(states).float(), gold, rows, law)

    parts = []
    for start in range(0, max(len(gold), 1), size):
        part = slice(start, start + size)
        args = hidden[part], gold[part], rows[part]
        grad = torch.is_grad_enabled()
        parts.append(checkpoint(read, *args, use_reentrant=False) if grad else read(*args))
    terms = TokenTerms(*(torch.cat(values) for values in zip(*parts, strict=True)))
    spans = Spans.of(gold, rows, is_target, law)
    return segment_logprobs(terms, spans), segments_correct(terms, spans), stop_logprobs(terms, spans)


@torch.compiler.disable  # type: ignore[untyped-decorator]
@torch.no_grad()
def read_targets(model: LanguageModel, hidden: Tensor, gold: Tensor) -> tuple[Tensor, Tensor]:
    """Score gold tokens without gradients. At most `MAX_LOGITS` logits are in memory at once.

    Args:
        hidden: last hidden states at target positions, shape (N, H).
        gold: gold tokens, shape (N,).

    Returns:
        Log-probabilities in nats, fp32, shape (N,), and whether each token is the model's argmax, bool, shape (N,).
    """
    gold = gold.to(model.device)
    rows = max(1, MAX_LOGITS // model.vocab_size)
    parts = [
        _read_chunk(model, hidden[start : start + rows], gold[start : start + rows])
        for start in range(0, max(len(gold), 1), rows)
    ]
    logprobs, correct = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(correct)


def _read_chunk(model: LanguageModel, hidden: Tensor, gold: Tensor) -> tuple[Tensor, Tensor]:
    logits = model.logits(hidden)  # (n, V)
    return -F.cross_entropy(logits.float(), gold, reduction="none"), logits.argmax(-1) == gold
