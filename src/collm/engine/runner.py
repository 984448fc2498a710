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
from collm.engine.slot_attention import register_attention, slot_attention_of
from collm.engine.slot_check import CHECK_POSITIONS, check_against_plain_forward
from collm.engine.slot_table import SlotTable
from collm.engine.slots import PackedPass, Row, packing_order
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
        register_attention()
        super().__init__(model, paged=model.device.type != "cpu" or bool(static))
        self.usage = ModelUsage()
        self.max_pass_tokens = max_pass_tokens
        self._window = _smallest_window(model)
        self._static: StaticPasses | None = None
        self._is_static = False
        self._check()
        self.bytes_per_position = self._cache.bytes_per_position
        if can_run_static(model) and (model.device.type == "cuda" if static is None else static):
            self._is_static = True
            try:
                self._check()
            except UnsupportedModel as error:
                self._fall_back_to_eager(error)
                self._texts, self._closed = [], []
        self.usage = ModelUsage()
        share_cache_memory([self], cache_memory)

    def _check(self) -> None:
        self.set_capacity(CHECK_POSITIONS)
        check_against_plain_forward(self.model, self)

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
        with self._unchanged_on_failure(unseen):
            hidden, logits = self._read(unseen, keep, run)
            output = ModelOutput(self.model.logits(hidden) if logits is None else logits, hidden)
            return self._extend_run(output, keep, run) if run else output

    @torch.inference_mode()
    def extend_hidden(self, unseen: Mapping[int, Sequence[int]]) -> tuple[Tensor, Callable[[list[int]], Tensor]]:
        """Read like `extend`, but compute logits on demand.

        Returns:
            The hidden state after the last token of each slot, shape (R, H), and a function that maps n of these rows
            to their logits, shape (n, V).

        Raises:
            RequestError, Exception: as in `extend`.
        """
        with self._unchanged_on_failure(unseen):
            hidden, logits = self._read(unseen, dict.fromkeys(unseen, 1), 0)
        return hidden, lambda rows: self.model.logits(hidden[rows]) if logits is None else logits[rows]

    def _read(
        self, unseen: Mapping[int, Sequence[int]], keep: Mapping[int, int], run: int
    ) -> tuple[Tensor, Tensor | None]:
        """Read tokens. Returns hidden states (R, H) of the rows to keep, and logits (R, V) if a pass computed them."""
        assert all(unseen.values()), "every slot needs at least one new token"
        ends = {slot: len(self._texts[slot]) + len(new) for slot, new in unseen.items()}
        longest = max(ends.values()) + run
        if self.max_length is not None and longest > self.max_length:
            raise RequestError(f"{self.name} reads at most {self.max_length} tokens, got a sequence of {longest}")
        self._make_room({slot: end + run for slot, end in ends.items()})
        kept: dict[int, list[Tensor]] = {slot: [] for slot in unseen}
        fits = sum(map(len, unseen.values())) <= self.max_pass_tokens
        passes = [unseen] if fits else _split_passes(unseen, self.max_pass_tokens)
        for part in passes:
            rows = [Row(slot, len(self._texts[slot]), len(new)) for slot, new in part.items()]
            states, logits = self._run_pass(rows, list(part.values()))
            for row, hidden in zip(rows, states, strict=True):
                self._texts[row.slot].extend(part[row.slot])
                kept[row.slot].append(hidden[max(ends[row.slot] - keep[row.slot] - row.start, 0) : row.size])
        hidden = torch.cat(list(itertools.chain.from_iterable(kept.values())))
        return hidden, logits if len(passes) == 1 and len(hidden) == len(unseen) else None

    def _extend_run(self, output: ModelOutput, keep: Mapping[int, int], run: int) -> ModelOutput:
        """Generate and read `run` tokens greedily. The rows of each slot stay together."""
        assert output.hidden is not None
        ends = list(itertools.accumulate(keep.values()))
        device = output.logits.device
        following = output.logits[to_device([end - 1 for end in ends], device)].argmax(-1)
        logits, hidden, followed = [output.logits], [output.hidden], []
        for step in range(run):
            followed.append(following)
            rows = [Row(slot, len(self._texts[slot]) + step, 1) for slot in keep]
            states, row_logits = self._run_pass(rows, [[0]] * len(rows), following)
            hidden.append(torch.cat(list(states)))
            logits.append(self.model.logits(hidden[-1]) if row_logits is None else row_logits)
            following = logits[-1].argmax(-1)
        count, kept = len(keep), ends[-1]
        order, after = list[int](), list[int]()
        for i, (slot, end) in enumerate(zip(keep, ends, strict=True)):
            order += [*range(end - keep[slot], end), *range(kept + i, kept + i + run * count, count)]
            after += [*[0] * (keep[slot] - 1), *range(1 + i, 1 + i + run * count, count), 0]
        read = torch.cat([following.new_full((1,), -1), *followed])[to_device(after, device)]
        at = to_device(order, device)
        return ModelOutput(torch.cat(logits)[at], torch.cat(hidden)[at], followed=read)

    def _run_pass(
        self, rows: Sequence[Row], token_ids: Sequence[Sequence[int]], following: Tensor | None = None
    ) -> tuple[Sequence[Tensor], Tensor | None]:
        """Run one pass. Return each row's hidden states (size or more, H) and, from a static pass, logits (R, V).

        Args:
            following: as in `StaticPasses.run`.
        """
        self.usage.forward_passes += 1
        self.usage.tokens_read += sum([row.size for row in rows])
        if self._static is not None and bucket_of([row.size for row in rows]):
            states, logits = self._static.run(rows, token_ids, following)
            return list(states), logits
        order, device = packing_order(rows), self.model.input_device
        packed = [rows[i] for i in order]
        if following is None:
            tokens = to_device([token for i in order for token in token_ids[i]], device)
        else:
            tokens = following[to_device(order, following.device)].to(device)
        paged = {}
        if isinstance(self._cache, PagedCache):
            places = to_device([place for row in packed for place in self._cache.places(row)], device)
            paged = {"places": places, "table": self._cache.table}
        layout = self._cache.layout = PackedPass(packed, device=device, window=self._window, **paged)
        with slot_attention_of(self.model.config):
            hidden = self.model.hidden_states(
                tokens.unsqueeze(0),
                position_ids=layout.positions.unsqueeze(0),
                use_cache=True,
                slot_pass=layout,
                **self._cache.as_argument,
            )[0]
        by_row = dict(zip(order, torch.split(hidden, [row.size for row in packed]), strict=True))
        return [by_row[i] for i in range(len(rows))], None


def _split_passes(unseen: Mapping[int, Sequence[int]], budget: int) -> list[dict[int, Sequence[int]]]:
    """Split an extend into forward passes of at most `budget` tokens, in order."""
    passes: list[dict[int, Sequence[int]]] = [{}]
    room = budget
    for slot, tokens in unseen.items():
        at = 0
        while at < len(tokens):
            if room == 0:
                passes.append({})
                room = budget
            piece = tokens[at : at + room]
            passes[-1][slot] = piece
            at += len(piece)
            room -= len(piece)
    return passes


def _smallest_window(model: LanguageModel) -> int | None:
    windows = [getattr(model.config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((window for window in windows if window), default=None)
