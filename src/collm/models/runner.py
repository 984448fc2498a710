"""A model with its KV slots: sequences read what they have not seen, and roll back by lowering a length."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from collm.core.types import ModelUsage
from collm.errors import ModelFailure, RequestError, UnsupportedModel
from collm.models.language_model import LanguageModel
from collm.models.slot_attention import register_attention, slot_attention_of
from collm.models.slots import PackedPass, Row, SlotCache, StaticPass, packing_order


@dataclass(frozen=True)
class Reading:
    """What a model says after the last tokens of each sequence that was extended.

    Attributes:
        logits: next-token logits, shape (R, V): sequence by sequence, for each the positions asked for.
        hidden: last hidden states, shape (R, H); None from an assistant that has none.
        silent: for each row whether the assistant abstains there; empty from one that never does.
    """

    logits: Tensor
    hidden: Tensor | None = None
    silent: Sequence[bool] = ()


class Limited(Protocol):
    """Anything that reads only so much."""

    name: str

    @property
    def max_length(self) -> int | None: ...


class Assistant(Protocol):
    """Anything that gives a next-token distribution for a prefix: a model, or a program that may know what follows.

    A slot is one sequence; `length` is how many of its tokens the assistant has seen. One that slept for m tokens
    catches up with one `extend` of those m tokens. Where one that `may_abstain` has nothing to say, the base writes.
    """

    name: str
    usage: ModelUsage

    @property
    def max_length(self) -> int | None: ...

    @property
    def may_abstain(self) -> bool: ...

    def open(self, token_ids: Sequence[int]) -> int: ...

    def close(self, slot: int, *, spoiled: bool = False) -> None: ...

    def forget(self) -> None: ...

    def length(self, slot: int) -> int: ...

    def rollback(self, slot: int, length: int) -> None: ...

    def extend(self, unseen: Mapping[int, Sequence[int]], keep: Mapping[int, int] | None = None) -> Reading: ...


MIN_SHARED = 16
"""Fewer common tokens than this are read again rather than copied from another slot."""


class ModelRunner:
    """Drives one language model over many ragged sequences.

    A slot that was closed keeps what it holds until it is needed, so that the next turn of a chat, or another
    completion of the same prompt, reads only what is new to it.

    Args:
        model: the model; it is left as it was found between calls.
        max_pass_tokens: most new tokens in one forward pass; longer extends are split.
        compiled: run passes of one token per sequence through `torch.compile`, as CUDA graphs on a GPU. The first
            such pass, and the first after the cache has grown, take about half a minute.

    Raises:
        UnsupportedModel: the model does not reproduce its own cache-free logits through the slots.
    """

    may_abstain = False

    def __init__(self, model: LanguageModel, *, max_pass_tokens: int = 4096, compiled: bool = False) -> None:
        register_attention()
        self.model = model
        self.name = model.name
        self.usage = ModelUsage()
        self.max_pass_tokens = max_pass_tokens
        self._window = _smallest_window(model)
        self._cache = SlotCache(model.config.num_hidden_layers, compiled=compiled)
        self._texts: list[list[int]] = []  # slot -> the tokens whose keys and values it holds
        self._closed: list[int] = []  # free slots, the longest free first
        self._compiled: Callable[..., Tensor] | None = None
        _check_against_plain_forward(self)
        if compiled:
            mode = "reduce-overhead" if model.device.type == "cuda" else None
            self._compiled = torch.compile(model.hidden_states, fullgraph=True, mode=mode)
        self.forget()
        self.usage = ModelUsage()

    @property
    def max_length(self) -> int | None:
        return self.model.max_length

    @property
    def open_slots(self) -> int:
        return len(self._texts) - len(self._closed)

    @torch.inference_mode()
    def open(self, token_ids: Sequence[int] = ()) -> int:
        """A slot for a new sequence that is about to read `token_ids`; it may hold a beginning of them already.

        At least one of the tokens is left to read.
        """
        source, shared = self._longest_shared(token_ids)
        if source in self._closed and 2 * shared >= len(self._texts[source]):
            slot = source  # little is lost by continuing it
        else:
            slot = self._free_slot()
            if shared and slot != source:
                self._cache.reserve(slot + 1, shared)
                self._cache.copy(source, slot, shared)
        if slot in self._closed:
            self._closed.remove(slot)
        self._texts[slot] = list(token_ids[:shared])
        return slot

    @torch.inference_mode()
    def close(self, slot: int, *, spoiled: bool = False) -> None:
        """Give the slot back; `spoiled` wipes what it holds, after the model returned NaN there."""
        self._closed.append(slot)
        if spoiled:
            self._texts[slot].clear()
            self._cache.clear(slot)

    def forget(self) -> None:
        """Drop what closed slots hold: needed when the model's weights have changed.

        With no slot open the memory goes too, unless compiled passes were made for it.
        """
        for slot in self._closed:
            self._texts[slot].clear()
        self._closed.sort()
        if not self.open_slots and self._compiled is None:
            self._cache = SlotCache(self.model.config.num_hidden_layers)
            self._texts, self._closed = [], []

    def length(self, slot: int) -> int:
        """How many tokens of its sequence the slot holds."""
        return len(self._texts[slot])

    def rollback(self, slot: int, length: int) -> None:
        """Forget everything after the first `length` tokens."""
        assert 0 <= length <= len(self._texts[slot])
        del self._texts[slot][length:]

    @torch.inference_mode()
    def extend(self, unseen: Mapping[int, Sequence[int]], keep: Mapping[int, int] | None = None) -> Reading:
        """Read the tokens each slot has not seen, at least one each.

        Args:
            unseen: slot -> token ids that follow what it holds.
            keep: slot -> how many of its last new tokens to return a row for; by default the very last.

        Returns:
            For each slot in the mapping's order the rows of its last tokens, in theirs. A row of a model that breaks
            down holds NaN; its neighbours' rows do not.

        Raises:
            RequestError: a sequence would outgrow the model's context.
            Exception: what the model raised. Whatever is raised, every slot is left as before the call.
        """
        assert all(unseen.values()), "every slot needs at least one new token"
        starts = {slot: len(self._texts[slot]) for slot in unseen}
        self._check_context(unseen, starts)
        firsts = {slot: starts[slot] + len(new) - (keep[slot] if keep else 1) for slot, new in unseen.items()}
        try:
            passes = [self._forward(part, firsts) for part in _passes(unseen, self.max_pass_tokens)]
        except Exception:
            for slot, start in starts.items():
                self.rollback(slot, start)
            raise
        hidden = passes[0] if len(passes) == 1 else _in_order(passes)
        rows = torch.cat([hidden[slot] for slot in unseen])
        return Reading(self.model.logits(rows), rows)

    def _forward(self, part: Mapping[int, Sequence[int]], firsts: Mapping[int, int]) -> dict[int, Tensor]:
        """One forward pass; each slot's hidden states from its position `firsts` on."""
        self.usage.forward_passes += 1
        self.usage.tokens_read += sum(map(len, part.values()))
        if self._compiled is not None and all(len(new) == 1 for new in part.values()) and self._mostly_used(part):
            return self._static_forward(part)
        rows = [Row(slot, len(self._texts[slot]), len(new)) for slot, new in part.items()]
        rows = [rows[i] for i in packing_order(rows)]
        self._cache.reserve(max(part) + 1, max(row.end for row in rows))
        layout = PackedPass(rows, device=self.model.input_device, window=self._window)
        hidden = self._run(layout, [token for row in rows for token in part[row.slot]], self.model.hidden_states)
        kept, at = {}, 0
        for row in rows:
            self._texts[row.slot].extend(part[row.slot])
            kept[row.slot] = hidden[at + max(firsts[row.slot] - row.start, 0) : at + row.size]
            at += row.size
        return kept

    def _static_forward(self, part: Mapping[int, Sequence[int]]) -> dict[int, Tensor]:
        """A pass of one token per sequence in the shapes of the whole cache."""
        assert self._compiled is not None
        self._cache.reserve(len(self._texts), max(map(len, self._texts)) + 1)
        lengths = [len(text) for text in self._texts] + [0] * (self._cache.slots - len(self._texts))
        token_ids = [part[slot][0] if slot in part else 0 for slot in range(self._cache.slots)]
        layout = StaticPass(lengths, capacity=self._cache.capacity, device=self.model.input_device)
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        hidden = self._run(layout, token_ids, self._compiled).clone()  # the next replay overwrites its output
        for slot, new in part.items():
            self._texts[slot].extend(new)
        return {slot: hidden[slot : slot + 1] for slot in part}

    def _mostly_used(self, part: Mapping[int, Sequence[int]]) -> bool:
        """Whether a pass over all slots is not mostly waste; on a GPU few rows cost what many do."""
        return self.model.device.type == "cuda" or 2 * len(part) >= self._cache.slots

    def _run(self, layout: PackedPass | StaticPass, token_ids: Sequence[int], forward: Callable[..., Tensor]) -> Tensor:
        """Hidden states of packed tokens: (T, H)."""
        self._cache.layout = layout
        with slot_attention_of(self.model.config):
            return forward(
                torch.tensor([token_ids], device=self.model.input_device),
                position_ids=layout.positions.unsqueeze(0),
                past_key_values=self._cache,
                use_cache=True,
                slot_pass=layout,
            )[0]

    def _check_context(self, unseen: Mapping[int, Sequence[int]], starts: Mapping[int, int]) -> None:
        for slot, tokens in unseen.items():
            length = starts[slot] + len(tokens)
            if self.max_length is not None and length > self.max_length:
                raise RequestError(f"{self.name} reads at most {self.max_length} tokens, came a sequence of {length}")

    def _longest_shared(self, token_ids: Sequence[int]) -> tuple[int, int]:
        """The slot that holds the longest beginning of `token_ids`, its last token aside, and how long that is."""
        wanted = list(token_ids[:-1])
        shared = [common_prefix(wanted, text) for text in self._texts]
        longest = max(shared, default=0)
        return (shared.index(longest), longest) if longest >= MIN_SHARED else (-1, 0)

    def _free_slot(self) -> int:
        """An empty closed slot, else the longest closed, else a new one; low numbers first keep live slots adjacent."""
        if not self._closed:
            self._texts.append([])
            return len(self._texts) - 1
        return min(self._closed, key=lambda slot: slot if not self._texts[slot] else len(self._texts))


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many first entries two sequences of one type share."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


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


def _in_order(passes: Sequence[Mapping[int, Tensor]]) -> dict[int, Tensor]:
    """The hidden states of each slot, gathered over passes."""
    slots = {slot for part in passes for slot in part}
    return {slot: torch.cat([part[slot] for part in passes if slot in part]) for slot in slots}


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
    if not expected.isfinite().all():
        raise ModelFailure(f"{model.name} gives logits that are not finite; check its weights, config and dtype")
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
