"""Where keys and values of the slots lie: memory at fixed addresses that is never copied to grow.

On a CPU every slot has addresses for the longest sequence that the model reads, and the operating system provides
memory as they are first written (`ReservedCache`). Other devices have no such memory: there a slot holds pages of one
allocation (`PagedCache`). Both count positions in whole pages and hold no more of them than their capacity.

Slots keep every position (sliding windows are a matter of the mask), so a rollback is a smaller length and no more.

Shapes: T new tokens of a pass, S slots, H key heads, L positions, D head dimension, N pages.
"""

from __future__ import annotations

import math
import mmap
import sys
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from collm.core.transfers import to_device
from collm.errors import ConfigError, RequestError
from collm.models.slots import PackedPass, Row, StaticPass

PAGE = 16
"""Positions in a page."""
MOST_SLOTS = 1024
LONGEST = 1 << 17
"""Positions of a slot if the model's config names no limit."""


def in_pages(length: int) -> int:
    """Positions of the pages that hold so many tokens."""
    return -(-length // PAGE) * PAGE


class KVCache(Cache):  # type: ignore[misc]
    """The cache handed to the model.

    Args:
        num_layers: of the model.
        capacity: most positions that all slots together hold.
        max_length: most positions of one slot; None for the most that is supported.

    Attributes:
        layout: of the pass that is being made.
        held: positions that each slot holds, in whole pages.
        used: the sum of those.
        slots: most slots.
    """

    layers: list[KVLayer]

    slots: int

    def __init__(self, num_layers: int, capacity: int, max_length: int | None) -> None:
        self.capacity = capacity // PAGE * PAGE
        self.max_length = min(in_pages(max_length or LONGEST), self.capacity)
        self.held: dict[int, int] = {}
        self.used = 0
        self.layout: PackedPass | StaticPass
        super().__init__(layers=[self._layer() for _ in range(num_layers)])

    @abstractmethod
    def _layer(self) -> KVLayer:
        """One layer, without memory yet: its shape is known when the model first writes to it."""

    @property
    def bytes_per_position(self) -> int:
        """Of all layers; known once the model has written something."""
        return sum(layer.bytes_per_position for layer in self.layers)

    @property
    def allocated_bytes(self) -> int:
        """Memory that the slots hold."""
        return self.used * self.bytes_per_position

    def missing(self, lengths: Mapping[int, int]) -> int:
        """Positions that must be released before these slots can hold so many tokens; 0 or less if none."""
        growth = sum(max(in_pages(length) - self.held.get(slot, 0), 0) for slot, length in lengths.items())
        return self.used + growth - self.capacity

    def hold(self, slot: int, length: int) -> None:
        """Make room for so many tokens in a slot.

        Raises:
            RequestError: they are more than a slot holds.
        """
        if length > self.max_length:
            raise RequestError(
                f"a sequence of {length} tokens came, but the key-value cache holds at most {self.max_length} of one "
                "sequence; raise cache_memory"
            )
        before, after = self.held.get(slot, 0), in_pages(length)
        if after > before:
            self.held[slot] = after
            self.used += after - before
            self._grow(slot, before, after)

    def release(self, slot: int, *, spoiled: bool = False) -> None:
        """Give a slot's memory back; `spoiled` if there may be NaN in it, which nobody must see again."""
        held = self.held.pop(slot, 0)
        self.used -= held
        if held:
            self._release(slot, held, spoiled)

    def copy(self, source: int, target: int, length: int) -> None:
        """Give `target`, which has room for them, the first `length` tokens of `source`."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.copy(source, target, length)

    @abstractmethod
    def _grow(self, slot: int, before: int, after: int) -> None: ...

    @abstractmethod
    def _release(self, slot: int, held: int, spoiled: bool) -> None: ...

    def get_query_offset(self, layer_idx: int = 0) -> Tensor | None:
        """Absolute position of every packed token, (T,), which transformers hands to the mask; None for no mask."""
        return self.layout.positions if self.layout.needs_mask else None


class KVLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer."""

    is_sliding = False
    is_croppable = True
    keys: Tensor
    values: Tensor

    is_initialized: bool

    def __init__(self, cache: KVCache) -> None:
        super().__init__()
        self.cache = cache

    @property
    def bytes_per_position(self) -> int:
        """Of keys and values."""
        if not self.is_initialized:
            return 0
        return self._of_position(self.keys) + self._of_position(self.values)

    @abstractmethod
    def _of_position(self, memory: Tensor) -> int: ...

    @abstractmethod
    def copy(self, source: int, target: int, length: int) -> None: ...

    @abstractmethod
    def write(self, key_states: Tensor, value_states: Tensor) -> None:
        """Store (1, H, T, D) at the pass's slots and positions."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store what is new; return the whole memory, of which the pass knows what to read."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.is_initialized = True
        self.write(key_states, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.layout.kv_length, 0

    def get_seq_length(self) -> int:
        return self.cache.layout.kv_length - self.cache.layout.most_new

    def get_max_length(self) -> int:
        return -1


class ReservedLayer(KVLayer):
    """Keys and values as (S, H, L, D) for the most slots and the longest sequence, in memory that fills as written."""

    cache: ReservedCache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self._memory: list[mmap.mmap | None] = []
        self.keys, self.values = (self._reserve(states) for states in (key_states, value_states))

    def _reserve(self, states: Tensor) -> Tensor:
        _, heads, _, dim = states.shape
        # A slot begins on a page of the operating system's; an odd number of them keeps slots apart in CPU caches.
        step = mmap.PAGESIZE // math.gcd(mmap.PAGESIZE, heads * dim * states.element_size())
        length = (-(-self.cache.max_length // step) | 1) * step
        shape = (heads, length, dim)
        return self._reserved(shape, states.dtype)

    def _reserved(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        while True:
            try:
                memory, tensor = _untouched_zeros((self.cache.slots, *shape), dtype)
            except OSError as error:
                if self.cache.slots == 1:
                    raise ConfigError(
                        f"the system refuses the addresses of one sequence of {shape[1]:,} tokens in the key-value "
                        f"cache ({error}); raise its limit (ulimit -v) or lower cache_memory"
                    ) from error
                self.cache.slots //= 2  # the system does not promise more than it has
            else:
                self._memory.append(memory)
                return tensor

    def _of_position(self, memory: Tensor) -> int:
        return memory.shape[1] * memory.shape[3] * memory.element_size()

    def copy(self, source: int, target: int, length: int) -> None:
        self.keys[target, :, :length] = self.keys[source, :, :length]
        self.values[target, :, :length] = self.values[source, :, :length]

    def write(self, key_states: Tensor, value_states: Tensor) -> None:
        layout = cast(PackedPass, self.cache.layout)
        if len(layout.rows) == 1:
            row = layout.rows[0]
            self.keys[row.slot, :, row.start : row.end] = key_states[0]
            self.values[row.slot, :, row.start : row.end] = value_states[0]
        else:
            at = layout.slot_of, slice(None), layout.positions
            self.keys[at] = key_states[0].transpose(0, 1)
            self.values[at] = value_states[0].transpose(0, 1)

    @property
    def held(self) -> tuple[Tensor, ...]:
        """Keys and values, where there are some."""
        return (self.keys, self.values) if self.is_initialized else ()

    def release(self, slot: int, held: int) -> None:
        for memory, tensor in zip(self._memory, (self.keys, self.values), strict=True):
            if memory is not None and sys.platform == "linux":
                size = tensor[0].nbytes
                memory.madvise(mmap.MADV_DONTNEED, slot * size, size)  # reads as zeros again
            else:
                tensor[slot, :, :held] = 0


class ReservedCache(KVCache):
    """A cache on a CPU: addresses for all, memory for what is held."""

    layers: list[ReservedLayer]

    def __init__(self, num_layers: int, capacity: int, max_length: int | None) -> None:
        self.slots = MOST_SLOTS
        super().__init__(num_layers, capacity, max_length)

    def _layer(self) -> KVLayer:
        return ReservedLayer(self)

    @property
    def allocated_bytes(self) -> int:
        """Memory that the slots hold, in whole pages of the operating system."""
        rows = [
            (memory.shape[1], memory.stride(2) * memory.element_size()) for one in self.layers for memory in one.held
        ]
        pages = (heads * -(-held * size // mmap.PAGESIZE) for heads, size in rows for held in self.held.values())
        return sum(pages) * mmap.PAGESIZE

    def _grow(self, slot: int, before: int, after: int) -> None:
        pass

    def _release(self, slot: int, held: int, spoiled: bool) -> None:
        for layer in self.layers:
            if layer.is_initialized:
                layer.release(slot, held)


def _untouched_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[mmap.mmap | None, Tensor]:
    """Zeros that take memory only once they are written."""
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        return None, torch.zeros(shape, dtype=dtype)
    size = math.prod(shape) * dtype.itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (_MAP_NORESERVE if sys.platform == "linux" else 0)
    memory = mmap.mmap(-1, size, flags=flags)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):  # a huge page would be taken whole for the first token in it
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory, torch.frombuffer(memory, dtype=dtype).view(shape)


_MAP_NORESERVE = 0x4000  # of Linux; Python names it from 3.12 on


class PagedLayer(KVLayer):
    """Keys and values as (N, page, H, D); page 0 takes what padding writes."""

    cache: PagedCache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Zeros, not empty: a masked column has weight 0, and 0 * NaN would reach the output.
        pages = self.cache.capacity // PAGE + 1
        self.keys, self.values = (
            states.new_zeros(pages, PAGE, states.shape[1], states.shape[3]) for states in (key_states, value_states)
        )

    def _of_position(self, memory: Tensor) -> int:
        return memory[0, 0].nbytes

    def copy(self, source: int, target: int, length: int) -> None:
        count = in_pages(length) // PAGE
        sources, targets = (to_device(self.cache.pages[slot][:count], self.keys.device) for slot in (source, target))
        for memory in (self.keys, self.values):
            memory[targets] = memory[sources]

    def write(self, key_states: Tensor, value_states: Tensor) -> None:
        places = self.cache.layout.places
        assert places is not None
        for memory, states in ((self.keys, key_states), (self.values, value_states)):
            memory.view(-1, *memory.shape[2:]).index_copy_(0, places.to(memory.device), states[0].transpose(0, 1))

    def wipe(self, pages: list[int]) -> None:
        for memory in (self.keys, self.values):
            memory[to_device(pages, memory.device)] = 0


class PagedCache(KVCache):
    """A cache in pages of one allocation, taken at the first write.

    Attributes:
        pages: slot -> its pages, in order.
        table: the same on the device, shape (S + 1, P), int32; its last row is that of padding.
    """

    layers: list[PagedLayer]

    def __init__(self, num_layers: int, capacity: int, max_length: int | None, device: torch.device) -> None:
        super().__init__(num_layers, capacity, max_length)
        self.slots = MOST_SLOTS
        self.pages: dict[int, list[int]] = {}
        self.table = torch.zeros(self.slots + 1, self.max_length // PAGE, dtype=torch.int32, device=device)
        self._free = list(range(self.capacity // PAGE, 0, -1))

    def _layer(self) -> KVLayer:
        return PagedLayer(self)

    def _grow(self, slot: int, before: int, after: int) -> None:
        count = (after - before) // PAGE
        taken = self._free[-count:][::-1]
        assert len(taken) == count, "the caller releases what is missing first"
        del self._free[-count:]
        self.pages.setdefault(slot, []).extend(taken)
        self.table[slot, before // PAGE : after // PAGE] = to_device(taken, self.table.device, torch.int32)

    def _release(self, slot: int, held: int, spoiled: bool) -> None:
        pages = self.pages.pop(slot)
        self._free += reversed(pages)
        for layer in self.layers:
            if spoiled and layer.is_initialized:
                layer.wipe(pages)

    def places(self, row: Row) -> list[int]:
        """Where the new tokens of a row lie among all positions of all pages."""
        pages = self.pages[row.slot]
        return [pages[at // PAGE] * PAGE + at % PAGE for at in range(row.start, row.end)]
