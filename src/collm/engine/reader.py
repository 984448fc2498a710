"""Runs one author on sequences: owns their slots, shares prefixes, draws the author's tokens and isolates failures."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from collections.abc import Sequence as ListOf
from dataclasses import dataclass

import torch
from torch import Tensor

from collm.core.head import DeferralHead
from collm.core.objective import author_logprobs, defer_probs
from collm.engine.draws import Draw, Logits, Sampling, draw_tokens
from collm.engine.logits_processors import Edits
from collm.engine.runner import ModelRunner
from collm.engine.sequence import Sequence
from collm.engine.slot_table import MIN_SHARED
from collm.engine.speculation import PassTimes
from collm.errors import CollmError, ModelFailure, PolicyFailure, RequestError
from collm.models.assistant import Assistant, ModelOutput

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class AuthorOutput:
    """An author's output for R positions.

    Attributes:
        rows: sequence -> its rows; sequences that failed are missing.
        draws: the token that the author writes at each row; None where it abstains.
        raw: the author's logits, shape (R, V), fp32.
        logits: logits after the requests' logits processors, shape (R, V), fp32.
        numbers: for each row of the base, the token that a run read after it or -1, the defer prob, P(author 0..K).
        author_logprobs: log P(Z) at each row of the base, shape (R, K + 1); None for an assistant.
    """

    rows: dict[Sequence, range]
    draws: list[Draw | None]
    raw: Tensor
    logits: Tensor
    numbers: list[list[float]]
    author_logprobs: Tensor | None

    def at(self, row: int) -> Logits:
        """One row of the logits."""
        return Logits(self.raw[row], self.logits[row])


class Reader:
    """Runs one author. It alone opens, rolls back and closes the author's slots.

    Args:
        head: the deferral head, for the reader of the base.

    Attributes:
        slots: sequence -> its KV slot, from its first read until `close`.
        times: durations of its passes.
        run_times: durations of each further pass of a run.
        seconds: total time spent in passes.
        failures: sequences that failed, with the error; the caller removes them.
    """

    def __init__(self, author: int, runner: Assistant, head: DeferralHead | None = None) -> None:
        self.author = author
        self.runner = runner
        self.slots: dict[Sequence, int] = {}
        self.times, self.run_times = PassTimes(), PassTimes()
        self.seconds = 0.0
        self.failures: dict[Sequence, CollmError] = {}
        self._head = head
        self._num_tokens = 0  # read in the current call

    def num_computed_tokens(self, sequence: Sequence) -> int:
        """Number of leading tokens of the sequence that the author has read, after a rollback to where it was cut."""
        if sequence not in self.slots:
            return 0
        slot = self.slots[sequence]
        length = self.runner.length(slot)
        cut = sequence.cuts.pop(self.author, length)
        if cut < length:
            self.runner.rollback(slot, cut)
        return min(cut, length)

    def has_read(self, sequence: Sequence) -> bool:
        """Whether the author has read all final and draft tokens."""
        return self.num_computed_tokens(sequence) >= sequence.num_tokens

    def confirm(self, sequence: Sequence) -> None:
        """Accept the tokens of a run that the sequence has made its own."""
        assert isinstance(self.runner, ModelRunner)
        length = self.num_computed_tokens(sequence)
        self.runner.confirm(self.slots[sequence], sequence.text_of(self.author)[length:])

    def close(self, sequence: Sequence, *, wipe: bool = False) -> None:
        """Close the sequence's slot, if it has one. `wipe` is necessary after NaN."""
        slot = self.slots.pop(sequence, None)
        if slot is not None:
            self.runner.close(slot, wipe=wipe)

    def read(self, wanted: Mapping[Sequence, range], run: int = 0) -> AuthorOutput | None:
        """Read the unread tokens of sequences, and draw the author's tokens. Return None if none could be read.

        If several new sequences share a prefix, one is read first and the others copy its cache. A tool abstains where
        a request's constraints change its token.

        Args:
            wanted: sequence -> the decisions for which the author's output is needed, without gaps.
            run: number of further tokens to generate and read greedily, as in `ModelRunner.extend`.
        """
        start, self._num_tokens, followers = time.perf_counter(), 0, self._followers(wanted)
        parts = self._extend({s: wanted[s] for s in wanted if s not in followers}, run)
        if followers:
            parts += self._extend({s: wanted[s] for s in followers}, run)
        if not parts:
            return None
        rows, samplings = dict[Sequence, range](), list[Sampling]()
        for sequence in [sequence for sequences, _ in parts for sequence in sequences]:
            places = range(wanted[sequence].start, wanted[sequence].stop + run)
            rows[sequence] = range(len(samplings), len(samplings) + len(places))
            samplings += [sequence.sampling(self.author, i) for i in places]
        output = parts[0][1] if len(parts) == 1 else _joined([output for _, output in parts])
        raw = output.logits.float()
        logits = self._edited(raw, rows, wanted)
        numbers, by_author = self._head_numbers(output)
        if logits is not raw:
            best, argmax = logits.max(-1)
            numbers += [torch.stack([best, argmax != raw.argmax(-1)], dim=-1)]
        draws, fetched = draw_tokens(logits, samplings, *numbers, raw=raw)
        self._record_time(time.perf_counter() - start, run)
        edits = []
        if logits is not raw:
            edits, fetched = [row[-2:] for row in fetched], [row[:-2] for row in fetched]
        self._check(rows, draws, fetched, edits)
        rows = {sequence: at for sequence, at in rows.items() if sequence not in self.failures}
        abstained = {row for row, abstains in enumerate(output.abstained) if abstains}
        if self.runner.may_abstain:
            abstained |= {row for row, (_, changed) in enumerate(edits) if changed}
        written = [None if row in abstained else draw for row, draw in enumerate(draws)]
        return AuthorOutput(rows, written, raw, logits, fetched, by_author)

    def _head_numbers(self, output: ModelOutput) -> tuple[list[Tensor], Tensor | None]:
        """The first numbers of each row, as in `AuthorOutput.numbers`, and log P(Z), shape (R, K + 1)."""
        if self._head is None:
            return [], None
        assert output.hidden is not None
        u = self._head(output.hidden)  # (R, K)
        by_author = author_logprobs(u)
        followed = u.new_full((len(u),), -1) if output.followed is None else output.followed
        return [followed.unsqueeze(-1), defer_probs(u).unsqueeze(-1), by_author.exp()], by_author

    def _followers(self, wanted: Mapping[Sequence, range]) -> set[Sequence]:
        """New sequences whose first tokens are those of another new sequence."""
        leaders, followers = set(), set()
        for sequence in wanted:
            if sequence not in self.slots:
                text = sequence.text_of(self.author)
                beginning = tuple(text[:MIN_SHARED])
                if len(text) > MIN_SHARED and beginning in leaders:
                    followers.add(sequence)
                leaders.add(beginning)
        return followers

    def _extend(self, wanted: Mapping[Sequence, range], run: int) -> list[tuple[ListOf[Sequence], ModelOutput]]:
        """Extend all sequences at once. If the model raises, retry them one by one so that only faulty ones fail."""
        unseen, keep = {}, {}
        try:
            for sequence, places in wanted.items():
                text = sequence.text_of(self.author)
                text = text[: len(text) - len(sequence.draft) + places[-1]]
                if sequence not in self.slots:
                    # A shared prefix must end before the first token that needs an output.
                    self.slots[sequence] = self.runner.open(text[: len(text) - len(places) + 1])
                    sequence.cuts.pop(self.author, None)
                slot, length = self.slots[sequence], self.num_computed_tokens(sequence)
                unseen[slot], keep[slot] = text[length:], len(places)
            if run:
                assert isinstance(self.runner, ModelRunner)
                output = self.runner.extend(unseen, keep, run=run)
            else:
                output = self.runner.extend(unseen, keep)
        except Exception as error:
            if len(wanted) > 1:
                _LOG.warning(
                    "%s failed on %d sequences (%r); retrying them one by one", self.runner.name, len(wanted), error
                )
                return [part for each in wanted for part in self._extend({each: wanted[each]}, run)]
            self.failures[next(iter(wanted))] = as_failure(error, ModelFailure, self.runner.name)
            return []
        self._num_tokens += sum(map(len, unseen.values()))
        return [(list(wanted), output)]

    def _edited(self, raw: Tensor, rows: Mapping[Sequence, range], wanted: Mapping[Sequence, range]) -> Tensor:
        """Logits after the requests' processors; the same tensor if there are none."""
        edits = None
        for sequence, at in rows.items():
            if sequence.edits_logits:
                edits = edits or Edits(raw.shape[-1], raw.device)
                try:
                    sequence.add_edits(edits, self.author, at, wanted[sequence].start)
                except Exception as error:
                    self.failures[sequence] = as_failure(error, PolicyFailure, sequence.request.policy)
        return raw if edits is None else edits.apply(raw)

    def _check(
        self,
        rows: Mapping[Sequence, range],
        draws: ListOf[Draw],
        numbers: ListOf[list[float]],
        edits: ListOf[list[float]],
    ) -> None:
        """Fail sequences with NaN, and those whose constraints allow no token.

        Args:
            edits: for each row, the largest logit and whether its token changed; empty if nothing was processed.
        """
        for sequence, at in rows.items():
            if sequence in self.failures:
                continue
            best = [edits[row][0] for row in at] if edits and sequence.edits_logits else []
            if -math.inf in best and not self.runner.may_abstain:
                reason = "the request's constraints allow no next token; loosen one of them"
                self.failures[sequence] = RequestError(reason)
            elif any(draws[row].invalid or any(map(math.isnan, numbers[row])) for row in at):
                self.failures[sequence] = ModelFailure(
                    f"{self.runner.name} returned NaN logits after {len(sequence.token_ids)} tokens; "
                    "check its weights and dtype"
                )
                self.close(sequence, wipe=True)

    def _record_time(self, seconds: float, run: int) -> None:
        """Record the duration of a read whose results are on the host."""
        self.seconds += seconds
        if run:
            first = self.times.at(self._num_tokens)
            self.run_times.record(self._num_tokens, max(seconds - first, 0.0) / run)
        elif self._num_tokens:
            self.times.record(self._num_tokens, seconds)


def _joined(outputs: ListOf[ModelOutput]) -> ModelOutput:
    """The rows of several outputs of one author."""
    hidden = [output.hidden for output in outputs if output.hidden is not None]
    followed = [output.followed for output in outputs if output.followed is not None]
    return ModelOutput(
        torch.cat([output.logits for output in outputs]),
        torch.cat(hidden) if hidden else None,
        [abstains for output in outputs for abstains in output.abstained],
        torch.cat(followed) if followed else None,
    )


def as_failure(error: Exception, kind: type[CollmError], raiser: object) -> CollmError:
    """An error of the package as it is; another one as a failure of what raised it."""
    if isinstance(error, CollmError):
        return error
    failure = kind(f"{raiser} raised {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure
