"""One author reading the texts of sequences: their slots, shared prefixes, and what to do when a model breaks down."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from collections.abc import Sequence as ListOf
from dataclasses import dataclass

import torch
from torch import Tensor

from collm.decoding.draws import Draw, Logits, greedy_draws
from collm.decoding.pacing import PassTimes
from collm.decoding.sequence import Sequence
from collm.errors import CollmError, ModelFailure
from collm.models.runner import MIN_SHARED, Assistant, Reading

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stretch:
    """What an author is to read of a sequence: its text up to `end`, answering after each of the last `keep` tokens."""

    end: int
    keep: int = 1


@dataclass(frozen=True)
class Heard:
    """An author's answers.

    Attributes:
        rows: sequence -> its rows; sequences that failed are missing.
        raw: logits as the author gave them, shape (R, V), fp32.
        logits: those after what the requests do to them, shape (R, V), fp32.
        hidden: shape (R, H); None from an assistant that has none.
        silent: rows at which the author abstains.
    """

    rows: dict[Sequence, range]
    raw: Tensor
    logits: Tensor
    hidden: Tensor | None
    silent: frozenset[int]

    def at(self, row: int) -> Logits:
        """One row of the logits."""
        return Logits(self.raw[row], self.logits[row])

    def greedy(self, *others: Tensor) -> tuple[list[Draw], list[list[float]]]:
        """The argmax of each row, and further numbers for it (`greedy_draws`)."""
        return greedy_draws(self.logits, *others, raw=self.raw)


class Reader:
    """Lets one author read.

    Attributes:
        times: how long its passes take.
        failures: sequences it could not read, and why; the caller takes them out.
    """

    def __init__(self, author: int, runner: Assistant) -> None:
        self.author = author
        self.runner = runner
        self.times = PassTimes()
        self.failures: dict[Sequence, CollmError] = {}
        self._started = 0.0
        self._tokens = 0

    def has_read(self, sequence: Sequence, length: int) -> bool:
        """Whether the author has seen this much of the sequence's text."""
        slot = sequence.slots.get(self.author)
        return slot is not None and self.runner.length(slot) >= length

    def read(self, wanted: Mapping[Sequence, Stretch]) -> Heard | None:
        """Read what is unseen of every stretch; None if nothing could be read.

        Where several sequences begin alike and none was read yet, one goes first and the others take over what it read.
        """
        self._started, self._tokens = time.perf_counter(), 0
        followers = self._followers(wanted)
        parts = [self._read({s: stretch for s, stretch in wanted.items() if s not in followers})]
        if followers:
            parts.append(self._read({s: wanted[s] for s in followers}))
        heard = [(rows, reading) for part in parts for rows, reading in part]
        if not heard:
            return None
        rows, at = {}, 0
        for sequences, _ in heard:
            for sequence in sequences:
                rows[sequence] = range(at, at + wanted[sequence].keep)
                at += wanted[sequence].keep
        logits, hidden = (_joined([getattr(reading, name) for _, reading in heard]) for name in ("logits", "hidden"))
        assert logits is not None
        silent = [abstains for _, reading in heard for abstains in reading.silent]
        raw = logits.float()
        return Heard(rows, raw, raw, hidden, frozenset(row for row, abstains in enumerate(silent) if abstains))

    def clock(self) -> None:
        """Note how long the last `read` took; to be called when its numbers have arrived on the host."""
        if self._tokens:
            self.times.record(self._tokens, time.perf_counter() - self._started)

    def _followers(self, wanted: Mapping[Sequence, Stretch]) -> set[Sequence]:
        leaders, followers = set(), set()
        for sequence in wanted:
            if self.author not in sequence.slots and len(sequence.token_ids) > MIN_SHARED:
                beginning = tuple(sequence.token_ids[:MIN_SHARED])
                if beginning in leaders:
                    followers.add(sequence)
                leaders.add(beginning)
        return followers

    def _read(self, wanted: Mapping[Sequence, Stretch]) -> list[tuple[ListOf[Sequence], Reading]]:
        """One extend for all; if the model raises, one for each, so that only those at fault fail."""
        if not wanted:
            return []
        unseen, keep = {}, {}
        for sequence, stretch in wanted.items():
            text = sequence.text[: stretch.end]
            if self.author not in sequence.slots:
                # What it may find already read ends before the first token to answer after.
                sequence.slots[self.author] = self.runner.open(text[: stretch.end - stretch.keep + 1])
            slot = sequence.slots[self.author]
            unseen[slot], keep[slot] = text[self.runner.length(slot) :], stretch.keep
        try:
            reading = self.runner.extend(unseen, keep)
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
