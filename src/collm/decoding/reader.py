"""Runs one author on sequences: owns their slots, shares prefixes and isolates failures."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from collections.abc import Sequence as ListOf
from dataclasses import dataclass

import torch
from torch import Tensor

from collm.decoding.draws import Logits, Sampling
from collm.decoding.sequence import Sequence
from collm.decoding.speculation import PassTimes
from collm.errors import CollmError, ModelFailure
from collm.models.runner import MIN_SHARED, Assistant, ModelOutput, ModelRunner

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReadSpan:
    """The part of a sequence to read: tokens up to `end`, with output for each of the last `keep` tokens."""

    end: int
    keep: int = 1


@dataclass(frozen=True)
class AuthorOutput:
    """An author's output for R positions.

    Attributes:
        rows: sequence -> its rows; sequences that failed are missing.
        raw: the author's logits, shape (R, V), fp32.
        logits: logits after the requests' logits processors, shape (R, V), fp32.
        hidden: hidden states, shape (R, H); None for an assistant without hidden states.
        abstained: rows at which the author abstains.
        followed: the token that a run read after each row, else -1, shape (R,); None without a run.
        samplings: sampling settings of each row.
    """

    rows: dict[Sequence, range]
    raw: Tensor
    logits: Tensor
    hidden: Tensor | None
    abstained: frozenset[int]
    followed: Tensor | None
    samplings: list[Sampling]

    def at(self, row: int) -> Logits:
        """One row of the logits."""
        return Logits(self.raw[row], self.logits[row])


class Reader:
    """Runs one author. It alone opens, rolls back and closes the author's slots.

    Attributes:
        slots: sequence -> its KV slot, from its first read until `close`.
        times: durations of its passes.
        run_times: durations of each further pass of a run.
        seconds: total time spent in passes.
        failures: sequences that failed, with the error; the caller removes them.
    """

    def __init__(self, author: int, runner: Assistant) -> None:
        self.author = author
        self.runner = runner
        self.slots: dict[Sequence, int] = {}
        self.times, self.run_times = PassTimes(), PassTimes()
        self.seconds = 0.0
        self.failures: dict[Sequence, CollmError] = {}
        self._started = 0.0
        self._tokens = 0
        self._run = 0

    def has_read(self, sequence: Sequence, length: int) -> bool:
        """Whether the author has read the first `length` tokens of the sequence."""
        return sequence in self.slots and self.runner.length(self._slot(sequence)) >= length

    def confirm(self, sequence: Sequence) -> None:
        """Accept the tokens of a run that the sequence has made its own."""
        assert isinstance(self.runner, ModelRunner)
        slot = self._slot(sequence)
        self.runner.confirm(slot, sequence.text[self.runner.length(slot) :])

    def close(self, sequence: Sequence, *, wipe: bool = False) -> None:
        """Close the sequence's slot, if it has one. `wipe` is necessary after NaN."""
        slot = self.slots.pop(sequence, None)
        if slot is not None:
            self.runner.close(slot, wipe=wipe)

    def read(self, wanted: Mapping[Sequence, ReadSpan], run: int = 0) -> AuthorOutput | None:
        """Read the unread tokens of every span. Return None if no span could be read.

        If several new sequences share a prefix, one is read first and the others copy its cache.

        Args:
            run: number of further tokens to generate and read greedily, as in `ModelRunner.extend`.
        """
        self._started, self._tokens, self._run = time.perf_counter(), 0, run
        followers = self._followers(wanted)
        parts = [self._read({s: span for s, span in wanted.items() if s not in followers})]
        if followers:
            parts.append(self._read({s: wanted[s] for s in followers}))
        outputs = [(sequences, output) for part in parts for sequences, output in part]
        if not outputs:
            return None
        rows, samplings = dict[Sequence, range](), list[Sampling]()
        for sequence in (sequence for sequences, _ in outputs for sequence in sequences):
            span = wanted[sequence]
            first = span.end - span.keep + 1 - len(sequence.request.prompt_ids)
            rows[sequence] = range(len(samplings), len(samplings) + span.keep + run)
            samplings += [sequence.sampling_of(self.author, first + i) for i in range(span.keep + run)]
        names = ("logits", "hidden", "followed")
        logits, hidden, followed = (_concat([getattr(output, name) for _, output in outputs]) for name in names)
        assert logits is not None
        abstained = [abstains for _, output in outputs for abstains in output.abstained]
        raw = logits.float()
        abstaining = frozenset(row for row, abstains in enumerate(abstained) if abstains)
        return AuthorOutput(rows, raw, raw, hidden, abstaining, followed, samplings)

    def record_time(self) -> None:
        """Record the duration of the last `read`. Call this once its results are on the host."""
        seconds = time.perf_counter() - self._started
        self.seconds += seconds
        if self._run:
            first = self.times.at(self._tokens)
            self.run_times.record(self._tokens, max(seconds - first, 0.0) / self._run)
        elif self._tokens:
            self.times.record(self._tokens, seconds)

    def _followers(self, wanted: Mapping[Sequence, ReadSpan]) -> set[Sequence]:
        leaders, followers = set(), set()
        for sequence in wanted:
            if sequence not in self.slots and wanted[sequence].end > MIN_SHARED:
                beginning = tuple(sequence.text_of(self.author)[:MIN_SHARED])
                if beginning in leaders:
                    followers.add(sequence)
                leaders.add(beginning)
        return followers

    def _read(self, wanted: Mapping[Sequence, ReadSpan]) -> list[tuple[ListOf[Sequence], ModelOutput]]:
        """Extend all sequences at once. If the model raises, retry them one by one so that only faulty ones fail."""
        if not wanted:
            return []
        unseen, keep = {}, {}
        try:
            for sequence, span in wanted.items():
                text = sequence.text_of(self.author)[: span.end]
                if sequence not in self.slots:
                    # A shared prefix must end before the first token that needs an output.
                    self.slots[sequence] = self.runner.open(text[: span.end - span.keep + 1])
                    sequence.cuts.pop(self.author, None)
                slot = self._slot(sequence)
                unseen[slot], keep[slot] = text[self.runner.length(slot) :], span.keep
            output = self._extend(unseen, keep)
        except Exception as error:
            if len(wanted) > 1:
                _LOG.warning(
                    "%s failed on %d sequences (%r); retrying them one by one", self.runner.name, len(wanted), error
                )
                return [part for each in wanted for part in self._read({each: wanted[each]})]
            self.failures[next(iter(wanted))] = self._wrap_failure(error)
            return []
        self._tokens += sum(map(len, unseen.values()))
        return [(list(wanted), output)]

    def _slot(self, sequence: Sequence) -> int:
        """The sequence's slot, without tokens that the sequence has cut."""
        slot, cut = self.slots[sequence], sequence.cuts.pop(self.author, None)
        if cut is not None:
            self.runner.rollback(slot, min(self.runner.length(slot), cut))
        return slot

    def _extend(self, unseen: Mapping[int, ListOf[int]], keep: Mapping[int, int]) -> ModelOutput:
        if not self._run:
            return self.runner.extend(unseen, keep)
        assert isinstance(self.runner, ModelRunner)
        return self.runner.extend(unseen, keep, run=self._run)

    def _wrap_failure(self, error: Exception) -> CollmError:
        if isinstance(error, CollmError):
            return error
        failure = ModelFailure(f"{self.runner.name} raised {type(error).__name__}: {error}")
        failure.__cause__ = error
        return failure


def _concat(tensors: ListOf[Tensor | None]) -> Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    if not present:
        return None
    return present[0] if len(present) == 1 else torch.cat(present)
