"""Runs a language model over sequences in KV slots, which are extended and rolled back independently."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from collm.core.transfers import to_device
from collm.core.types import ModelUsage
from collm.engine.cache_memory import share_cache_memory
from collm.engine.kv_cache import PagedCache
from collm.engine.packed_pass import PackedPass, SlotTokens, run_model
from collm.engine.slot_check import CHECK_POSITIONS, check_against_plain_forward
from collm.engine.slot_table import SlotTable
from collm.engine.static_passes import StaticPasses, bucket_of, can_run_static
from collm.errors import RequestError, UnsupportedModel
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

    def __init__(
        self,
        model: LanguageModel,
        *,
        max_pass_tokens: int = 4096,
        static: bool | None = None,
        cache_memory: str | int | None = None,
    ) -> None:
        super().__init__(model, paged=model.device.type != "cpu" or bool(static))
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

    def _fall_back_to_eager(self, error: UnsupportedModel) -> None:
        _LOG.warning("%s runs without CUDA graphs, which is slower: %s", self.name, error)
        self._is_static, self._static = False, None

    @property
    def runs_ahead(self) -> bool:
        """Whether runs may pay, because the host can be slower than the device."""
        return self._static is not None

    def set_capacity(self, positions: int) -> None:
        super().set_capacity(positions)
        if self._is_static:
            assert isinstance(self._cache, PagedCache)
            self._static = StaticPasses(self.model, self._cache)

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
    def extend(
        self, unseen: Mapping[int, Sequence[int]], keep: Mapping[int, int] | None = None, *, run: int = 0
    ) -> ModelOutput:
        """Read the unread tokens of each slot, at least one per slot.

        Args:
            unseen: slot -> token ids to append.
            keep: slot -> number of its last new tokens to return output for; defaults to 1.
            run: number of further tokens to generate greedily and read without waiting for the device. They enter a
                slot's sequence only through `confirm`.

        Returns:
            The output of each slot's last tokens, slot by slot in the order of `unseen`. NaN in one sequence does not
            affect the others.

        Raises:
            RequestError: a sequence would exceed the model's context.
            CacheFull: the open slots use too much of the cache.
            Exception: the model raised it. Every slot is then as before the call.
        """
        keep = {slot: keep[slot] if keep else 1 for slot in unseen}
        lengths = {slot: len(self._texts[slot]) for slot in unseen}
        try:
            hidden, logits = self._read(unseen, keep, run)
            output = ModelOutput(self.model.logits(hidden) if logits is None else logits, hidden)
            return self._extend_run(output, keep, run) if run else output
        except Exception:
            for slot, length in lengths.items():
                del self._texts[slot][length:]
            raise

    @torch.inference_mode()
    def extend_hidden(self, unseen: Mapping[int, Sequence[int]]) -> tuple[Tensor, Callable[[list[int]], Tensor]]:
        """Read like `extend`, but compute logits on demand.

        Returns:
            The hidden state after the last token of each slot, shape (R, H), and a function that maps n of these rows
            to their logits, shape (n, V).
        """
        hidden, logits = self._read(unseen, dict.fromkeys(unseen, 1))
        return hidden, lambda rows: self.model.logits(hidden[rows]) if logits is None else logits[rows]

    def _read(
        self,
        unseen: Mapping[int, Sequence[int]],
        keep: Mapping[int, int],
        run: int = 0,
        following: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Read tokens. Returns hidden states (R, H) of the rows to keep, and logits (R, V) if a pass computed them.

        Args:
            run: number of further tokens to make room for.
            following: tokens on the device, of which `unseen` then holds indices, one per slot.
        """
        chunks = []
        for slot, token_ids in unseen.items():
            assert token_ids, "every slot needs at least one new token"
            start = len(self._texts[slot])
            chunks.append(SlotTokens(slot, range(start, start + len(token_ids)), token_ids, keep[slot]))
        ends = {chunk.slot: chunk.positions.stop + run for chunk in chunks}
        longest = max(ends.values())
        if self.max_length is not None and longest > self.max_length:
            raise RequestError(f"{self.name} reads at most {self.max_length} tokens, got a sequence of {longest}")
        grown = {slot: end for slot, end in ends.items() if end > self._cache.held.get(slot, 0)}
        if grown:
            self._make_room(grown)
        size = sum([len(chunk.positions) for chunk in chunks])
        passes = [chunks] if size <= self.max_pass_tokens else _split(chunks, self.max_pass_tokens)
        self.usage.tokens_read += size
        states = []
        for part in passes:
            self.usage.forward_passes += 1
            bucket = bucket_of([len(chunk.positions) for chunk in part]) if self._static else None
            if self._static is not None and bucket is not None:
                hidden, logits = self._static.run(bucket, part, following)
            else:
                layout = PackedPass(part, self._cache, self._input_device, self._window)
                if following is not None:
                    layout.token_ids = following.to(self._input_device)[layout.token_ids]
                hidden, logits = run_model(self.model, self._cache, layout), None
                if layout.kept is not None:
                    hidden = hidden[layout.kept.to(hidden.device)]
            states.append(hidden)
        for slot, token_ids in unseen.items():
            self._texts[slot] += token_ids
        return (states[0], logits) if len(states) == 1 else (torch.cat(states), None)

    def _extend_run(self, output: ModelOutput, keep: Mapping[int, int], run: int) -> ModelOutput:
        """Generate and read `run` tokens greedily. The rows of each slot stay together."""
        assert output.hidden is not None
        ends = list(itertools.accumulate(keep.values()))
        device = output.logits.device
        following = output.logits[to_device([end - 1 for end in ends], device)].argmax(-1)
        logits, hidden, followed = [output.logits], [output.hidden], [following.new_full((1,), -1)]
        for _ in range(run):
            followed.append(following)
            places = {slot: [row] for row, slot in enumerate(keep)}
            row_hidden, row_logits = self._read(places, dict.fromkeys(keep, 1), following=following)
            hidden.append(row_hidden)
            logits.append(self.model.logits(row_hidden) if row_logits is None else row_logits)
            following = logits[-1].argmax(-1)
        count, kept = len(keep), ends[-1]
        order, after = list[int](), list[int]()
        for i, (slot, end) in enumerate(zip(keep, ends, strict=True)):
            del self._texts[slot][-run:]
            order += [*range(end - keep[slot], end), *range(kept + i, kept + i + run * count, count)]
            after += [*[0] * (keep[slot] - 1), *range(1 + i, 1 + i + run * count, count), 0]
        at = to_device(order, device)
        read = torch.cat(followed)[to_device(after, device)]
        return ModelOutput(torch.cat(logits)[at], torch.cat(hidden)[at], followed=read)


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
