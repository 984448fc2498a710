"""Makes drafts, and plans runs and waiting, from what was measured while decoding."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping
from collections.abc import Sequence as ListOf
from contextlib import contextmanager
from itertools import takewhile

from collm.core.types import BASE
from collm.engine.reader import Reader
from collm.engine.runner import ModelRunner
from collm.engine.sequence import Sequence
from collm.engine.speculation import (
    AcceptanceRates,
    assistant_draft_length,
    guess_depth,
    lookup_length,
    run_length,
    wait_steps,
)

_MOST_GUESSES = 8
"""Largest number of deferred positions that share an assistant call."""
_REPLAN_STEPS = 8
"""Steps after which the number of steps to wait is planned again."""


class Planner:
    """Plans the steps of an engine. A plan affects speed only and never changes a token.

    Args:
        readers: the readers of all authors, which measure pass times.
        active: the running sequences, kept up to date by the engine.
        lookahead: largest number of draft tokens per sequence; 0 disables drafts.
        max_wait: largest number of steps a sequence waits for others that need the same assistant.

    Attributes:
        acceptance: acceptance rates of the sequence that finished last, with which new ones start.
    """

    def __init__(self, readers: ListOf[Reader], active: Mapping[int, Sequence], lookahead: int, max_wait: int) -> None:
        self.acceptance = AcceptanceRates()
        self._readers = readers
        self._active = active
        self._lookahead = lookahead
        self._max_wait = max_wait
        self._steps = 0
        self._planned_waits: dict[int, int] = {}  # assistant -> steps to wait before a call
        self._host_seconds = 0.0  # moving average of a step's time outside forward passes

    @contextmanager
    def timed_step(self) -> Iterator[None]:
        """Measure the time that a step spends outside forward passes."""
        if self._steps % _REPLAN_STEPS == 0:
            self._planned_waits.clear()
        self._steps += 1
        start, reading = time.perf_counter(), sum([reader.seconds for reader in self._readers])
        yield
        spent = time.perf_counter() - start - (sum([reader.seconds for reader in self._readers]) - reading)
        self._host_seconds += 0.1 * (spent - self._host_seconds)

    def draft_lookup(self, sequence: Sequence) -> None:
        """Draft tokens by prompt lookup, if they are likely enough to be accepted."""
        if not self._lookahead or sequence.consulted or sequence.draft or sequence.decisions:
            return
        draft = sequence.lookup.draft(min(self._lookahead, sequence.draft_limit))
        if draft and sequence.processors is not None:
            draft = draft[: sequence.processors.permitted(sequence.generated, draft)]
        if draft:
            times = self._readers[BASE].times, self._readers[1].times
            length = lookup_length(sequence.acceptance, *times, len(self._active), len(draft))
            sequence.draft += takewhile(lambda token_id: token_id not in sequence.end_ids, draft[:length])

    def draft_guess(self, sequence: Sequence) -> None:
        """Draft the base's own guess at a position that waits for an assistant, so that the base can continue."""
        if sequence.waits_for is None:
            return
        most = min(len(sequence.decisions), self._lookahead, sequence.draft_limit)
        if len(sequence.draft) >= most:
            return
        likely = sequence.decisions[-1].choice or sequence.decisions[-1].guess
        if likely is None or likely.token_id in sequence.end_ids:
            return
        times = self._readers[BASE].times, self._readers[sequence.waits_for].times
        depth = guess_depth(sequence.acceptance, *times, len(self._active), min(self._lookahead, _MOST_GUESSES))
        if sum(decision.choice is None for decision in sequence.decisions) < depth:
            sequence.draft.append(likely.token_id)

    def assistant_draft_length(self, author: int, sequence: Sequence) -> int:
        """Draft tokens to ask of an assistant. Only a single sequence drafts, as passes over few rows do not pay."""
        if len(self._active) > 1 or not self._lookahead:
            return 0
        if sequence.decisions or sequence.draft or sequence.steps[-1].author != author:
            return 0
        times = self._readers[BASE].times, self._readers[author].times
        return assistant_draft_length(sequence.acceptance, *times, min(self._lookahead, sequence.draft_limit))

    def run_length(self, reading: Collection[Sequence]) -> int:
        """Number of its own tokens that the base reads before the host inspects them."""
        base = self._readers[BASE]
        assert isinstance(base.runner, ModelRunner)
        if not reading or not base.runner.runs_ahead:
            return 0
        for s in reading:
            if s.request.params.temperature or s.processors is not None or s.consulted or s.draft or s.decisions:
                return 0
        longest = min(self._lookahead, *(s.draft_limit for s in reading))
        active = len(reading)
        start = sum(s.acceptance.start for s in reading) / active
        return run_length(start, base.times.at(active), base.run_times.at(active), self._host_seconds, longest)

    def should_call(self, author: int, due: Collection[Sequence]) -> bool:
        """Whether some sequence has waited long enough, or no sequence can continue without an assistant."""
        base = self._readers[BASE]
        stalled = all(s.waits_for is not None and base.has_read(s) for s in self._active.values())
        begun = any(s.segments is not None and s.segments.current for s in due)
        return stalled or begun or max(s.waited for s in due) >= self._wait_steps(author)

    def _wait_steps(self, author: int) -> int:
        active = len(self._active)
        if active == 1 or not self._max_wait:
            return 0
        if author not in self._planned_waits:
            start, run = (
                sum(getattr(s.acceptance, of) for s in self._active.values()) / active for of in ("start", "run")
            )
            times = self._readers[BASE].times, self._readers[author].times
            self._planned_waits[author] = wait_steps(start, run, *times, active, self._max_wait)
        return self._planned_waits[author]
