"""Conversion of examples to tensors, and of hidden states to log-probabilities at target positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from collm.core.segments import SegmentLaw, TokenTerms, segment_scores, token_terms
from collm.models.language_model import LanguageModel
from collm.training.examples import Example

MAX_LOGITS = 2**25
"""Largest number of logits in memory at once; 128 MB in fp32."""


def shift(example: Example) -> dict[str, Tensor]:
    """An example of N tokens as N - 1 predictions. Values at position t belong to the token after position t.

    This is the only shift: all scoring and training reads examples through it.

    Returns:
        Shape (N - 1,) each.

        input_ids, gold: input tokens and gold tokens, int64.
        target_mask: whether an author is chosen for the gold token or for the segment it begins, bool.

        For models with different tokenizers also scored, whether the gold token is a target, bool, and rows, the row
        of the opening table if the gold token begins a segment, else -1, int64.
    """
    token_ids = torch.tensor(example.token_ids, dtype=torch.int64)
    targets = torch.tensor(example.is_target, dtype=torch.bool)[1:]
    shifted = {"input_ids": token_ids[:-1], "gold": token_ids[1:], "target_mask": targets}
    if example.segments is not None:
        rows = torch.tensor(example.segments.opens, dtype=torch.int64)[1:]
        shifted |= {"target_mask": targets & (rows >= 0), "scored": targets, "rows": rows}
    return shifted


def collate(items: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Join shifted examples and their scores to a batch, padded on the right, shape (B, T, ...).

    Padding is token 0, which is not a target. It is not attended to: attention_mask is 1 at real tokens, int64.
    """
    batch = {
        name: pad_sequence([item[name] for item in items], batch_first=True, padding_value=-1 if name == "rows" else 0)
        for name in items[0]
    }
    if "input_ids" in batch:
        lengths = torch.tensor([len(item["input_ids"]) for item in items])
        batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return batch


def collate_padding_free(items: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Join examples to one row with position ids that restart at each example, without an attention mask."""
    batch = {name: torch.cat([item[name] for item in items]).unsqueeze(0) for name in items[0]}
    if "input_ids" in batch:
        positions = [torch.arange(len(item["input_ids"])) for item in items]
        batch["position_ids"] = torch.cat(positions).unsqueeze(0)
    return batch


@torch.compiler.disable  # type: ignore[untyped-decorator]
def scatter(values: Tensor, mask: Tensor) -> Tensor:
    """Values of N target positions, shape (N, ...), at their places in the mask's shape, with 0 elsewhere."""
    scattered = values.new_zeros(*mask.shape, *values.shape[1:])
    scattered[mask] = values
    return scattered


def needs_logits(batch: Mapping[str, Tensor]) -> Tensor:
    """Positions of a batch of segments whose logits are needed: targets, and where a segment begins, shape (B, T)."""
    return batch["scored"] | (batch["rows"] >= 0)


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


def read_segments(
    model: LanguageModel, hidden: Tensor, gold: Tensor, rows: Tensor, scored: Tensor, law: SegmentLaw
) -> tuple[Tensor, Tensor, Tensor]:
    """Score segments. At most `MAX_LOGITS` logits are in memory; gradients recompute them.

    Args:
        hidden: last hidden states at the positions of `needs_logits`, shape (N, H).
        gold, rows, scored: as in `shift`, shape (N,).
        law: the model's tokens that begin a segment.

    Returns:
        Shape (D,) each: log-probability of the segment in nats, fp32; whether greedy decoding writes it, bool;
        log P(START) after it, nats (`core.segments`).
    """
    gold, rows, scored = (values.to(model.device) for values in (gold, rows, scored))
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
    return segment_scores(terms, gold, rows, scored, law)


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
    size = max(1, MAX_LOGITS // model.vocab_size)
    logprobs, correct = [], []
    for start in range(0, max(len(gold), 1), size):
        part = slice(start, start + size)
        logits = model.logits(hidden[part])  # (n, V)
        logprobs.append(-F.cross_entropy(logits.float(), gold[part], reduction="none"))
        correct.append(logits.argmax(-1) == gold[part])
    return torch.cat(logprobs), torch.cat(correct)
