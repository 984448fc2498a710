"""Layouts of forward passes over KV slots, in which every sequence advances, waits and rolls back on its own.

The new tokens of all sequences of one forward pass travel as a single row (1, T) with explicit positions. A packed
pass holds no padding, so no linear layer sees any; only attention tells sequences apart. A static pass has one of few
shapes, padded, and keeps all that changes from pass to pass on the device, so that it can be captured as a CUDA graph.

Shapes: T tokens, S slots, H heads, L cached positions, D head dimension. The memory is in `kv_cache`, the attention in
`slot_attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from collm.core.transfers import to_device


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

    Keys and values lie as (S, H, L, D), or in pages, (N, page, H, D).

    Args:
        rows: in packed order; see `packing_order`.
        window: the model's smallest attention window, None without one.
        places: where each token is written among all positions of all pages, (T,); None without pages.
        table: the pages of each slot, (S, P); None without pages.
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
        self.kv_length = max(row.end for row in rows)
        self.windowed = window is not None and self.kv_length > window
        self.groups = _groups(rows, device)
        self.positions = to_device([p for row in rows for p in range(row.start, row.end)], device)  # (T,)
        self.slot_of = to_device([row.slot for row in rows for _ in range(row.size)], device)  # (T,)
        self._masks: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    @property
    def needs_mask(self) -> bool:
        return self.windowed or any(group.ragged for group in self.groups)

    @property
    def most_new(self) -> int:
        """New tokens of the longest row."""
        return max(row.size for row in self.rows)

    def held(self, memory: Tensor, group: Group) -> Tensor:
        """The keys or the values that a group attends to: (n, H, L, D)."""
        if self.table is None:
            return memory[group.slots, :, : group.kv_length]
        pages = self.table[group.slots, : -(-group.kv_length // memory.shape[1])].to(memory.device)
        return memory[pages].flatten(1, 2)[:, : group.kv_length].transpose(1, 2)

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
    """Layout of a pass of `width` tokens in each of `batch` rows, padded, at fixed addresses on the device.

    Attributes:
        token_ids, positions: what the model reads, (1, T) and (T,).
        places: where each token is written among all positions of all pages, (T,); padding writes to page 0.
        queries: positions as attention sees them, (T,): -1 for padding.
        slots: of each row, (batch,).
        last: of each row, its last token among all, (batch,).
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
        """Set all that changes, in one copy to the device.

        Args:
            rows: as many as the batch, or fewer.
            token_ids, places: of each row.
        """
        missing = self.batch - len(rows)
        inputs = self._padded(token_ids, 0)
        inputs += self._padded([range(row.start, row.end) for row in rows], 0)
        inputs += self._padded(places, 0)
        inputs += self._padded([range(row.start, row.end) for row in rows], -1)
        inputs += [row.slot for row in rows] + [self.table.shape[0] - 1] * missing
        inputs += [i * self.width + row.size - 1 for i, row in enumerate(rows)] + [0] * missing
        self._inputs.copy_(to_device(inputs, self._inputs.device))

    def _padded(self, of_rows: Sequence[Sequence[int]], value: int) -> list[int]:
        filled = [each for of_row in of_rows for each in (*of_row, *[value] * (self.width - len(of_row)))]
        return filled + [value] * (self.width * (self.batch - len(of_rows)))


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
        padded, kept = (to_device(index, device) for index in _padding(rows, at, width))
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
