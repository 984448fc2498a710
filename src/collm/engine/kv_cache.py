"""KV caches whose keys and values never move.

On a CPU every slot reserves addresses for the longest sequence, and the operating system provides memory on the first
write (`ReservedCache`). On other devices a slot holds pages of one allocation (`PagedCache`). Both count positions in
whole pages, up to their capacity.

Slots keep every position, and masks implement sliding windows, so a rollback only lowers a length.

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
import transformers
from packaging.version import Version
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from collm.core.transfers import to_device
from collm.engine.slots import PackedPass, Row, StaticPass
from collm.errors import ConfigError, RequestError

PAGE = 16
"""Positions per page."""
MOST_SLOTS = 1024
LONGEST = 1 << 17
"""Maximum length of a slot if the model's config has no limit."""
_ARGUMENT = "cache" if Version(transformers.__version__).release >= (5, 24) else "past_key_values"
"""The argument by which a model takes its cache; transformers renamed it in 5.24."""


def in_pages(length: int) -> int:
    """Round a length up to whole pages."""
    return -(-length // PAGE) * PAGE


class KVCache(Cache):  # type: ignore[misc]
    """Base class of the caches.

    Args:
        num_layers: number of layers of the model.
        capacity: largest number of positions of all slots together.
        max_length: largest number of positions of one slot; None for `LONGEST`.

    Attributes:
        layout: layout of the current pass.
        held: slot -> its allocated positions, in whole pages.
        used: the sum of `held`.
        slots: largest number of slots.
    """

    layers: list[KVLayer]
    slots: int

    def __init__(self, num_layers: int, capacity: int, max_length: int | None) -> None:
        self.capacity = capacity // PAGE * PAGE
        self.max_length = min(in_pages(max_length or LONGEST), self.capacity)
        self.held: dict[int, int] = {}
        self.used = 0
        self.layout: PackedPass | StaticPass
        super().__init__(layers=[self._layer_class(self) for _ in range(num_layers)])

    @property
    def as_argument(self) -> dict[str, KVCache]:
        """Keyword argument that passes the cache to a model."""
        return {_ARGUMENT: self}

    @property
    @abstractmethod
    def _layer_class(self) -> type[KVLayer]: ...

    @property
    def bytes_per_position(self) -> int:
        """Memory of one position in all layers; 0 before the first write."""
        return sum(layer.bytes_per_position for layer in self.layers)

    @property
    def allocated_bytes(self) -> int:
        """Memory allocated to slots."""
        return self.used * self.bytes_per_position

    def missing(self, lengths: Mapping[int, int]) -> int:
        """Positions to release before the slots can hold `lengths` tokens; 0 or less if none."""
        growth = sum(max(in_pages(length) - self.held.get(slot, 0), 0) for slot, length in lengths.items())
        return self.used + growth - self.capacity

    def hold(self, slot: int, length: int) -> None:
        """Allocate `length` positions for a slot.

        Raises:
            RequestError: `length` exceeds the maximum length of a slot.
        """
        if length > self.max_length:
            raise RequestError(
                f"a sequence has {length} tokens, but the KV cache holds at most {self.max_length} tokens per "
                "sequence; raise cache_memory"
            )
        before, after = self.held.get(slot, 0), in_pages(length)
        if after > before:
            self.held[slot] = after
            self.used += after - before
            self._grow(slot, before, after)

    def release(self, slot: int, *, wipe: bool = False) -> None:
        """Free a slot's memory. `wipe` wipes it, because it may contain NaN."""
        held = self.held.pop(slot, 0)
        self.used -= held
        if held:
            self._release(slot, held, wipe)

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of slot `source` to `target`, which must have room."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.copy(source, target, length)

    def _grow(self, slot: int, before: int, after: int) -> None:
        """Allocate more positions of a slot, if the memory does not grow on write."""

    @abstractmethod
    def _release(self, slot: int, held: int, wipe: bool) -> None: ...

    def get_query_offset(self, layer_idx: int = 0) -> Tensor | None:
        """Absolute position of every packed token, (T,), for the mask function; None if no mask is needed."""
        return self.layout.positions if self.layout.needs_mask else None


class KVLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer. Memory is allocated on the first write, when its shape is known."""

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
        """Memory of one position's keys and values."""
        if not self.is_initialized:
            return 0
        return self._bytes_of_position(self.keys) + self._bytes_of_position(self.values)

    @abstractmethod
    def _bytes_of_position(self, memory: Tensor) -> int: ...

    @abstractmethod
    def copy(self, source: int, target: int, length: int) -> None: ...

    @abstractmethod
    def write(self, key_states: Tensor, value_states: Tensor) -> None:
        """Store keys and values (1, H, T, D) at the slots and positions of the current layout."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values, and return the whole memory."""
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
    """Keys and values of shape (S, H, L, D), reserved for all slots and lengths and allocated on write."""

    cache: ReservedCache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self._memory: list[mmap.mmap | None] = []
        self.keys, self.values = (self._reserve(states) for states in (key_states, value_states))

    def _reserve(self, states: Tensor) -> Tensor:
        _, heads, _, dim = states.shape
        # Align slots to pages of the operating system. An odd number of them avoids conflicts in CPU caches.
        step = mmap.PAGESIZE // math.gcd(mmap.PAGESIZE, heads * dim * states.element_size())
        length = (-(-self.cache.max_length // step) | 1) * step
        while True:
            try:
                memory, tensor = _lazy_zeros((self.cache.slots, heads, length, dim), states.dtype)
            except OSError as error:
                if self.cache.slots == 1:
                    raise ConfigError(
                        f"the system cannot reserve addresses for a sequence of {length:,} tokens in the KV cache "
                        f"({error}); raise its limit (ulimit -v) or lower cache_memory"
                    ) from error
                self.cache.slots //= 2  # the system does not overcommit memory
            else:
                self._memory.append(memory)
                return tensor

    def _bytes_of_position(self, memory: Tensor) -> int:
        return memory.shape[1] * memory.shape[3] * memory.element_size()

    def copy(self, source: int, target: int, length: int) -> None:
        for memory in (self.keys, self.values):
            memory[target, :, :length] = memory[source, :, :length]

    def write(self, key_states: Tensor, value_states: Tensor) -> None:
        layout = cast(PackedPass, self.cache.layout)
        if len(layout.rows) == 1:
            row = layout.rows[0]
            at = row.slot, slice(None), slice(row.start, row.end)
            self.keys[at], self.values[at] = key_states[0], value_states[0]
        else:
            places = layout.slot_of, slice(None), layout.positions
            self.keys[places] = key_states[0].transpose(0, 1)
            self.values[places] = value_states[0].transpose(0, 1)

    def release(self, slot: int, held: int) -> None:
        for memory, tensor in zip(self._memory, (self.keys, self.values), strict=True):
            if memory is not None and sys.platform == "linux":
                size = tensor[0].nbytes
                memory.madvise(mmap.MADV_DONTNEED, slot * size, size)  # later reads return zeros
            else:
                tensor[slot, :, :held] = 0


class ReservedCache(KVCache):
    """CPU cache that reserves addresses for all slots and allocates memory on write."""

    layers: list[ReservedLayer]
    slots = MOST_SLOTS
    _layer_class = ReservedLayer

    @property
    def allocated_bytes(self) -> int:
        """Memory allocated to slots, in whole pages of the operating system."""
        memories = [memory for one in self.layers if one.is_initialized for memory in (one.keys, one.values)]
        rows = [(memory.shape[1], memory.stride(2) * memory.element_size()) for memory in memories]
        pages = (heads * -(-held * size // mmap.PAGESIZE) for heads, size in rows for held in self.held.values())
        return sum(pages) * mmap.PAGESIZE

    def _release(self, slot: int, held: int, wipe: bool) -> None:
        for layer in self.layers:
            if layer.is_initialized:
                layer.release(slot, held)


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


class PagedLayer(KVLayer):
    """Keys and values of shape (N, page, H, D). Padding is written to page 0."""

    cache: PagedCache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Masked columns have weight 0, and 0 * NaN would reach the output, so memory must be initialised.
        pages = self.cache.capacity // PAGE + 1
        self.keys, self.values = (
            states.new_zeros(pages, PAGE, states.shape[1], states.shape[3]) for states in (key_states, value_states)
        )

    def _bytes_of_position(self, memory: Tensor) -> int:
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
    """Cache in pages of one allocation, made on the first write.

    Attributes:
        pages: slot -> its pages, in order.
        table: the same on the device, shape (S + 1, P), int32; the last row is for padding.
    """

    layers: list[PagedLayer]
    slots = MOST_SLOTS
    _layer_class = PagedLayer

    def __init__(self, num_layers: int, capacity: int, max_length: int | None, device: torch.device) -> None:
        super().__init__(num_layers, capacity, max_length)
        self.pages: dict[int, list[int]] = {}
        self.table = torch.zeros(self.slots + 1, self.max_length // PAGE, dtype=torch.int32, device=device)
        self._free = list(range(self.capacity // PAGE, 0, -1))

    def _grow(self, slot: int, before: int, after: int) -> None:
        count = (after - before) // PAGE
        taken = self._free[-count:][::-1]
        assert len(taken) == count, "the caller must release missing pages first"
        del self._free[-count:]
        self.pages.setdefault(slot, []).extend(taken)
        self.table[slot, before // PAGE : after // PAGE] = to_device(taken, self.table.device, torch.int32)

    def _release(self, slot: int, held: int, wipe: bool) -> None:
        pages = self.pages.pop(slot)
        self._free += reversed(pages)
        for layer in self.layers:
            if wipe and layer.is_initialized:
                layer.wipe(pages)

    def places(self, row: Row) -> list[int]:
        """Indices of a row's new tokens among all positions of all pages."""
        pages = self.pages[row.slot]
        return [pages[at // PAGE] * PAGE + at % PAGE for at in range(row.start, row.end)]
