"""One author reading the texts of sequences: their slots, shared prefixes, and what to do when a model breaks down."""

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
    """What an author is to read of a sequence: its text up to `end`, answering after each of the last `keep` tokens."""

    end: int
    keep: int = 1


@dataclass(frozen=True)
class AuthorOutput:
    """An author's answers.

    Attributes:
        rows: sequence -> its rows; sequences that failed are missing.
        raw: logits as the author gave them, shape (R, V), fp32.
        logits: those after what the requests do to them, shape (R, V), fp32.
        hidden: shape (R, H); None from an assistant that has none.
        abstained: rows at which the author abstains.
        followed: for each row the token that was read after it in a run, else -1, shape (R,); None without a run.
        samplings: for each row how its token is drawn.
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
    """Lets one author read.

    Attributes:
        times: how long its passes take.
        run_times: how long each further pass of a run takes.
        seconds: spent reading, all together.
        failures: sequences it could not read, and why; the caller takes them out.
    """

    def __init__(self, author: int, runner: Assistant) -> None:
        self.author = author
        self.runner = runner
        self.times, self.run_times = PassTimes(), PassTimes()
        self.seconds = 0.0
        self.failures: dict[Sequence, CollmError] = {}
        self._started = 0.0
        self._tokens = 0
        self._run = 0

    def has_read(self, sequence: Sequence, length: int) -> bool:
        """Whether the author has seen this much of the sequence's text."""
        slot = sequence.slots.get(self.author)
        return slot is not None and self.runner.length(slot) >= length

    def read(self, wanted: Mapping[Sequence, ReadSpan], run: int = 0) -> AuthorOutput | None:
        """Read what is unseen of every stretch; None if nothing could be read.

        Where several sequences begin alike and none was read yet, one goes first and the others take over what it read.

        Args:
            run: tokens to read on after each stretch, as of `ModelRunner.extend`; answers follow those too.
        """
        self._started, self._tokens, self._run = time.perf_counter(), 0, run
        followers = self._followers(wanted)
        parts = [self._read({s: stretch for s, stretch in wanted.items() if s not in followers})]
        if followers:
            parts.append(self._read({s: wanted[s] for s in followers}))
        heard = [(sequences, reading) for part in parts for sequences, reading in part]
        if not heard:
            return None
        rows, samplings = dict[Sequence, range](), list[Sampling]()
        for sequence in (sequence for sequences, _ in heard for sequence in sequences):
            stretch = wanted[sequence]
            first = stretch.end - stretch.keep + 1 - len(sequence.request.prompt_ids)
            rows[sequence] = range(len(samplings), len(samplings) + stretch.keep + run)
            samplings += [sequence.sampling_of(self.author, first + i) for i in range(stretch.keep + run)]
        names = ("logits", "hidden", "followed")
        logits, hidden, followed = (_joined([getattr(reading, name) for _, reading in heard]) for name in names)
        assert logits is not None
        abstained = [abstains for _, reading in heard for abstains in reading.abstained]
        raw = logits.float()
        abstaining = frozenset(row for row, abstains in enumerate(abstained) if abstains)
        return AuthorOutput(rows, raw, raw, hidden, abstaining, followed, samplings)

    def clock(self) -> None:
        """Note how long the last `read` took; to be called when its numbers have arrived on the host."""
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
            if self.author not in sequence.slots and wanted[sequence].end > MIN_SHARED:
                beginning = tuple(sequence.text_of(self.author)[:MIN_SHARED])
                if beginning in leaders:
                    followers.add(sequence)
                leaders.add(beginning)
        return followers

    def _read(self, wanted: Mapping[Sequence, ReadSpan]) -> list[tuple[ListOf[Sequence], ModelOutput]]:
        """One extend for all; if the model raises, one for each, so that only those at fault fail."""
        if not wanted:
            return []
        unseen, keep = {}, {}
        for sequence, stretch in wanted.items():
            text = sequence.text_of(self.author)[: stretch.end]
            if self.author not in sequence.slots:
                # What it may find already read ends before the first token to answer after.
                sequence.slots[self.author] = self.runner.open(text[: stretch.end - stretch.keep + 1])
            slot = sequence.slots[self.author]
            unseen[slot], keep[slot] = text[self.runner.length(slot) :], stretch.keep
        try:
            reading = self._extend(unseen, keep)
        except Exception as error:
            if len(wanted) > 1:
                _LOG.warning(
                    "%s failed on %d sequences (%r); reading them one by one", self.runner.name, len(wanted), error
                )
                return [part for each in wanted for part in self._read({each: wanted[each]})]
            self.failures[next(iter(wanted))] = self._failure(error)
            return []
        self._tokens += sum(map(len, unseen.values()))
        return [(list(wanted), reading)]

    def _extend(self, unseen: Mapping[int, ListOf[int]], keep: Mapping[int, int]) -> ModelOutput:
        if not self._run:
            return self.runner.extend(unseen, keep)
        assert isinstance(self.runner, ModelRunner)
        return self.runner.extend(unseen, keep, run=self._run)

    def _failure(self, error: Exception) -> CollmError:
        if isinstance(error, CollmError):
            return error
        failure = ModelFailure(f"{self.runner.name} raised {type(error).__name__}: {error}")
        failure.__cause__ = error
        return failure


def _joined(tensors: ListOf[Tensor | None]) -> Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    if not present:
        return None
    return present[0] if len(present) == 1 else torch.cat(present)
