"""Runs a language model over sequences in KV slots, which are extended and rolled back independently."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from collm.core.types import ModelUsage
from collm.engine.cache_memory import share_cache_memory
from collm.engine.kv_cache import KVCache, PagedCache, ReservedCache
from collm.engine.packed_pass import PackedPass, SlotTokens, register_attention, run_model
from collm.engine.slot_check import CHECK_POSITIONS, check_against_plain_forward
from collm.engine.slot_table import SlotTable
from collm.engine.static_passes import StaticPasses, bucket_of, can_run_static
from collm.errors import UnsupportedModel
from collm.models.assistant import ModelOutput
from collm.models.language_model import LanguageModel

_LOG = logging.getLogger(__name__)


class ModelRunner(SlotTable):
    """Runs one language model over many ragged sequences.

    Args:
        model: the model, which is unmodified between calls.
        max_pass_tokens: largest number of new tokens in a forward pass; longer extends are split.
        static: run small passes in fixed shapes, on a GPU as CUDA graphs; defaults to true on a GPU. If the model
            does not support it, a warning is logged and passes run eagerly.
        cache_memory: memory for the KV cache, as in `cache_memory.cache_bytes`; None for the default share.

    Raises:
        UnsupportedModel: the model's logits through the slots differ from those of a forward pass without a cache.
    """

    may_abstain = False
    _cache: KVCache

    def __init__(
        self,
        model: LanguageModel,
        *,
        max_pass_tokens: int = 4096,
        static: bool | None = None,
        cache_memory: str | int | None = None,
    ) -> None:
        register_attention()
        super().__init__(model)
        self.model = model
        self._input_device = model.input_device
        self._paged = model.device.type != "cpu" or bool(static)
        self.usage = ModelUsage()
        self.max_pass_tokens = max_pass_tokens
        windows = [getattr(model.config, name, None) for name in ("sliding_window", "attention_chunk_size")]
        self._window = min(filter(None, windows), default=None)
        self._static: StaticPasses | None = None
        self._is_static = False
        self.set_capacity(CHECK_POSITIONS)
        check_against_plain_forward(model, self)
        self.bytes_per_position = self._cache.bytes_per_position
        if can_run_static(model) and (model.device.type == "cuda" if static is None else static):
            self._is_static = True
            try:
                self.set_capacity(CHECK_POSITIONS)
                check_against_plain_forward(model, self)
            except UnsupportedModel as error:
                self._fall_back_to_eager(error)
                self._texts, self._closed = [], []
        self.usage = ModelUsage()
        share_cache_memory([self], cache_memory)

    @property
    def is_static(self) -> bool:
        """Whether small passes run in fixed shapes."""
        return self._static is not None

    def _fall_back_to_eager(self, error: UnsupportedModel) -> None:
        _LOG.warning("%s runs without CUDA graphs, which is slower: %s", self.name, error)
        self._is_static, self._static = False, None

    def set_capacity(self, positions: int) -> None:
        super().set_capacity(positions)
        if self._is_static:
            assert isinstance(self._cache, PagedCache)
            self._static = StaticPasses(self.model, self._cache)

    def _new_cache(self, positions: int) -> KVCache:
        if self._paged:
            return PagedCache(positions, self.max_length, self._input_device)
        return ReservedCache(positions, self.max_length)

    @torch.inference_mode()
    def prepare(self, most_rows: int) -> None:
        """Capture the static passes of up to `most_rows` sequences in advance."""
        if self._static is None:
            return
        try:
            self._static.prepare(most_rows)
        except UnsupportedModel as error:
            self._fall_back_to_eager(error)

    @torch.inference_mode()
    def extend(self, unseen: Mapping[int, Sequence[int]], keep: Mapping[int, int] | None = None) -> ModelOutput:
        """Read the unread tokens of each slot, at least one per slot.

        Args:
            unseen: slot -> token ids to append.
            keep: slot -> number of its last new tokens to return output for; defaults to 1.

        Returns:
            The output of each slot's last tokens, slot by slot in the order of `unseen`. NaN in one sequence does not
            affect the others.

        Raises:
            RequestError: a sequence would exceed the model's context.
            CacheFull: the open slots use too much of the cache.
            Exception: the model raised it. Every slot is then as before the call.
        """
        hidden, logits = self._read(unseen, keep or dict.fromkeys(unseen, 1))
        output = ModelOutput(self.model.logits(hidden) if logits is None else logits, hidden)
        for slot, token_ids in unseen.items():
            self._texts[slot] += token_ids
        return output

    @torch.inference_mode()
    def extend_hidden(self, unseen: Mapping[int, Sequence[int]]) -> tuple[Tensor, Callable[[list[int]], Tensor]]:
        """Read like `extend`, but compute logits on demand.

        Returns:
            The hidden state after the last token of each slot, shape (R, H), and a function that maps n of these rows
            to their logits, shape (n, V).
        """
        hidden, logits = self._read(unseen, dict.fromkeys(unseen, 1))
        for slot, token_ids in unseen.items():
            self._texts[slot] += token_ids
        return hidden, lambda rows: self.model.logits(hidden[rows]) if logits is None else logits[rows]

    def _read(self, unseen: Mapping[int, Sequence[int]], keep: Mapping[int, int]) -> tuple[Tensor, Tensor | None]:
        """Read tokens. Returns hidden states (R, H) of the rows to keep, and logits (R, V) if a pass computed them."""
        chunks = self.chunks(unseen, keep)
        size = sum([len(chunk.positions) for chunk in chunks])
        passes = [chunks] if size <= self.max_pass_tokens else _split(chunks, self.max_pass_tokens)
        self.usage.forward_passes += len(passes) - 1
        states = []
        for part in passes:
            bucket = bucket_of([len(chunk.positions) for chunk in part]) if self._static else None
            if self._static is not None and bucket is not None:
                hidden, logits = self._static.run(bucket, part)
            else:
                layout = PackedPass(part, self._cache, self._input_device, self._window)
                hidden, logits = run_model(self.model, self._cache, layout), None
                if layout.kept is not None:
                    hidden = hidden[layout.kept.to(hidden.device)]
            states.append(hidden)
        return (states[0], logits) if len(states) == 1 else (torch.cat(states), None)

    def chunks(self, unseen: Mapping[int, Sequence[int]], keep: Mapping[int, int]) -> list[SlotTokens]:
        """What a pass reads of each slot, which now has room for it."""
        chunks = []
        for slot, token_ids in unseen.items():
            assert token_ids, "every slot needs at least one new token"
            start = len(self._texts[slot])
            chunks.append(SlotTokens(slot, range(start, start + len(token_ids)), token_ids, keep[slot]))
        held, limit, ends = self._cache.held, self._limit, [(chunk.slot, chunk.positions.stop) for chunk in chunks]
        if grown := {slot: end for slot, end in ends if end > held.get(slot, 0) or end > limit}:
            self._make_room(grown)
        self.usage.tokens_read += sum([len(chunk.positions) for chunk in chunks])
        self.usage.forward_passes += 1
        return chunks

    def layout(self, unseen: Mapping[int, Sequence[int]], keep: Mapping[int, int]) -> PackedPass:
        """The layout of a pass over unread tokens, for a pass of several runners. `note` records that it has been."""
        return PackedPass(self.chunks(unseen, keep), self._cache, self._input_device, self._window)

    def note(self, unseen: Mapping[int, Sequence[int]]) -> None:
        """Record what a pass of several runners has read."""
        for slot, token_ids in unseen.items():
            self._texts[slot] += token_ids


def _split(chunks: Sequence[SlotTokens], budget: int) -> list[list[SlotTokens]]:
    """Split chunks into passes of at most `budget` tokens, in order."""
    passes: list[list[SlotTokens]] = [[]]
    room = budget
    for slot, positions, token_ids, keep in chunks:
        at = 0
        while at < len(positions):
            if room == 0:
                passes.append([])
                room = budget
            end = min(at + room, len(positions))
            kept = max(end - max(len(positions) - keep, at), 0)
            passes[-1].append(SlotTokens(slot, positions[at:end], token_ids[at:end], kept))
            room -= end - at
            at = end
    return passes
