"""KV caches whose keys and values never move.

On a CPU every slot reserves addresses for the longest sequence, and the operating system provides memory on the first
write (`ReservedCache`). On other devices a slot holds pages of one allocation (`PagedCache`). Both count positions in
whole pages, up to their capacity.

Slots keep every position, and masks implement sliding windows, so a rollback only lowers a length.

Shapes: T new tokens of a pass, S slots, n slots of a group, H key heads, L positions, D head dimension, N pages.
"""

from __future__ import annotations

import math
import mmap
import sys
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from collm.errors import ConfigError, RequestError
from collm.models.language_model import to_device

PAGE = 16
"""Positions per page."""
MOST_SLOTS = 1024
LONGEST = 1 << 17
"""Maximum length of a slot if the model's config has no limit."""


def in_pages(length: int) -> int:
    """Round a length up to whole pages."""
    return -(-length // PAGE) * PAGE


class SlotMemory:
    """The positions of a cache that slots hold, in whole pages.

    Args:
        capacity: largest number of positions of all slots together.
        max_length: largest number of positions of one slot; None for `LONGEST`.

    Attributes:
        bytes_per_position: memory of one position in all layers; 0 before the first write.
        held: slot -> its allocated positions, in whole pages.
        used: the sum of `held`.
        slots: largest number of slots.
    """

    slots = MOST_SLOTS

    def __init__(self, capacity: int, max_length: int | None) -> None:
        self.capacity = capacity // PAGE * PAGE
        self.max_length = min(in_pages(max_length or LONGEST), self.capacity)
        self.bytes_per_position = 0
        self.held: dict[int, int] = {}
        self.used = 0

    @property
    def allocated_bytes(self) -> int:
        """Memory allocated to slots."""
        return self.used * self.bytes_per_position

    def hold(self, slot: int, length: int) -> None:
        """Allocate `length` positions for a slot."""
        if length > self.max_length:
            raise RequestError(
                f"a sequence has {length} tokens, but the KV cache holds at most {self.max_length} tokens per "
                "sequence; raise cache_memory"
            )
        before, after = self.held.get(slot, 0), in_pages(length)
        if after > before:
            self.held[slot] = after
            self.used += after - before

    def release(self, slot: int, *, wipe: bool = False) -> None:
        """Free a slot's memory. `wipe` wipes it, because it may contain NaN."""
        self.used -= self.held.pop(slot, 0)

    @abstractmethod
    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of slot `source` to `target`, which must have room."""


class KVCache(SlotMemory, Cache):  # type: ignore[misc]
    """Base class of the caches that transformers models write.

    Attributes:
        layout: the current pass, a `PackedPass` or a `StaticPass`.
        memory: layer -> its keys and values, allocated on the first write, when their shapes are known.
    """

    layout: Any

    def __init__(self, capacity: int, max_length: int | None) -> None:
        SlotMemory.__init__(self, capacity, max_length)
        Cache.__init__(self, layers=[])
        self.memory: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values, shape (1, H, T, D), and return the layer's whole memory."""
        if layer_idx not in self.memory:
            self.memory[layer_idx] = self._allocate(key_states), self._allocate(value_states)
            self.bytes_per_position += key_states[0, :, 0].nbytes + value_states[0, :, 0].nbytes
        keys, values = self.memory[layer_idx]
        self._write(keys, key_states[0])
        self._write(values, value_states[0])
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of cached tokens, for models that count positions themselves."""
        return int(self.layout.num_cached)

    @abstractmethod
    def view(self, memory: Tensor, slots: slice, length: int) -> Tensor:
        """The first `length` positions of some slots, shape (n, H, length, D)."""

    @abstractmethod
    def _allocate(self, states: Tensor) -> Tensor: ...

    @abstractmethod
    def _write(self, memory: Tensor, states: Tensor) -> None:
        """Store states (H, T, D) at the slots and positions of the layout."""


class ReservedCache(KVCache):
    """CPU cache that reserves addresses for all slots, shape (S, H, L, D), and allocates memory on write."""

    def __init__(self, capacity: int, max_length: int | None) -> None:
        super().__init__(capacity, max_length)
        self._reserved: list[tuple[mmap.mmap | None, Tensor]] = []

    @property
    def allocated_bytes(self) -> int:
        """Memory allocated to slots, in whole pages of the operating system."""
        rows = [(memory.shape[1], memory.stride(2) * memory.element_size()) for _, memory in self._reserved]
        pages = (heads * -(-held * size // mmap.PAGESIZE) for heads, size in rows for held in self.held.values())
        return sum(pages) * mmap.PAGESIZE

    def release(self, slot: int, *, wipe: bool = False) -> None:
        held = self.held.get(slot)
        super().release(slot)
        for reserved, memory in self._reserved if held else ():
            if reserved is not None and sys.platform == "linux":
                size = memory[0].nbytes
                reserved.madvise(mmap.MADV_DONTNEED, slot * size, size)  # later reads return zeros
            else:
                memory[slot, :, :held] = 0

    def copy(self, source: int, target: int, length: int) -> None:
        for _, memory in self._reserved:
            memory[target, :, :length] = memory[source, :, :length]

    def view(self, memory: Tensor, slots: slice, length: int) -> Tensor:
        return memory[slots, :, :length]

    def _allocate(self, states: Tensor) -> Tensor:
        _, heads, _, dim = states.shape
        # Align slots to pages of the operating system. An odd number of them avoids conflicts in CPU caches.
        step = mmap.PAGESIZE // math.gcd(mmap.PAGESIZE, heads * dim * states.element_size())
        length = (-(-self.max_length // step) | 1) * step
        while True:
            try:
                self._reserved.append(_lazy_zeros((self.slots, heads, length, dim), states.dtype))
            except OSError as error:
                if self.slots == 1:
                    raise ConfigError(
                        f"the system cannot reserve addresses for a sequence of {length:,} tokens in the KV cache "
                        f"({error}); raise its limit (ulimit -v) or lower cache_memory"
                    ) from error
                self.slots //= 2  # the system does not overcommit memory
            else:
                return self._reserved[-1][1]

    def _write(self, memory: Tensor, states: Tensor) -> None:
        if len(self.layout.chunks) == 1:
            (chunk,) = self.layout.chunks
            memory[chunk.slot, :, chunk.positions.start : chunk.positions.stop] = states
        else:
            memory[self.layout.places, :, self.layout.positions] = states.transpose(0, 1)


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[mmap.mmap | None, Tensor]:
    """Zeros whose memory is allocated on write."""
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        return None, torch.zeros(shape, dtype=dtype)
    size = math.prod(shape) * dtype.itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (_MAP_NORESERVE if sys.platform == "linux" else 0)
    memory = mmap.mmap(-1, size, flags=flags)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):  # the first token would allocate a whole huge page
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory, torch.frombuffer(memory, dtype=dtype).view(shape)


_MAP_NORESERVE = 0x4000  # Linux; in the mmap module since Python 3.12


class PagedCache(KVCache):
    """Cache in pages of one allocation, shape (N, page, H, D). Padding is written to page 0.

    Attributes:
        pages: slot -> its pages, in order.
        table: the same on the device, shape (S + 1, P), int32; the last row is for padding.
    """

    def __init__(self, capacity: int, max_length: int | None, device: torch.device) -> None:
        super().__init__(capacity, max_length)
        self.pages: dict[int, list[int]] = {}
        self.table = torch.zeros(self.slots + 1, self.max_length // PAGE, dtype=torch.int32, device=device)
        self._free = list(range(self.capacity // PAGE, 0, -1))

    def hold(self, slot: int, length: int) -> None:
        super().hold(slot, length)
        pages = self.pages.setdefault(slot, [])
        before, after = len(pages), self.held.get(slot, 0) // PAGE
        if after > before:
            assert after - before <= len(self._free), "the caller must release missing pages first"
            pages += [self._free.pop() for _ in range(after - before)]
            self.table[slot, before:after] = to_device(pages[before:], self.table.device, torch.int32)

    def release(self, slot: int, *, wipe: bool = False) -> None:
        super().release(slot)
        pages = self.pages.pop(slot, [])
        self._free += reversed(pages)
        for layer in self.memory.values() if wipe and pages else ():
            for memory in layer:
                memory[to_device(pages, memory.device)] = 0

    def copy(self, source: int, target: int, length: int) -> None:
        count = in_pages(length) // PAGE
        for layer in self.memory.values():
            for memory in layer:
                sources, targets = (to_device(self.pages[slot][:count], memory.device) for slot in (source, target))
                memory[targets] = memory[sources]

    def view(self, memory: Tensor, slots: slice, length: int) -> Tensor:
        pages = self.table[slots, : -(-length // PAGE)].to(memory.device)
        return memory[pages].flatten(1, 2)[:, :length].transpose(1, 2)

    def places(self, slot: int, positions: range) -> list[int]:
        """Indices of a slot's positions among all positions of all pages."""
        pages = self.pages[slot]
        return [pages[at // PAGE] * PAGE + at % PAGE for at in positions]

    def _allocate(self, states: Tensor) -> Tensor:
        # Masked columns have weight 0, and 0 * NaN would reach the output, so memory must be initialised.
        return states.new_zeros(self.capacity // PAGE + 1, PAGE, states.shape[1], states.shape[3])

    def _write(self, memory: Tensor, states: Tensor) -> None:
        memory.view(-1, *memory.shape[2:]).index_copy_(0, self.layout.places.to(memory.device), states.transpose(0, 1))
