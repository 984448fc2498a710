"""KV slots: a cache in which every sequence advances, waits and rolls back on its own.

The new tokens of all sequences of one forward pass travel as a single packed row (1, T) with explicit positions, so
no linear layer sees padding. Only attention tells sequences apart: it runs over `groups` of the packed row, each
group against the keys of its own slots. Slots keep every position (sliding windows are a matter of the mask), so a
rollback is a smaller length and nothing else.

Shapes: T packed tokens, S slots, H heads, L cached positions, D head dimension. The attention itself is in
`slot_attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass(frozen=True)
class Row:
    """New tokens of one slot: `size` of them after the `start` it holds."""

    slot: int
    start: int
    size: int

    @property
    def end(self) -> int:
        return self.start + self.size


@dataclass(frozen=True)
class Group:
    """Rows that share one attention call: one row, or one-token rows in adjacent slots.

    Attributes:
        tokens: where their queries lie in the packed row.
        slots: their slots.
        kv_length: longest of their lengths after this pass.
        ragged: a mask is needed: their lengths differ, or several new tokens follow cached ones.
    """

    tokens: slice
    slots: slice
    kv_length: int
    ragged: bool


class PackedPass:
    """Layout of one forward pass: which packed token belongs to which slot and position.

    Args:
        rows: in packed order; see `packing_order`.
        window: the model's smallest attention window, None without one.
    """

    def __init__(self, rows: Sequence[Row], *, device: torch.device, window: int | None) -> None:
        self.rows = rows
        self.kv_length = max(row.end for row in rows)
        self.windowed = window is not None and self.kv_length > window
        self.groups = _groups(rows)
        self.positions = torch.tensor([p for row in rows for p in range(row.start, row.end)], device=device)  # (T,)
        self.slot_of = torch.tensor([row.slot for row in rows for _ in range(row.size)], device=device)  # (T,)

    @property
    def needs_mask(self) -> bool:
        return self.windowed or any(group.ragged for group in self.groups)

    @property
    def last_tokens(self) -> list[int]:
        """Packed index of each row's last token."""
        ends, total = [], 0
        for row in self.rows:
            total += row.size
            ends.append(total - 1)
        return ends


def packing_order(rows: Sequence[Row]) -> list[int]:
    """Indices of `rows` such that one-token rows come first and adjacent slots stand together."""
    return sorted(range(len(rows)), key=lambda i: (rows[i].size > 1, rows[i].slot))


def _groups(rows: Sequence[Row]) -> list[Group]:
    groups: list[Group] = []
    members: list[Row] = []
    at = 0
    for row in rows:
        if members and not (row.size == members[-1].size == 1 and row.slot == members[-1].slot + 1):
            groups.append(_group(members, at))
            at += sum(member.size for member in members)
            members = []
        members.append(row)
    return [*groups, _group(members, at)]


def _group(rows: Sequence[Row], at: int) -> Group:
    size, ends = sum(row.size for row in rows), {row.end for row in rows}
    first, last = rows[0], rows[-1]
    return Group(
        tokens=slice(at, at + size),
        slots=slice(first.slot, last.slot + 1),
        kv_length=max(ends),
        ragged=len(ends) > 1 or (first.size > 1 and first.start > 0),
    )


class SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer for all slots: (S, H, L, D) each."""

    is_sliding = False
    is_croppable = True

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Zeros, not empty: a masked column has weight 0, and 0 * NaN would reach the output.
        slots, capacity = self.cache.slots, self.cache.capacity
        self.keys = key_states.new_zeros(slots, key_states.shape[1], capacity, key_states.shape[3])
        self.values = value_states.new_zeros(slots, value_states.shape[1], capacity, value_states.shape[3])
        self.is_initialized = True

    def resize(self, slots: int, capacity: int) -> None:
        if self.is_initialized:
            self.keys = _enlarged(self.keys, slots, capacity)
            self.values = _enlarged(self.values, slots, capacity)

    def clear(self, slot: int) -> None:
        if self.is_initialized:
            self.keys[slot] = 0
            self.values[slot] = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store (1, H, T, D) at the pass's slots and positions; return everything up to the longest length."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        layout = self.cache.layout
        if len(layout.rows) == 1:
            row = layout.rows[0]
            self.keys[row.slot, :, row.start : row.end] = key_states[0]
            self.values[row.slot, :, row.start : row.end] = value_states[0]
        else:
            at = layout.slot_of.to(self.keys.device), slice(None), layout.positions.to(self.keys.device)
            self.keys[at] = key_states[0].transpose(0, 1)
            self.values[at] = value_states[0].transpose(0, 1)
        return self.keys[:, :, : layout.kv_length], self.values[:, :, : layout.kv_length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.layout.kv_length, 0

    def get_seq_length(self) -> int:
        return self.cache.layout.kv_length - max(row.size for row in self.cache.layout.rows)

    def get_max_length(self) -> int:
        return -1


def _enlarged(old: Tensor, slots: int, capacity: int) -> Tensor:
    new = old.new_zeros(slots, old.shape[1], capacity, old.shape[3])
    new[: old.shape[0], :, : old.shape[2]] = old
    return new


class SlotCache(Cache):  # type: ignore[misc]
    """The cache handed to the model; grows by doubling, never shrinks."""

    def __init__(self, num_layers: int, *, slots: int = 1, capacity: int = 128) -> None:
        super().__init__(layers=[SlotLayer(self) for _ in range(num_layers)])
        self.slots = slots
        self.capacity = capacity
        self.layout: PackedPass

    def reserve(self, slots: int, capacity: int) -> None:
        """Make room for `slots` sequences of `capacity` tokens."""
        if slots <= self.slots and capacity <= self.capacity:
            return
        self.slots = _doubled(self.slots, slots)
        self.capacity = _doubled(self.capacity, capacity)
        for layer in self.layers:
            layer.resize(self.slots, self.capacity)

    def clear(self, slot: int) -> None:
        """Overwrite a slot with zeros, after a pass left NaN in it."""
        for layer in self.layers:
            layer.clear(slot)

    def get_query_offset(self, layer_idx: int = 0) -> Tensor | None:
        """Absolute position of every packed token, (T,), which transformers hands to `slot_mask`; None for no mask."""
        return self.layout.positions if self.layout.needs_mask else None


def _doubled(size: int, needed: int) -> int:
    while size < needed:
        size *= 2
    return size
