"""A model with its KV slots: sequences read what they have not seen, and roll back by lowering a length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from collm.core.types import ModelUsage
from collm.errors import ModelFailure, RequestError, UnsupportedModel
from collm.models.language_model import LanguageModel
from collm.models.slot_attention import register_attention, slot_attention_of
from collm.models.slots import PackedPass, Row, SlotCache, packing_order


@dataclass(frozen=True)
class Reading:
    """What a model says after the last token of each sequence that was extended.

    Attributes:
        logits: next-token logits, shape (B, V).
        hidden: last hidden states, shape (B, H); None from an assistant that has none.
    """

    logits: Tensor
    hidden: Tensor | None = None


class Assistant(Protocol):
    """Anything that gives a next-token distribution for a prefix: a model, or a program that may know what follows.

    A slot is one sequence; `length` is how many of its tokens the assistant has seen. One that slept for m tokens
    catches up with one `extend` of those m tokens.
    """

    name: str
    usage: ModelUsage

    @property
    def max_length(self) -> int | None: ...

    def open(self) -> int: ...

    def close(self, slot: int) -> None: ...

    def length(self, slot: int) -> int: ...

    def rollback(self, slot: int, length: int) -> None: ...

    def extend(self, unseen: Mapping[int, Sequence[int]]) -> Reading: ...


class ModelRunner:
    """Drives one language model over many ragged sequences.

    Args:
        model: the model; it is left as it was found between calls.
        max_pass_tokens: most new tokens in one forward pass; longer extends are split.

    Raises:
        UnsupportedModel: the model does not reproduce its own cache-free logits through the slots.
    """

    def __init__(self, model: LanguageModel, *, max_pass_tokens: int = 4096) -> None:
        register_attention()
        self.model = model
        self.name = model.name
        self.usage = ModelUsage()
        self.max_pass_tokens = max_pass_tokens
        self._window = _smallest_window(model)
        self._cache = SlotCache(model.config.num_hidden_layers)
        self._lengths: dict[int, int] = {}
        _check_against_plain_forward(self)
        self.usage = ModelUsage()

    @property
    def max_length(self) -> int | None:
        return self.model.max_length

    @property
    def open_slots(self) -> int:
        return len(self._lengths)

    def open(self) -> int:
        """A slot for a new sequence: the lowest free one, so that live slots stay adjacent."""
        slot = next(slot for slot in range(len(self._lengths) + 1) if slot not in self._lengths)
        self._lengths[slot] = 0
        return slot

    def close(self, slot: int) -> None:
        """Give the slot back."""
        del self._lengths[slot]

    def length(self, slot: int) -> int:
        """How many tokens of its sequence the slot holds."""
        return self._lengths[slot]

    def rollback(self, slot: int, length: int) -> None:
        """Forget everything after the first `length` tokens."""
        assert 0 <= length <= self._lengths[slot]
        self._lengths[slot] = length

    @torch.inference_mode()
    def extend(self, unseen: Mapping[int, Sequence[int]]) -> Reading:
        """Read the tokens each slot has not seen, at least one each.

        Args:
            unseen: slot -> token ids that follow what it holds.

        Returns:
            One row per slot, in the mapping's order.

        Raises:
            RequestError: a sequence would outgrow the model's context; nothing is read.
            ModelFailure: the model returned NaN; the slots concerned are left as before the call.
        """
        assert all(unseen.values()), "every slot needs at least one new token"
        self._check_context(unseen)
        starts = {slot: self._lengths[slot] for slot in unseen}
        hidden: dict[int, Tensor] = {}
        for part in _passes(unseen, self.max_pass_tokens):
            hidden.update(self._forward(part))
        stacked = torch.stack([hidden[slot] for slot in unseen])
        logits = self.model.logits(stacked)
        self._check_finite(logits, starts)
        return Reading(logits, stacked)

    def _forward(self, part: Mapping[int, Sequence[int]]) -> dict[int, Tensor]:
        """One packed forward pass; the hidden state after each slot's last token."""
        slots = list(part)
        rows = [Row(slot, self._lengths[slot], len(part[slot])) for slot in slots]
        rows = [rows[i] for i in packing_order(rows)]
        self._cache.reserve(max(slots) + 1, max(row.end for row in rows))
        device = self.model.input_device
        layout = self._cache.layout = PackedPass(rows, device=device, window=self._window)
        token_ids = torch.tensor([[token for row in rows for token in part[row.slot]]], device=device)
        with slot_attention_of(self.model.config):
            hidden = self.model.hidden_states(
                token_ids,
                position_ids=layout.positions.unsqueeze(0),
                past_key_values=self._cache,
                use_cache=True,
                slot_pass=layout,
            )[0]
        self._lengths.update({row.slot: row.end for row in rows})
        self.usage.forward_passes += 1
        self.usage.tokens_read += token_ids.shape[1]
        return {row.slot: hidden[last] for row, last in zip(rows, layout.last_tokens, strict=True)}

    def _check_context(self, unseen: Mapping[int, Sequence[int]]) -> None:
        for slot, tokens in unseen.items():
            length = self._lengths[slot] + len(tokens)
            if self.max_length is not None and length > self.max_length:
                raise RequestError(f"{self.name} reads at most {self.max_length} tokens, came a sequence of {length}")

    def _check_finite(self, logits: Tensor, starts: Mapping[int, int]) -> None:
        broken = logits.amax(-1).isnan().tolist()  # amax passes NaN on
        if not any(broken):
            return
        for (slot, start), bad in zip(starts.items(), broken, strict=True):
            if bad:
                self._lengths[slot] = start
                self._cache.clear(slot)
        positions = [start for start, bad in zip(starts.values(), broken, strict=True) if bad]
        raise ModelFailure(
            f"{self.name} returned NaN logits for {len(positions)} of {len(broken)} sequences "
            f"(first after {positions[0]} cached tokens); check its weights and dtype {logits.dtype}"
        )


def _passes(unseen: Mapping[int, Sequence[int]], budget: int) -> list[dict[int, Sequence[int]]]:
    """Cut extends into forward passes of at most `budget` tokens, in order."""
    passes: list[dict[int, Sequence[int]]] = [{}]
    room = budget
    for slot, tokens in unseen.items():
        at = 0
        while at < len(tokens):
            if room == 0:
                passes.append({})
                room = budget
            piece = tokens[at : at + room]
            passes[-1][slot] = piece
            at += len(piece)
            room -= len(piece)
    return passes


def _smallest_window(model: LanguageModel) -> int | None:
    windows = [getattr(model.config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((window for window in windows if window), default=None)


_RELATIVE_ERROR = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.1}


@torch.inference_mode()
def _check_against_plain_forward(runner: ModelRunner) -> None:
    """Ragged extends, a rollback and a catch-up must give the logits of a forward pass without a cache."""
    model = runner.model
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(model.vocab_size, (2, 8), generator=generator).tolist()
    expected = torch.stack([_plain_logits(model, texts[0]), _plain_logits(model, texts[1][:5])])
    try:
        long, short = runner.open(), runner.open()
        runner.extend({long: texts[0][:6], short: texts[1][:2]})
        runner.rollback(long, 3)
        runner.extend({short: texts[1][2:3]})
        came = runner.extend({short: texts[1][3:5], long: texts[0][3:]}).logits.flip(0)
        runner.close(long)
        runner.close(short)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, AttributeError, RuntimeError, IndexError) as error:
        raise UnsupportedModel(_unsupported(model, f"it fails with {type(error).__name__}: {error}")) from error
    scale = (expected - expected.mean(-1, keepdim=True)).norm()
    relative = float((came.float() - expected).norm() / scale) if scale else 0.0
    if not relative <= _RELATIVE_ERROR.get(came.dtype, 0.1):
        raise UnsupportedModel(_unsupported(model, f"its logits are off by {relative:.2g} of their size"))


def _plain_logits(model: LanguageModel, token_ids: list[int]) -> Tensor:
    ids = torch.tensor([token_ids], device=model.input_device)
    logits: Tensor = model.module(input_ids=ids, use_cache=False).logits
    return logits[0, -1, : model.vocab_size].float()


def _unsupported(model: LanguageModel, why: str) -> str:
    return (
        f"{model.name} ({type(model.module).__name__}) cannot run on KV slots: against its own forward pass without a "
        f"cache {why}; use a model whose attention goes through transformers' AttentionInterface and keeps all keys"
    )
