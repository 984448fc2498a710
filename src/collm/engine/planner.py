"""Makes drafts and plans waiting, from what was measured while decoding."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import takewhile

from collm.core.types import BASE
from collm.engine.sequence import Sequence
from collm.engine.speculation import (
    AcceptanceRates,
    PassTimes,
    assistant_draft_length,
    guess_depth,
    lookup_length,
    pays,
    wait_steps,
)

_MOST_GUESSES = 8
"""Largest number of deferred positions that share an assistant call."""
_REPLAN_CALLS = 8
"""Uses of a planned wait after which it is planned again."""


class Planner:
    """Plans the steps of an engine. A plan affects speed only and never changes a token.

    Args:
        num_authors: number of authors, the base among them.
        active: the running sequences, kept up to date by the engine.
        lookahead: largest number of draft tokens per sequence; 0 disables drafts.
        max_wait: largest number of steps a sequence waits for others that need the same assistant.

    Attributes:
        times: the pass times of each author, which the engine records.
        acceptance: acceptance rates of the sequence that finished last, with which new ones start.
    """

    def __init__(self, num_authors: int, active: Mapping[int, Sequence], lookahead: int, max_wait: int) -> None:
        self.times = [PassTimes() for _ in range(num_authors)]
        self.acceptance = AcceptanceRates()
        self._active = active
        self._lookahead = lookahead
        self._max_wait = max_wait
        self._planned: dict[int, tuple[int, int]] = {}  # assistant -> steps to wait before a call, uses of this plan

    def draft_lookup(self, sequence: Sequence) -> None:
        """Draft tokens by prompt lookup, if they are likely enough to be accepted."""
        if not self._lookahead or sequence.tentative or sequence.draft or sequence.decisions:
            return
        draft = sequence.lookup.draft(min(self._lookahead, sequence.draft_limit))
        if draft and sequence.processors is not None:
            draft = draft[: sequence.processors.permitted(sequence.generated, draft)]
        if draft:
            times = self.times[BASE], self.times[1]
            length = lookup_length(sequence.acceptance or self.acceptance, *times, len(self._active), len(draft))
            sequence.draft += takewhile(lambda token_id: token_id not in sequence.end_ids, draft[:length])

    def draft_guess(self, sequence: Sequence) -> None:
        """Draft the base's own guess at a position that waits for an assistant, so that the base can continue."""
        if not sequence.decisions or sequence.decisions[0].choice is not None:
            return
        most = min(len(sequence.decisions), self._lookahead, sequence.draft_limit)
        if len(sequence.draft) >= most:
            return
        last, rates = sequence.decisions[-1], sequence.acceptance or self.acceptance
        likely = last.choice or last.guess
        if likely is None or likely.token_id in sequence.end_ids:
            return
        undecided = [decision for decision in sequence.decisions if decision.choice is None]
        author, drafts = undecided[0].author, False
        if sequence.tentative:
            chances = [rates.stands if one.consultation is not None else rates.agree for one in undecided]
            readers = [self.times[author] for author in undecided[0].needs]
            within = len(undecided) < (sequence.request.policy.every or self._lookahead)
            drafts = within and pays(chances, rates.stands, self.times[BASE], readers, len(self._active))
        elif len(self._active) == 1 or sequence.waited < self._planned.get(author, (0, 0))[0]:
            # otherwise the call that comes now would come without this sequence
            times = self.times[BASE], self.times[author]
            drafts = len(undecided) < guess_depth(rates, *times, len(self._active), min(self._lookahead, _MOST_GUESSES))
        if drafts:
            sequence.draft.append(likely.token_id)

    def assistant_draft_length(self, author: int, sequence: Sequence) -> int:
        """Draft tokens to ask of an assistant. Only a single sequence drafts, as passes over few rows do not pay."""
        if len(self._active) > 1 or not self._lookahead:
            return 0
        if sequence.decisions or sequence.draft or sequence.steps[-1].author != author or sequence.tentative:
            return 0
        times = self.times[BASE], self.times[author]
        rates, most = sequence.acceptance or self.acceptance, min(self._lookahead, sequence.draft_limit)
        return assistant_draft_length(rates, *times, most)

    def should_call(self, author: int, due: Collection[Sequence]) -> bool:
        """Whether some sequence has waited long enough, or no sequence can continue without an assistant.

        Sequences whose tokens are tentative wait for each other, so that one call checks all their drafts.
        """
        if any(s.segments is not None and s.segments.current for s in due):
            return True  # it has begun a segment
        writing = [s for s in self._active.values() if not s.decisions or s.decisions[0].choice or not s.has_read(BASE)]
        if not writing or (any(s.tentative for s in due) and not any(s.tentative for s in writing)):
            return True
        waited = [s.waited for s in due if not s.tentative or not self._max_wait]
        return bool(waited) and max(waited) >= self._wait_steps(author)

    def _wait_steps(self, author: int) -> int:
        active = len(self._active)
        if active == 1 or not self._max_wait:
            return 0
        waits, uses = self._planned.get(author, (0, 0))
        if uses % _REPLAN_CALLS == 0:
            rates = [sequence.acceptance or self.acceptance for sequence in self._active.values()]
            start, run = sum(each.start for each in rates) / active, sum(each.run for each in rates) / active
            waits = wait_steps(start, run, self.times[BASE], self.times[author], active, self._max_wait)
        self._planned[author] = waits, uses + 1
        return waits
