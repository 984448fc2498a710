"""Runs a language model over sequences in KV slots, which are extended and rolled back independently."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from collm.core.transfers import to_device
from collm.core.types import ModelUsage
from collm.errors import CacheFull, ConfigError, ModelFailure, RequestError, UnsupportedModel
from collm.models.cache_memory import share_cache_memory
from collm.models.kv_cache import PAGE, PagedCache, ReservedCache
from collm.models.language_model import LanguageModel
from collm.models.slot_attention import register_attention, slot_attention_of
from collm.models.slots import PackedPass, Row, packing_order
from collm.models.static_passes import StaticPasses, bucket_of, can_run_static

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelOutput:
    """Output for the last tokens of each extended sequence.

    Attributes:
        logits: next-token logits, shape (R, V), sequence by sequence, for the requested positions.
        hidden: last hidden states, shape (R, H); None for an assistant without hidden states.
        abstained: whether the assistant abstains, per row; empty for an assistant that never abstains.
        followed: the token that a run read after each row, else -1, shape (R,); None without a run.
    """

    logits: Tensor
    hidden: Tensor | None = None
    abstained: Sequence[bool] = ()
    followed: Tensor | None = None


class Limited(Protocol):
    """Anything with a maximum sequence length."""

    name: str

    @property
    def max_length(self) -> int | None: ...


class Assistant(Protocol):
    """Anything that gives a next-token distribution for a prefix: a model or a tool.

    A slot holds one sequence, and `length` is the number of its tokens that the assistant has read. An assistant that
    is m tokens behind catches up with one `extend` of m tokens. The base writes where an assistant abstains.
    """

    name: str
    usage: ModelUsage

    @property
    def max_length(self) -> int | None: ...

    @property
    def may_abstain(self) -> bool: ...

    @property
    def capacity(self) -> int | None:
        """Positions that all slots together can hold, in pages of `kv_cache.PAGE`; None if unlimited."""

    @property
    def most_slots(self) -> int | None:
        """Number of slots that can be open at once; None if unlimited."""

    def open(self, token_ids: Sequence[int]) -> int: ...

    def close(self, slot: int, *, wipe: bool = False) -> None: ...

    def forget(self) -> None: ...

    def length(self, slot: int) -> int: ...

    def rollback(self, slot: int, length: int) -> None: ...

    def extend(self, unseen: Mapping[int, Sequence[int]], keep: Mapping[int, int] | None = None) -> ModelOutput: ...


MIN_SHARED = 16
"""Shortest prefix that is copied from another slot instead of being read again."""


class ModelRunner:
    """Runs one language model over many ragged sequences.

    A closed slot keeps its KV cache until the memory is needed. The next turn of a chat, or another completion of the
    same prompt, then reads only its new tokens.

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
        self.model = model
        self.name = model.name
        self.usage = ModelUsage()
        self.max_pass_tokens = max_pass_tokens
        self._window = _smallest_window(model)
        self._paged = model.device.type != "cpu" or bool(static)
        self._is_static = can_run_static(model) and (model.device.type == "cuda" if static is None else static)
        self._static: StaticPasses | None = None
        self._texts: list[list[int]] = []  # slot -> the tokens in its cache
        self._closed: list[int] = []  # free slots, the longest free first
        self._cache: ReservedCache | PagedCache
        self._check()
        share_cache_memory([self], cache_memory)

    @property
    def max_length(self) -> int | None:
        return self.model.max_length

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def open_slots(self) -> int:
        return len(self._texts) - len(self._closed)

    @property
    def capacity(self) -> int:
        """Positions that all slots together can hold, in whole pages (`kv_cache.in_pages`)."""
        return self._cache.capacity

    @property
    def runs_ahead(self) -> bool:
        """Whether runs may pay, because the host can be slower than the device."""
        return self._static is not None

    @property
    def most_slots(self) -> int:
        """Number of slots that can be open at once."""
        return self._cache.slots

    @property
    def lengths(self) -> list[int]:
        """Number of cached tokens of each open or closed slot."""
        return [len(text) for text in self._texts]

    @property
    def cache_bytes(self) -> int:
        """Memory of keys and values."""
        return self._cache.allocated_bytes

    def set_capacity(self, positions: int) -> None:
        """Allocate a new cache of `positions` positions. The content of closed slots is dropped.

        Raises:
            ConfigError: `positions` is less than a page.
        """
        if positions < PAGE:
            raise ConfigError(
                f"the KV cache memory of {self.name} holds {positions} tokens of {self.bytes_per_position:,} "
                f"bytes each, expected at least {PAGE}; raise cache_memory"
            )
        assert not self.open_slots
        self._texts, self._closed = [], []
        if self._paged:
            self._cache = PagedCache(self._num_layers, positions, self.max_length, self.model.input_device)
        else:
            self._cache = ReservedCache(self._num_layers, positions, self.max_length)
        self._static = StaticPasses(self.model, self._cache) if self._is_static else None

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
    def open(self, token_ids: Sequence[int] = ()) -> int:
        """Open a slot for a new sequence `token_ids`. It may already hold a prefix of them, but not all.

        Raises:
            CacheFull: all slots are open.
        """
        source, shared = self._longest_prefix(token_ids)
        if source in self._closed and 2 * shared >= len(self._texts[source]):
            slot = source  # reuse it, as little of its content is lost
        else:
            slot = self._free_slot()
            if slot != source:
                self._cache.release(slot)
                shared = self._copy_prefix(source, slot, shared)
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
            hidden, logits = self._extend(unseen, keep, run)
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
            hidden, logits = self._extend(unseen, dict.fromkeys(unseen, 1), 0)
        return hidden, lambda rows: self.model.logits(hidden[rows]) if logits is None else logits[rows]

    @contextmanager
    def _unchanged_on_failure(self, slots: Iterable[int]) -> Iterator[None]:
        """Roll the slots back if the block raises."""
        starts = {slot: len(self._texts[slot]) for slot in slots}
        try:
            yield
        except Exception:
            for slot, start in starts.items():
                self.rollback(slot, start)
            raise

    def _extend(
        self, unseen: Mapping[int, Sequence[int]], keep: Mapping[int, int], run: int
    ) -> tuple[Tensor, Tensor | None]:
        """Read tokens. Returns hidden states (R, H) of the rows to keep, and logits (R, V) if a pass computed them."""
        assert all(unseen.values()), "every slot needs at least one new token"
        ends = {slot: len(self._texts[slot]) + len(new) for slot, new in unseen.items()}
        lengths = {slot: end + run for slot, end in ends.items()}
        self._check_context(lengths)
        self._make_room(lengths)
        firsts = {slot: end - keep[slot] for slot, end in ends.items()}
        passes = [self._forward(part, firsts) for part in _split_passes(unseen, self.max_pass_tokens)]
        hidden = torch.cat(_gather_hidden(passes, list(unseen)))
        return hidden, passes[0].logits if len(passes) == 1 and len(hidden) == len(unseen) else None

    def confirm(self, slot: int, token_ids: Sequence[int]) -> None:
        """Accept these tokens of a run into the slot."""
        self._texts[slot].extend(token_ids)

    def _forward(self, part: Mapping[int, Sequence[int]], firsts: Mapping[int, int]) -> _PassOutput:
        """Run one forward pass and keep each slot's hidden states from position `firsts` on."""
        rows = [Row(slot, len(self._texts[slot]), len(new)) for slot, new in part.items()]
        states, logits = self._read(rows, list(part.values()))
        kept = {}
        for row, hidden in zip(rows, states, strict=True):
            self._texts[row.slot].extend(part[row.slot])
            kept[row.slot] = hidden[max(firsts[row.slot] - row.start, 0) : row.size]
        return _PassOutput(kept, logits)

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
            states, row_logits = self._read(rows, [[0]] * len(rows), following)
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

    def _read(
        self, rows: Sequence[Row], token_ids: Sequence[Sequence[int]], following: Tensor | None = None
    ) -> tuple[Sequence[Tensor], Tensor | None]:
        """Run one pass. Return each row's hidden states (size or more, H) and, from a static pass, logits (R, V).

        Args:
            following: as in `StaticPasses.run`.
        """
        self.usage.forward_passes += 1
        self.usage.tokens_read += sum(row.size for row in rows)
        if self._static is not None and bucket_of([row.size for row in rows]):
            passed = self._static.run(rows, token_ids, following)
            return list(passed.hidden), passed.logits
        order = packing_order(rows)
        packed = [rows[i] for i in order]
        if following is None:
            tokens = to_device([token for i in order for token in token_ids[i]], self.model.input_device)
        else:
            tokens = following[to_device(order, following.device)].to(self.model.input_device)
        hidden = torch.split(self._packed_forward(packed, tokens), [row.size for row in packed])
        return [each for _, each in sorted(zip(order, hidden, strict=True), key=lambda one: one[0])], None

    def _packed_forward(self, rows: Sequence[Row], token_ids: Tensor) -> Tensor:
        """Run packed tokens (T,) and return their hidden states (T, H)."""
        device, paged = self.model.input_device, {}
        if isinstance(self._cache, PagedCache):
            places = to_device([place for row in rows for place in self._cache.places(row)], device)
            paged = {"places": places, "table": self._cache.table}
        layout = self._cache.layout = PackedPass(rows, device=device, window=self._window, **paged)
        with slot_attention_of(self.model.config):
            return self.model.hidden_states(
                token_ids.unsqueeze(0),
                position_ids=layout.positions.unsqueeze(0),
                use_cache=True,
                slot_pass=layout,
                **self._cache.as_argument,
            )[0]

    def _check_context(self, lengths: Mapping[int, int]) -> None:
        longest = max(lengths.values())
        if self.max_length is not None and longest > self.max_length:
            raise RequestError(f"{self.name} reads at most {self.max_length} tokens, got a sequence of {longest}")

    def _make_room(self, lengths: Mapping[int, int], *, except_slot: int = -1) -> None:
        """Allocate cache for `lengths` tokens of each slot, dropping caches of closed slots if necessary.

        Raises:
            CacheFull: the open slots use too much of the cache.
        """
        missing = self._cache.missing(lengths)
        for slot in self._closed:
            if missing > 0 and slot not in (*lengths, except_slot):
                missing -= self._cache.held.get(slot, 0)
                self._drop(slot)
        if missing > 0:
            raise CacheFull(
                f"the KV cache of {self.name} holds {self._cache.capacity:,} tokens, {missing:,} too few for the "
                "running sequences; raise cache_memory or decode fewer sequences at once"
            )
        for slot, length in lengths.items():
            self._cache.hold(slot, length)

    def _drop(self, slot: int, *, wipe: bool = False) -> None:
        self._texts[slot].clear()
        self._cache.release(slot, wipe=wipe)

    def _copy_prefix(self, source: int, target: int, shared: int) -> int:
        """Copy a shared prefix and return the number of copied tokens, which is 0 if there is no room."""
        if shared:
            try:
                self._make_room({target: shared}, except_slot=source)
            except CacheFull:
                return 0
            self._cache.copy(source, target, shared)
        return shared

    def _longest_prefix(self, token_ids: Sequence[int]) -> tuple[int, int]:
        """The slot with the longest common prefix with `token_ids[:-1]`, and its length; (-1, 0) if it is too short."""
        wanted = list(token_ids[:-1])
        shared = [common_prefix(wanted, text) for text in self._texts]
        longest = max(shared, default=0)
        return (shared.index(longest), longest) if longest >= MIN_SHARED else (-1, 0)

    def _free_slot(self) -> int:
        """An empty closed slot, else the one closed first, else a new one. Low numbers keep active slots adjacent."""
        if self._closed:
            return min(self._closed, key=lambda slot: slot if not self._texts[slot] else len(self._texts))
        if len(self._texts) == self.most_slots:
            raise CacheFull(f"{self.name} has no free slot; all {self.most_slots} slots are open")
        self._texts.append([])
        return len(self._texts) - 1

    # Checks at load

    def _check(self) -> None:
        """Compare passes over a small cache with passes without one, and measure the memory of a position."""
        self.bytes_per_position = 0
        wanted, self._is_static = self._is_static, False
        self.set_capacity(_CHECK_POSITIONS)
        _check_against_plain_forward(self)
        self.bytes_per_position = self._cache.bytes_per_position
        if wanted:
            self._is_static = True
            self.set_capacity(_CHECK_POSITIONS)
            try:
                _check_against_plain_forward(self)
            except UnsupportedModel as error:
                self._fall_back_to_eager(error)
        self._texts, self._closed = [], []
        self.usage = ModelUsage()

    def _fall_back_to_eager(self, error: UnsupportedModel) -> None:
        _LOG.warning("%s runs without CUDA graphs, which is slower: %s", self.name, error)
        self._is_static, self._static = False, None

    @property
    def _num_layers(self) -> int:
        return int(self.model.config.num_hidden_layers)


_CHECK_POSITIONS = 256
"""Cache positions for the check at load."""


@dataclass(frozen=True)
class _PassOutput:
    """Output of one pass.

    Attributes:
        hidden: slot -> hidden states, shape (kept, H).
        logits: logits after the last token of each slot, shape (n, V); None if not computed yet.
    """

    hidden: dict[int, Tensor]
    logits: Tensor | None


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the common prefix of two sequences of one type."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


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


def _gather_hidden(passes: Sequence[_PassOutput], slots: Sequence[int]) -> list[Tensor]:
    """Concatenate each slot's hidden states over passes."""
    if len(passes) == 1:
        return [passes[0].hidden[slot] for slot in slots]
    return [torch.cat([part.hidden[slot] for part in passes if slot in part.hidden]) for slot in slots]


def _smallest_window(model: LanguageModel) -> int | None:
    windows = [getattr(model.config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((window for window in windows if window), default=None)


_RELATIVE_ERROR = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.1}


@torch.inference_mode()
def _check_against_plain_forward(runner: ModelRunner) -> None:
    """Check that ragged extends, a rollback and a catch-up give the logits of a forward pass without a cache."""
    model = runner.model
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(model.vocab_size, (2, 8), generator=generator).tolist()
    expected = torch.stack([_plain_logits(model, texts[0]), _plain_logits(model, texts[1][:5])])
    try:
        long, short = runner.open(), runner.open()
        runner.extend({long: texts[0][:6], short: texts[1][:2]})
        runner.rollback(long, 3)
        runner.extend({short: texts[1][2:3]})
        actual = runner.extend({short: texts[1][3:5], long: texts[0][3:]}).logits.flip(0)
        runner.close(long)
        runner.close(short)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
        raise UnsupportedModel(_unsupported(model, f"it fails with {type(error).__name__}: {error}")) from error
    if not expected.isfinite().all():
        raise ModelFailure(f"{model.name} gives logits that are not finite; check its weights, config and dtype")
    scale = (expected - expected.mean(-1, keepdim=True)).norm()
    relative = float((actual.float() - expected).norm() / scale) if scale else 0.0
    if not relative <= _RELATIVE_ERROR.get(actual.dtype, 0.1):
        raise UnsupportedModel(_unsupported(model, f"its logits have a relative error of {relative:.2g}"))


def _plain_logits(model: LanguageModel, token_ids: list[int]) -> Tensor:
    ids = torch.tensor([token_ids], device=model.input_device)
    logits: Tensor = model.module(input_ids=ids, use_cache=False).logits
    return logits[0, -1, : model.vocab_size].float()


def _unsupported(model: LanguageModel, why: str) -> str:
    return (
        f"{model.name} ({type(model.module).__name__}) cannot run on KV slots: compared with its forward pass without "
        f"a cache, {why}; use a model whose attention uses transformers' AttentionInterface and keeps all keys"
    )
