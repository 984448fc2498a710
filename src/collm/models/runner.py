"""A model with its KV slots: sequences read what they have not seen, and roll back by lowering a length."""

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
from collm.errors import ConfigError, ModelFailure, RequestError, UnsupportedModel
from collm.models.cache_memory import share_cache_memory
from collm.models.kv_cache import PAGE, PagedCache, ReservedCache
from collm.models.language_model import LanguageModel
from collm.models.slot_attention import register_attention, slot_attention_of
from collm.models.slots import PackedPass, Row, packing_order
from collm.models.static_passes import StaticPasses, bucket_of, can_run_static

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelOutput:
    """What a model says after the last tokens of each sequence that was extended.

    Attributes:
        logits: next-token logits, shape (R, V): sequence by sequence, for each the positions asked for.
        hidden: last hidden states, shape (R, H); None from an assistant that has none.
        abstained: for each row whether the assistant abstains there; empty from one that never does.
        followed: for each row the token that was read after it in a run, else -1, shape (R,); None without a run.
    """

    logits: Tensor
    hidden: Tensor | None = None
    abstained: Sequence[bool] = ()
    followed: Tensor | None = None


class Limited(Protocol):
    """Anything that reads only so much."""

    name: str

    @property
    def max_length(self) -> int | None: ...


class Assistant(Protocol):
    """Anything that gives a next-token distribution for a prefix: a model, or a program that may know what follows.

    A slot is one sequence; `length` is how many of its tokens the assistant has seen. One that slept for m tokens
    catches up with one `extend` of those m tokens. Where one that `may_abstain` has nothing to say, the base writes.
    """

    name: str
    usage: ModelUsage

    @property
    def max_length(self) -> int | None: ...

    @property
    def may_abstain(self) -> bool: ...

    @property
    def capacity(self) -> int | None:
        """Positions that all its slots together hold, in pages of `kv_cache.PAGE`; None without such a limit."""

    @property
    def most_slots(self) -> int | None:
        """Sequences that can be open at once; None without such a limit."""

    def open(self, token_ids: Sequence[int]) -> int: ...

    def close(self, slot: int, *, spoiled: bool = False) -> None: ...

    def forget(self) -> None: ...

    def length(self, slot: int) -> int: ...

    def rollback(self, slot: int, length: int) -> None: ...

    def extend(self, unseen: Mapping[int, Sequence[int]], keep: Mapping[int, int] | None = None) -> ModelOutput: ...


MIN_SHARED = 16
"""Fewer common tokens than this are read again rather than copied from another slot."""


class ModelRunner:
    """Drives one language model over many ragged sequences.

    A slot that was closed keeps what it holds until its memory is needed, so that the next turn of a chat, or another
    completion of the same prompt, reads only what is new to it.

    Args:
        model: the model; it is left as it was found between calls.
        max_pass_tokens: most new tokens in one forward pass; longer extends are split.
        static: run small passes in fixed shapes, on a GPU as CUDA graphs; None where there is a GPU. A model that
            cannot be run so runs as it is, and a warning says why.
        cache_memory: for keys and values, as of `cache_memory.cache_bytes`; None for the default share.

    Raises:
        UnsupportedModel: the model does not reproduce its own cache-free logits through the slots.
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
        self._texts: list[list[int]] = []  # slot -> the tokens whose keys and values it holds
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
        """Positions that all slots together hold, in whole pages (`kv_cache.in_pages`)."""
        return self._cache.capacity

    @property
    def runs_ahead(self) -> bool:
        """Whether the host can be the slower part of a pass, so that runs may pay."""
        return self._static is not None

    @property
    def most_slots(self) -> int:
        """Sequences that can be open at once."""
        return self._cache.slots

    @property
    def lengths(self) -> list[int]:
        """Tokens that each slot holds, open or closed."""
        return [len(text) for text in self._texts]

    @property
    def cache_bytes(self) -> int:
        """Memory that keys and values take."""
        return self._cache.allocated_bytes

    def set_capacity(self, positions: int) -> None:
        """Make room for so many positions of all slots together; what closed slots hold is dropped.

        Raises:
            ConfigError: they are too few for anything.
        """
        if positions < PAGE:
            raise ConfigError(
                f"the memory for the cache of {self.name} holds {positions} tokens of {self.bytes_per_position:,} "
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
        """Make what small passes of up to so many sequences need, ahead of the first of them."""
        if self._static is None:
            return
        try:
            self._static.prepare(most_rows)
        except UnsupportedModel as error:
            self._run_eagerly(error)

    @torch.inference_mode()
    def open(self, token_ids: Sequence[int] = ()) -> int:
        """A slot for a new sequence that is about to read `token_ids`; it may hold a beginning of them already.

        At least one of the tokens is left to read.

        Raises:
            RequestError: all slots are open.
        """
        source, shared = self._longest_shared(token_ids)
        if source in self._closed and 2 * shared >= len(self._texts[source]):
            slot = source  # little is lost by continuing it
        else:
            slot = self._free_slot()
            if slot != source:
                self._cache.release(slot)
                shared = self._copied(source, slot, shared)
        if slot in self._closed:
            self._closed.remove(slot)
        self._texts[slot] = list(token_ids[:shared])
        return slot

    @torch.inference_mode()
    def close(self, slot: int, *, spoiled: bool = False) -> None:
        """Give the slot back; `spoiled` wipes what it holds, after the model returned NaN there."""
        self._closed.append(slot)
        if spoiled:
            self._drop(slot, spoiled=True)

    @torch.inference_mode()
    def forget(self) -> None:
        """Drop what closed slots hold: needed when the model's weights have changed."""
        for slot in self._closed:
            self._drop(slot)
        self._closed.sort()
        if not self.open_slots:
            self._texts, self._closed = [], []

    def length(self, slot: int) -> int:
        """How many tokens of its sequence the slot holds."""
        return len(self._texts[slot])

    def rollback(self, slot: int, length: int) -> None:
        """Forget everything after the first `length` tokens."""
        assert 0 <= length <= len(self._texts[slot])
        del self._texts[slot][length:]

    @torch.inference_mode()
    def extend(
        self, unseen: Mapping[int, Sequence[int]], keep: Mapping[int, int] | None = None, *, run: int = 0
    ) -> ModelOutput:
        """Read the tokens each slot has not seen, at least one each.

        Args:
            unseen: slot -> token ids that follow what it holds.
            keep: slot -> how many of its last new tokens to return a row for; by default the very last.
            run: tokens to read on after those, each the argmax of what was said before it, without waiting for the
                device. A slot holds them once `confirm` has named them.

        Returns:
            For each slot in the mapping's order the rows of its last tokens, in theirs. A row of a model that breaks
            down holds NaN; its neighbours' rows do not.

        Raises:
            RequestError: a sequence would outgrow the model's context or the cache.
            Exception: what the model raised. Whatever is raised, every slot is left as before the call.
        """
        keep = {slot: keep[slot] if keep else 1 for slot in unseen}
        with self._unchanged_on_failure(unseen):
            hidden, logits = self._extend(unseen, keep, run)
            output = ModelOutput(self.model.logits(hidden) if logits is None else logits, hidden)
            return self._run_on(output, keep, run) if run else output

    @torch.inference_mode()
    def extend_hidden(self, unseen: Mapping[int, Sequence[int]]) -> tuple[Tensor, Callable[[list[int]], Tensor]]:
        """Read as `extend` does, and compute logits only of the rows that need them.

        Returns:
            The hidden state after the last token of each slot, shape (R, H), and a function from n of these rows to
            their logits, shape (n, V).

        Raises:
            RequestError, Exception: as of `extend`.
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
        """Hidden states (R, H) of the rows to keep; their logits (R, V) if the pass computed them anyway."""
        assert all(unseen.values()), "every slot needs at least one new token"
        ends = {slot: len(self._texts[slot]) + len(new) for slot, new in unseen.items()}
        lengths = {slot: end + run for slot, end in ends.items()}
        self._check_context(lengths)
        self._make_room(lengths)
        firsts = {slot: end - keep[slot] for slot, end in ends.items()}
        passes = [self._forward(part, firsts) for part in _passes(unseen, self.max_pass_tokens)]
        hidden = torch.cat(_in_order(passes, list(unseen)))
        return hidden, passes[0].logits if len(passes) == 1 and len(hidden) == len(unseen) else None

    def confirm(self, slot: int, token_ids: Sequence[int]) -> None:
        """Name the tokens of a run that the slot is to hold."""
        self._texts[slot].extend(token_ids)

    def _forward(self, part: Mapping[int, Sequence[int]], firsts: Mapping[int, int]) -> _Passed:
        """One forward pass; each slot's hidden states from its position `firsts` on."""
        rows = [Row(slot, len(self._texts[slot]), len(new)) for slot, new in part.items()]
        states, logits = self._read(rows, list(part.values()))
        kept = {}
        for row, hidden in zip(rows, states, strict=True):
            self._texts[row.slot].extend(part[row.slot])
            kept[row.slot] = hidden[max(firsts[row.slot] - row.start, 0) : row.size]
        return _Passed(kept, logits)

    def _run_on(self, reading: ModelOutput, keep: Mapping[int, int], run: int) -> ModelOutput:
        """Read on for `run` tokens; rows of each slot stay together."""
        assert reading.hidden is not None
        ends = list(itertools.accumulate(keep.values()))
        device = reading.logits.device
        following = reading.logits[to_device([end - 1 for end in ends], device)].argmax(-1)
        logits, hidden, followed = [reading.logits], [reading.hidden], []
        for step in range(run):
            followed.append(following)
            rows = [Row(slot, len(self._texts[slot]) + step, 1) for slot in keep]
            states, said = self._read(rows, [[0]] * len(rows), following)
            hidden.append(torch.cat(list(states)))
            logits.append(self.model.logits(hidden[-1]) if said is None else said)
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
        """One pass: the hidden states of each row, (size or more, H), and, if it gives them, logits after each, (R, V).

        Args:
            following: as of `StaticPasses.run`.
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
        """Hidden states of packed tokens (T,): (T, H)."""
        device, paged = self.model.input_device, {}
        if isinstance(self._cache, PagedCache):
            places = to_device([place for row in rows for place in self._cache.places(row)], device)
            paged = {"places": places, "table": self._cache.table}
        layout = self._cache.layout = PackedPass(rows, device=device, window=self._window, **paged)
        with slot_attention_of(self.model.config):
            return self.model.hidden_states(
                token_ids.unsqueeze(0),
                position_ids=layout.positions.unsqueeze(0),
                past_key_values=self._cache,
                use_cache=True,
                slot_pass=layout,
            )[0]

    def _check_context(self, lengths: Mapping[int, int]) -> None:
        longest = max(lengths.values())
        if self.max_length is not None and longest > self.max_length:
            raise RequestError(f"{self.name} reads at most {self.max_length} tokens, came a sequence of {longest}")

    def _make_room(self, lengths: Mapping[int, int], *, sparing: int = -1) -> None:
        """Hold so many tokens in each slot, dropping what closed slots hold where that is needed.

        Raises:
            RequestError: open slots hold the rest.
        """
        missing = self._cache.missing(lengths)
        for slot in self._closed:
            if missing > 0 and slot not in (*lengths, sparing):
                missing -= self._cache.held.get(slot, 0)
                self._drop(slot)
        if missing > 0:
            raise RequestError(
                f"the key-value cache of {self.name} holds {self._cache.capacity:,} tokens of all sequences together, "
                f"{missing:,} less than is needed now; raise cache_memory or let fewer sequences run together"
            )
        for slot, length in lengths.items():
            self._cache.hold(slot, length)

    def _drop(self, slot: int, *, spoiled: bool = False) -> None:
        self._texts[slot].clear()
        self._cache.release(slot, spoiled=spoiled)

    def _copied(self, source: int, target: int, shared: int) -> int:
        """Copy a shared beginning; how much of it, which is nothing where there is no room."""
        if shared:
            try:
                self._make_room({target: shared}, sparing=source)
            except RequestError:
                return 0
            self._cache.copy(source, target, shared)
        return shared

    def _longest_shared(self, token_ids: Sequence[int]) -> tuple[int, int]:
        """The slot that holds the longest beginning of `token_ids`, its last token aside, and how long that is."""
        wanted = list(token_ids[:-1])
        shared = [common_prefix(wanted, text) for text in self._texts]
        longest = max(shared, default=0)
        return (shared.index(longest), longest) if longest >= MIN_SHARED else (-1, 0)

    def _free_slot(self) -> int:
        """An empty closed slot, else the longest closed, else a new one; low numbers first keep live slots adjacent."""
        if self._closed:
            return min(self._closed, key=lambda slot: slot if not self._texts[slot] else len(self._texts))
        if len(self._texts) == self.most_slots:
            raise RequestError(f"{self.name} has {self.most_slots} sequences open, which is all it has slots for")
        self._texts.append([])
        return len(self._texts) - 1

    # At load

    def _check(self) -> None:
        """Compare with passes without a cache, over a small one; learn what a position takes."""
        self.bytes_per_position = 0
        wanted, self._is_static = self._is_static, False
        self.set_capacity(_CHECKED)
        _check_against_plain_forward(self)
        self.bytes_per_position = self._cache.bytes_per_position
        if wanted:
            self._is_static = True
            self.set_capacity(_CHECKED)
            try:
                _check_against_plain_forward(self)
            except UnsupportedModel as error:
                self._run_eagerly(error)
        self._texts, self._closed = [], []
        self.usage = ModelUsage()

    def _run_eagerly(self, error: UnsupportedModel) -> None:
        _LOG.warning("%s runs without CUDA graphs, more slowly: %s", self.name, error)
        self._is_static, self._static = False, None

    @property
    def _num_layers(self) -> int:
        return int(self.model.config.num_hidden_layers)


_CHECKED = 256
"""Positions of the cache that a model is checked with at load."""


@dataclass(frozen=True)
class _Passed:
    """What one pass gave.

    Attributes:
        hidden: slot -> hidden states, shape (kept, H).
        logits: after the last token of each slot, shape (n, V); None where they are yet to be made.
    """

    hidden: dict[int, Tensor]
    logits: Tensor | None


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many first entries two sequences of one type share."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _passes(unseen: Mapping[int, Sequence[int]], budget: int) -> list[dict[int, Sequence[int]]]:
    """Cut extends into forward passes of at most `budget` tokens, in order."""
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


def _in_order(passes: Sequence[_Passed], slots: Sequence[int]) -> list[Tensor]:
    """The hidden states of each slot, gathered over passes."""
    if len(passes) == 1:
        return [passes[0].hidden[slot] for slot in slots]
    return [torch.cat([part.hidden[slot] for part in passes if slot in part.hidden]) for slot in slots]


def _smallest_window(model: LanguageModel) -> int | None:
    windows = [getattr(model.config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((window for window in windows if window), default=None)


_RELATIVE_ERROR = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.1}


@torch.inference_mode()
def _check_against_plain_forward(runner: ModelRunner) -> None:
    """Ragged extends, a rollback and a catch-up must give the logits of a forward pass without a cache."""
    model = runner.model
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(model.vocab_size, (2, 8), generator=generator).tolist()
    expected = torch.stack([_plain_logits(model, texts[0]), _plain_logits(model, texts[1][:5])])
    try:
        long, short = runner.open(), runner.open()
        runner.extend({long: texts[0][:6], short: texts[1][:2]})
        runner.rollback(long, 3)
        runner.extend({short: texts[1][2:3]})
        came = runner.extend({short: texts[1][3:5], long: texts[0][3:]}).logits.flip(0)
        runner.close(long)
        runner.close(short)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, AttributeError, RuntimeError, IndexError) as error:
        raise UnsupportedModel(_unsupported(model, f"it fails with {type(error).__name__}: {error}")) from error
    if not expected.isfinite().all():
        raise ModelFailure(f"{model.name} gives logits that are not finite; check its weights, config and dtype")
    scale = (expected - expected.mean(-1, keepdim=True)).norm()
    relative = float((came.float() - expected).norm() / scale) if scale else 0.0
    if not relative <= _RELATIVE_ERROR.get(came.dtype, 0.1):
        raise UnsupportedModel(_unsupported(model, f"its logits are off by {relative:.2g} of their size"))


def _plain_logits(model: LanguageModel, token_ids: list[int]) -> Tensor:
    ids = torch.tensor([token_ids], device=model.input_device)
    logits: Tensor = model.module(input_ids=ids, use_cache=False).logits
    return logits[0, -1, : model.vocab_size].float()


def _unsupported(model: LanguageModel, why: str) -> str:
    return (
        f"{model.name} ({type(model.module).__name__}) cannot run on KV slots: against its own forward pass without a "
        f"cache {why}; use a model whose attention goes through transformers' AttentionInterface and keeps all keys"
    )
