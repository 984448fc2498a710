"""The KV slots of one model: which tokens each holds, what a new sequence can take over, and their memory."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch

from collm.engine.kv_cache import PAGE, SlotMemory, in_pages
from collm.errors import CacheFull, ConfigError, RequestError
from collm.models.language_model import LanguageModel
from collm.models.llama import LlamaModel
from collm.text.token_ids import common_prefix

MIN_SHARED = 16
"""Shortest prefix that is copied from another slot instead of being read again."""


class SlotTable(ABC):
    """The slots of one model.

    A closed slot keeps its KV cache until the memory is needed. The next turn of a chat, or another completion of the
    same prompt, then reads only its new tokens.

    Attributes:
        max_length: largest number of tokens of a sequence in the model's context; None if unlimited.
        capacity: positions that all slots together can hold, in whole pages (`kv_cache.in_pages`).
        bytes_per_position: memory of a token's keys and values; 0 until it is measured.
        default_positions: largest capacity unless a size of the cache is given; None if unlimited.
    """

    default_positions: int | None = None

    def __init__(self, model: LanguageModel | LlamaModel) -> None:
        self.name = model.name
        self.device = model.device
        self.max_length = model.max_length
        self._limit = math.inf if model.max_length is None else model.max_length
        self.bytes_per_position = 0
        self._texts: list[list[int]] = []  # slot -> the tokens in its cache
        self._closed: list[int] = []  # free slots, the longest free first
        self._cache: SlotMemory

    @property
    def open_slots(self) -> int:
        return len(self._texts) - len(self._closed)

    @property
    def most_slots(self) -> int:
        """Number of slots that can be open at once."""
        return self._cache.slots

    @property
    def cache_bytes(self) -> int:
        """Memory of keys and values."""
        return self._cache.allocated_bytes

    def set_capacity(self, positions: int) -> None:
        """Allocate a new cache of `positions` positions. The content of closed slots is dropped."""
        if positions < PAGE:
            raise ConfigError(
                f"the KV cache memory of {self.name} holds {positions} tokens of {self.bytes_per_position:,} "
                f"bytes each, expected at least {PAGE}; raise cache_memory"
            )
        assert not self.open_slots
        self._texts, self._closed = [], []
        self._cache = self._new_cache(positions)
        self.capacity = self._cache.capacity

    @abstractmethod
    def _new_cache(self, positions: int) -> SlotMemory: ...

    @torch.inference_mode()
    def open(self, token_ids: Sequence[int] = ()) -> int:
        """Open a slot for a new sequence `token_ids`. It may already hold a prefix of them, but not all."""
        source, shared = _longest_prefix(self._texts, token_ids)
        loses_little = source in self._closed and 2 * shared >= len(self._texts[source])
        slot = source if loses_little else self._free_slot()
        if slot != source:
            self._cache.release(slot)
            try:
                if shared:
                    self._make_room({slot: shared}, except_slot=source)
                    self._cache.copy(source, slot, shared)
            except CacheFull:
                shared = 0
        if slot in self._closed:
            self._closed.remove(slot)
        self._texts[slot] = list(token_ids[:shared])
        return slot

    @torch.inference_mode()
    def close(self, slot: int, *, wipe: bool = False) -> None:
        """Close the slot. `wipe` wipes its cache, which is necessary after the model returned NaN."""
        self._closed.append(slot)
        if wipe:
            self._drop(slot, wipe=True)

    @torch.inference_mode()
    def forget(self) -> None:
        """Drop the caches of closed slots. Call this when the model's weights have changed."""
        for slot in self._closed:
            self._drop(slot)
        self._closed.sort()
        if not self.open_slots:
            self._texts, self._closed = [], []

    def length(self, slot: int) -> int:
        """Number of tokens in the slot's cache."""
        return len(self._texts[slot])

    def rollback(self, slot: int, length: int) -> None:
        """Drop everything after the first `length` tokens."""
        assert 0 <= length <= len(self._texts[slot])
        del self._texts[slot][length:]

    def _make_room(self, lengths: Mapping[int, int], *, except_slot: int = -1) -> None:
        """Allocate cache for `lengths` tokens of slots that hold less, dropping caches of closed slots if necessary.

        Raises:
            RequestError: a length exceeds the model's context.
            CacheFull: the open slots use too much of the cache.
        """
        cache, longest = self._cache, max(lengths.values())
        if longest > self._limit:
            raise RequestError(f"{self.name} reads at most {self.max_length} tokens, got a sequence of {longest}")
        growth = sum([in_pages(length) - cache.held.get(slot, 0) for slot, length in lengths.items()])
        missing = cache.used + growth - cache.capacity
        for slot in self._closed:
            if missing > 0 and slot not in (*lengths, except_slot):
                missing -= cache.held.get(slot, 0)
                self._drop(slot)
        if missing > 0:
            raise CacheFull(
                f"the KV cache of {self.name} holds {cache.capacity:,} tokens, {missing:,} too few for the "
                "running sequences; raise cache_memory or decode fewer sequences at once"
            )
        for slot, length in lengths.items():
            cache.hold(slot, length)

    def _drop(self, slot: int, *, wipe: bool = False) -> None:
        self._texts[slot].clear()
        self._cache.release(slot, wipe=wipe)

    def _free_slot(self) -> int:
        """An empty closed slot, else the one closed first, else a new one. Low numbers keep active slots adjacent."""
        if self._closed:
            return min(self._closed, key=lambda slot: slot if not self._texts[slot] else len(self._texts))
        if len(self._texts) == self.most_slots:
            raise CacheFull(f"{self.name} has no free slot; all {self.most_slots} slots are open")
        self._texts.append([])
        return len(self._texts) - 1


def _longest_prefix(texts: Sequence[Sequence[int]], token_ids: Sequence[int]) -> tuple[int, int]:
    """The slot with the longest common prefix with `token_ids[:-1]`, and its length; (-1, 0) if it is too short."""
    wanted = list(token_ids[:-1])
    shared = [common_prefix(wanted, text) for text in texts]
    longest = max(shared, default=0)
    return (shared.index(longest), longest) if longest >= MIN_SHARED else (-1, 0)
