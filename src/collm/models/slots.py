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
    """Rows that share one attention call: those of neighbouring slots, padded to the same number of new tokens.

    Attributes:
        slots: the slots from the first to the last row's; idle ones between them take part and are ignored.
        tokens: where the rows' tokens lie in the packed row, `size` of them.
        width: new tokens of the longest row.
        kv_length: longest of the rows' lengths after this pass.
        ragged: a mask is needed: lengths differ, or several new tokens follow cached ones.
        padded: for each slot and query, the packed token that stands there, (n * width,); None if that is `tokens`.
        kept: for each token, its place among the padded queries, (size,); None likewise.
    """

    slots: slice
    tokens: slice
    width: int
    kv_length: int
    ragged: bool
    padded: Tensor | None = None
    kept: Tensor | None = None


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
        self.groups = _groups(rows, device)
        self.positions = torch.tensor([p for row in rows for p in range(row.start, row.end)], device=device)  # (T,)
        self.slot_of = torch.tensor([row.slot for row in rows for _ in range(row.size)], device=device)  # (T,)
        self._masks: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    @property
    def needs_mask(self) -> bool:
        return self.windowed or any(group.ragged for group in self.groups)

    @property
    def most_new(self) -> int:
        """New tokens of the longest row."""
        return max(row.size for row in self.rows)

    def mask_of(self, group: Group, visible: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """What attention adds to the scores of a group: (n, 1, width, L), 0 where visible, else -inf; None for nothing.

        Args:
            visible: the pass's boolean mask (1, 1, T, L). Layers of one kind share it, so it is converted once.
        """
        if visible is None or not (self.windowed or group.ragged):
            return None
        key = (id(visible), group.tokens.start)
        if key not in self._masks:
            tokens = group.tokens if group.padded is None else group.padded
            seen = visible[0, 0, tokens, : group.kv_length]
            seen = seen.reshape(group.slots.stop - group.slots.start, 1, group.width, group.kv_length)
            # The boolean mask is kept too, or another could be made at its address.
            self._masks[key] = visible, torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, -torch.inf)
        return self._masks[key][1]


class StaticPass:
    """A pass of one token in every slot, whose shapes change only with the cache's: what `torch.compile` wants.

    Every layer attends to the whole cache under a mask. Slots without a new token take part and are ignored: what they
    write lies after the tokens they hold.

    Args:
        lengths: tokens in each slot.
        capacity: of the cache, more than any length.
    """

    windowed = True
    needs_mask = True
    most_new = 1

    def __init__(self, lengths: Sequence[int], *, capacity: int, device: torch.device) -> None:
        self.rows: list[Row] = []
        self.kv_length = capacity
        self.groups = [Group(slice(0, len(lengths)), slice(0, len(lengths)), 1, capacity, ragged=True)]
        self.positions = torch.tensor(lengths, device=device)  # (S,)
        self.slot_of = torch.arange(len(lengths), device=device)  # (S,)

    def mask_of(self, group: Group, visible: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """As of `PackedPass`: shape (S, 1, 1, L)."""
        assert visible is not None
        seen = visible[0, 0, :, None, None]
        return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, -torch.inf)


_WIDEST = 16  # longer rows attend alone
_ALWAYS_WORTH = 4096  # queries times keys that cost no more than a call


def packing_order(rows: Sequence[Row]) -> list[int]:
    """Indices of `rows` such that rows which may share an attention call stand together, by slot."""
    return sorted(range(len(rows)), key=lambda i: (rows[i].size > _WIDEST, rows[i].slot))


def _groups(rows: Sequence[Row], device: torch.device) -> list[Group]:
    groups: list[Group] = []
    members: list[Row] = []
    at = 0
    for row in rows:
        if members and not _fit(members, row):
            groups.append(_group(members, at, device))
            at += sum(member.size for member in members)
            members = []
        members.append(row)
    return [*groups, _group(members, at, device)]


def _fit(members: Sequence[Row], row: Row) -> bool:
    """Whether a row may join: at most half of the shared call is padding."""
    rows = [*members, row]
    width, longest = max(r.size for r in rows), max(r.end for r in rows)
    whole = (row.slot - members[0].slot + 1) * width * longest
    return width <= _WIDEST and (whole <= _ALWAYS_WORTH or whole <= 2 * sum(r.size * r.end for r in rows))


def _group(rows: Sequence[Row], at: int, device: torch.device) -> Group:
    first, size, width = rows[0], sum(row.size for row in rows), max(row.size for row in rows)
    slots = slice(first.slot, rows[-1].slot + 1)
    ends = {row.end for row in rows}
    ragged = len(ends) > 1 or (width > 1 and (len(rows) > 1 or first.start > 0))
    padded = kept = None
    if len(rows) > 1 and size < (slots.stop - slots.start) * width:
        padded, kept = (torch.tensor(index, device=device) for index in _padding(rows, at, width))
    return Group(slots, slice(at, at + size), width, max(ends), ragged, padded, kept)


def _padding(rows: Sequence[Row], at: int, width: int) -> tuple[list[int], list[int]]:
    """Packed token at each padded place, and place of each packed token. Padding repeats a real token of the group."""
    first, last = rows[0].slot, rows[-1].slot
    padded = [at] * ((last - first + 1) * width)
    kept: list[int] = []
    for row in rows:
        place = (row.slot - first) * width
        padded[place : place + width] = [at + min(i, row.size - 1) for i in range(width)]
        kept += range(place, place + row.size)
        at += row.size
    return padded, kept


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
        self._fix_addresses()
        self.is_initialized = True

    def resize(self, slots: int, capacity: int) -> None:
        if self.is_initialized:
            self.keys = _enlarged(self.keys, slots, capacity)
            self.values = _enlarged(self.values, slots, capacity)
            self._fix_addresses()

    def _fix_addresses(self) -> None:
        if self.cache.compiled:  # CUDA graphs may then write to them in place
            torch._dynamo.mark_static_address(self.keys)
            torch._dynamo.mark_static_address(self.values)

    def clear(self, slot: int) -> None:
        if self.is_initialized:
            self.keys[slot] = 0
            self.values[slot] = 0

    def copy(self, source: int, target: int, length: int) -> None:
        self.keys[target, :, :length] = self.keys[source, :, :length]
        self.values[target, :, :length] = self.values[source, :, :length]

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
        return self.cache.layout.kv_length - self.cache.layout.most_new

    def get_max_length(self) -> int:
        return -1


def _enlarged(old: Tensor, slots: int, capacity: int) -> Tensor:
    new = old.new_zeros(slots, old.shape[1], capacity, old.shape[3])
    new[: old.shape[0], :, : old.shape[2]] = old
    return new


class SlotCache(Cache):  # type: ignore[misc]
    """The cache handed to the model; grows by doubling, never shrinks.

    Args:
        compiled: passes over it are compiled.
    """

    def __init__(self, num_layers: int, *, compiled: bool = False) -> None:
        super().__init__(layers=[SlotLayer(self) for _ in range(num_layers)])
        self.slots = 1
        self.capacity = 128
        self.compiled = compiled
        self.layout: PackedPass | StaticPass

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

    def copy(self, source: int, target: int, length: int) -> None:
        """Give `target` the first `length` tokens of `source`."""
        for layer in self.layers:
            layer.copy(source, target, length)

    def get_query_offset(self, layer_idx: int = 0) -> Tensor | None:
        """Absolute position of every packed token, (T,), which transformers hands to `slot_mask`; None for no mask."""
        return self.layout.positions if self.layout.needs_mask else None


def _doubled(size: int, needed: int) -> int:
    while size < needed:
        size *= 2
    return size
