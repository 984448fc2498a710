"""Layouts of forward passes over KV slots.

The new tokens of all sequences form a single row (1, T) with explicit positions, so that only attention distinguishes
sequences. A packed pass has no padding. A static pass is padded to one of a few shapes and keeps all its inputs on the
device, so that it can be captured as a CUDA graph.

Shapes: T tokens, S slots, H heads, L cached positions, D head dimension. `kv_cache` holds the memory, and
`slot_attention` the attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from collm.core.transfers import to_device


@dataclass(frozen=True)
class Row:
    """New tokens of one slot: `size` tokens after the `start` cached ones."""

    slot: int
    start: int
    size: int

    @property
    def end(self) -> int:
        return self.start + self.size


@dataclass(frozen=True)
class Group:
    """Rows of neighbouring slots that share an attention call, padded to the same number of new tokens.

    Attributes:
        slots: the slots from the first to the last row; idle slots between them take part and are ignored.
        tokens: the rows' tokens in the packed row, `size` of them.
        width: number of new tokens of the longest row.
        kv_length: largest length of a row after this pass.
        ragged: whether a mask is needed, as lengths differ or several new tokens follow cached ones.
        padded: index of the packed token for each slot and query, (n * width,); None without padding.
        kept: index of each token among the padded queries, (size,); None without padding.
    """

    slots: slice
    tokens: slice
    width: int
    kv_length: int
    ragged: bool
    padded: Tensor | None = None
    kept: Tensor | None = None


class PackedPass:
    """Layout of a packed pass: the slot and position of each packed token.

    Keys and values have shape (S, H, L, D), or (N, page, H, D) in a paged cache.

    Args:
        rows: rows in packed order; see `packing_order`.
        window: the model's smallest attention window, None without one.
        places: index of each token among all positions of all pages, (T,); None without pages.
        table: the pages of each slot, (S, P); None without pages.

    Attributes:
        positions: position of each packed token, (T,).
        kv_length: largest length of a row after this pass.
        most_new: number of new tokens of the longest row.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        *,
        device: torch.device,
        window: int | None,
        places: Tensor | None = None,
        table: Tensor | None = None,
    ) -> None:
        self.rows = rows
        self.places = places
        self.table = table
        self.kv_length = max([row.end for row in rows])
        self.windowed = window is not None and self.kv_length > window
        self.groups = _groups(rows, device)
        self.needs_mask = self.windowed or any(group.ragged for group in self.groups)
        self.most_new = max([row.size for row in rows])
        self.positions = to_device([p for row in rows for p in range(row.start, row.end)], device)  # (T,)
        self._masks: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    @cached_property
    def slot_of(self) -> Tensor:
        """Slot of each packed token, (T,)."""
        return to_device([row.slot for row in self.rows for _ in range(row.size)], self.positions.device)

    def held(self, keys: Tensor, values: Tensor, group: Group) -> list[Tensor]:
        """The cached keys and values that a group attends to: (n, H, L, D) each."""
        if self.table is None:
            return [memory[group.slots, :, : group.kv_length] for memory in (keys, values)]
        pages = self.table[group.slots, : -(-group.kv_length // keys.shape[1])].to(keys.device)
        return [memory[pages].flatten(1, 2)[:, : group.kv_length].transpose(1, 2) for memory in (keys, values)]

    def mask_of(self, group: Group, visible: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Additive attention mask of a group, (n, 1, width, L): 0 where visible, else -inf. None if not needed.

        Args:
            visible: the boolean mask of the pass, (1, 1, T, L). Layers of one kind share it, so it is converted once.
        """
        if visible is None or not (self.windowed or group.ragged):
            return None
        key = (id(visible), group.tokens.start)
        if key not in self._masks:
            tokens = group.tokens if group.padded is None else group.padded
            seen = visible[0, 0, tokens, : group.kv_length]
            seen = seen.reshape(group.slots.stop - group.slots.start, 1, group.width, group.kv_length)
            # Keep a reference to the boolean mask, so that its id is not reused.
            self._masks[key] = visible, torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, -torch.inf)
        return self._masks[key][1]


class StaticPass:
    """Layout of a padded pass of `batch` rows with `width` tokens each, at fixed addresses on the device.

    Attributes:
        token_ids, positions: inputs of the model, (1, T) and (T,).
        places: index of each token among all positions of all pages, (T,); padding is written to page 0.
        queries: positions of the queries for attention, (T,); -1 for padding.
        slots: slot of each row, (batch,).
        last: index of each row's last token, (batch,).
        table: the pages of each slot, (S, P).
    """

    needs_mask = True
    most_new = 0
    kv_length = 0

    def __init__(self, width: int, batch: int, *, table: Tensor) -> None:
        self.width = width
        self.batch = batch
        self.table = table
        sizes = [width * batch] * 4 + [batch] * 2
        self._inputs = torch.zeros(sum(sizes), dtype=torch.long, device=table.device)
        parts = torch.split(self._inputs, sizes)
        token_ids, self.positions, self.places, self.queries, self.slots, self.last = parts
        self.token_ids = token_ids.unsqueeze(0)

    def fill(self, rows: Sequence[Row], token_ids: Sequence[Sequence[int]], places: Sequence[Sequence[int]]) -> None:
        """Set all inputs with one copy to the device.

        Args:
            rows: at most `batch` rows.
            token_ids, places: per row.
        """
        missing = self.batch - len(rows)
        inputs = self._padded(token_ids, 0)
        inputs += self._padded([range(row.start, row.end) for row in rows], 0)
        inputs += self._padded(places, 0)
        inputs += self._padded([range(row.start, row.end) for row in rows], -1)
        inputs += [row.slot for row in rows] + [self.table.shape[0] - 1] * missing
        inputs += [i * self.width + row.size - 1 for i, row in enumerate(rows)] + [0] * missing
        self._inputs.copy_(to_device(inputs, self._inputs.device))

    def _padded(self, by_row: Sequence[Sequence[int]], value: int) -> list[int]:
        filled = [each for row_values in by_row for each in (*row_values, *[value] * (self.width - len(row_values)))]
        return filled + [value] * (self.width * (self.batch - len(by_row)))


_MAX_GROUP_WIDTH = 16  # longer rows have an attention call of their own
_SMALL_CALL = 4096  # number of scores below which a call's overhead dominates


def packing_order(rows: Sequence[Row]) -> list[int]:
    """Order rows by slot, with rows that may share an attention call next to each other. Returns indices."""
    return sorted(range(len(rows)), key=lambda i: (rows[i].size > _MAX_GROUP_WIDTH, rows[i].slot))


def _groups(rows: Sequence[Row], device: torch.device) -> list[Group]:
    members: list[list[Row]] = []
    for row in rows:
        if members and _can_join(members[-1], row):
            members[-1].append(row)
        else:
            members.append([row])
    starts = accumulate([sum([row.size for row in group]) for group in members], initial=0)
    return [_group(group, at, device) for group, at in zip(members, starts, strict=False)]


def _can_join(members: Sequence[Row], row: Row) -> bool:
    """Whether a row may join a group, so that at most half of the shared call is padding."""
    rows = [*members, row]
    width, longest = max(r.size for r in rows), max(r.end for r in rows)
    whole = (row.slot - members[0].slot + 1) * width * longest
    return width <= _MAX_GROUP_WIDTH and (whole <= _SMALL_CALL or whole <= 2 * sum(r.size * r.end for r in rows))


def _group(rows: Sequence[Row], at: int, device: torch.device) -> Group:
    first, sizes = rows[0], [row.size for row in rows]
    size, width = sum(sizes), max(sizes)
    slots = slice(first.slot, rows[-1].slot + 1)
    ends = {row.end for row in rows}
    ragged = len(ends) > 1 or (width > 1 and (len(rows) > 1 or first.start > 0))
    padded = kept = None
    if len(rows) > 1 and size < (slots.stop - slots.start) * width:
        padded, kept = (to_device(index, device) for index in _padding(rows, at, width))
    return Group(slots, slice(at, at + size), width, max(ends), ragged, padded, kept)


def _padding(rows: Sequence[Row], at: int, width: int) -> tuple[list[int], list[int]]:
    """Indices `Group.padded` and `Group.kept`. Padding repeats a real token of the group."""
    first, last = rows[0].slot, rows[-1].slot
    padded = [at] * ((last - first + 1) * width)
    kept: list[int] = []
    for row in rows:
        place = (row.slot - first) * width
        padded[place : place + width] = [at + min(i, row.size - 1) for i in range(width)]
        kept += range(place, place + row.size)
        at += row.size
    return padded, kept
