"""Runs a GGUF model in llama.cpp over sequences in KV slots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch

from collm.core.types import ModelUsage
from collm.engine.cache_memory import share_cache_memory
from collm.engine.kv_cache import SlotMemory
from collm.engine.slot_table import SlotTable
from collm.models.assistant import ModelOutput
from collm.models.llama import MAX_BATCH, MOST_SEQUENCES, LlamaContext, LlamaModel, LlamaToken

FEW_UNWANTED = 16
"""Number of tokens without output from which the base reads them in a pass of their own, without hidden states."""


class LlamaRunner(SlotTable):
    """Runs one GGUF model over many ragged sequences, which share one context of llama.cpp.

    Args:
        hidden: whether to return hidden states, which the head of the base reads.
        cache_memory: memory for the KV cache, as in `cache_memory.cache_bytes`.
    """

    may_abstain = False
    default_positions = 1 << 14  # llama.cpp allocates the whole cache at once
    _cache: LlamaSlots

    def __init__(self, model: LlamaModel, *, hidden: bool = True, cache_memory: str | int | None = None) -> None:
        super().__init__(model)
        self.model = model
        self.usage = ModelUsage()
        self.bytes_per_position = model.bytes_per_position
        self._hidden = hidden
        share_cache_memory([self], cache_memory)

    def _new_cache(self, positions: int) -> SlotMemory:
        return LlamaSlots(self.model, positions)

    def prepare(self, most_rows: int) -> None:
        """Create the context in advance."""
        assert self._cache.context

    @torch.inference_mode()
    def extend(self, unseen: Mapping[int, Sequence[int]], keep: Mapping[int, int] | None = None) -> ModelOutput:
        """Read the unread tokens of each slot; arguments, output and errors as in `ModelRunner.extend`."""
        starts = {slot: len(self._texts[slot]) for slot in unseen}
        positions = {slot: range(starts[slot], starts[slot] + len(token_ids)) for slot, token_ids in unseen.items()}
        held, limit, ends = self._cache.held, self._limit, [(slot, one.stop) for slot, one in positions.items()]
        if grown := {slot: end for slot, end in ends if end > held.get(slot, 0) or end > limit}:
            self._make_room(grown)
        for slot, places in positions.items():
            assert places, "every slot needs at least one new token"
            self._cache.reach(slot, places)
        tokens = [
            LlamaToken(slot, position, token_id, places.stop - position <= (keep[slot] if keep else 1))
            for slot, places in positions.items()
            for position, token_id in zip(places, unseen[slot], strict=True)
        ]
        self.usage.tokens_read += len(tokens)
        unwanted = [token for token in tokens if not token.wanted] if self._hidden else []
        if len(unwanted) >= FEW_UNWANTED:
            self._decode(unwanted)
            tokens = [token for token in tokens if token.wanted]
        output = self._decode(tokens)
        for slot, token_ids in unseen.items():
            self._texts[slot] += token_ids
        return output

    def _decode(self, tokens: Sequence[LlamaToken]) -> ModelOutput:
        """Read tokens in as many calls as they need."""
        parts = []
        for at in range(0, len(tokens), MAX_BATCH):
            part = tokens[at : at + MAX_BATCH]
            hidden = self._hidden and any(token.wanted for token in part)
            parts.append(self._cache.context.decode(part, hidden=hidden))
            self.usage.forward_passes += 1
        if len(parts) == 1:
            return ModelOutput(*parts[0])
        states = [hidden for _, hidden in parts if hidden is not None]
        return ModelOutput(torch.cat([logits for logits, _ in parts]), torch.cat(states) if states else None)


class LlamaSlots(SlotMemory):
    """The slots of a context of llama.cpp, which is created on the first use."""

    slots = MOST_SEQUENCES

    def __init__(self, model: LlamaModel, capacity: int) -> None:
        super().__init__(capacity, model.max_length)
        self.bytes_per_position = model.bytes_per_position
        self._model = model
        self._read: dict[int, int] = {}  # slot -> positions that the context may hold, some of which were rolled back

    @cached_property
    def context(self) -> LlamaContext:
        return LlamaContext(self._model, positions=self.capacity, sequences=self.slots)

    def reach(self, slot: int, positions: range) -> None:
        """Drop what the slot holds from the first of these positions on, before they are read."""
        if self._read.get(slot, 0) > positions.start:
            self.context.cut(slot, positions.start)
        self._read[slot] = positions.stop

    def release(self, slot: int, *, wipe: bool = False) -> None:
        super().release(slot)
        if self._read.pop(slot, 0):
            self.context.cut(slot, 0)

    def copy(self, source: int, target: int, length: int) -> None:
        self.context.copy(source, target, length)
        self._read[target] = length
