"""The decoding loop. Sequences join and leave the batch between steps."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as ListOf
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import PreTrainedTokenizerBase

from collm.core.head import DeferralHead
from collm.core.types import BASE, Completion, TokenStep
from collm.engine.author_outputs import Consultation, decide_together
from collm.engine.kv_cache import PAGE, in_pages
from collm.engine.planner import Planner
from collm.engine.reader import AuthorOutput, Reader, as_failure
from collm.engine.request import Request, check_request
from collm.engine.runner import ModelRunner
from collm.engine.segments import SegmentUnit
from collm.engine.sequence import Sequence
from collm.errors import CollmError, ConfigError, PolicyFailure
from collm.models.assistant import Assistant
from collm.text.alignment import Alignment
from collm.text.grammars import Grammars

_LOG = logging.getLogger(__name__)

LOOKAHEAD = 16
"""Default limit of draft tokens per sequence."""
MAX_WAIT = 16
"""Default limit of steps that a sequence waits so that an assistant call serves several sequences."""
_HEADROOM = 2 * PAGE
"""Cache positions reserved for each sequence beyond its text and draft."""


@dataclass(frozen=True)
class RequestOutput:
    """A final token of a request, or its failure.

    Attributes:
        number: the request's number, as returned by `Engine.add`.
        step: the token; None if the request failed.
        completion: everything that was generated; set with the last token only.
        failure: why the request failed. Other requests are unaffected.
    """

    number: int
    step: TokenStep | None = None
    completion: Completion | None = None
    failure: CollmError | None = None


class DecodingLoop(Protocol):
    """Interface of decoding loops, for models in memory or on servers. Not thread-safe."""

    @property
    def has_work(self) -> bool: ...

    def add(self, request: Request) -> int: ...

    def cancel(self, number: int) -> None: ...

    def step(self) -> list[RequestOutput]: ...

    def close(self) -> None: ...


class Engine:
    """Decodes requests in a continuous batch.

    A step runs the base on the unread tokens of every sequence, chooses an author for each new position, and runs the
    assistants for sequences that are blocked without them. Draft lengths and waiting times follow from measured pass
    times and never change a token.

    Args:
        base: runner of the base.
        assistants: runners of authors 1..K.
        head: the deferral head, K outputs.
        tokenizer: the tokenizer of all models.
        eos_ids: tokens that end a sequence.
        grammars: compiles structured output constraints.
        alignment: alignment of authors with different tokenizers; `tokenizer` and `eos_ids` are then the base's.
        max_batch: largest number of sequences decoded at once; further requests wait.
        lookahead: largest number of draft tokens per sequence; 0 disables drafts.
        max_wait: largest number of steps a sequence waits for others that need the same assistant; 0 disables waiting.

    Raises:
        ConfigError: a limit is out of range.
    """

    def __init__(
        self,
        base: ModelRunner,
        assistants: ListOf[Assistant],
        head: DeferralHead,
        tokenizer: PreTrainedTokenizerBase,
        *,
        eos_ids: frozenset[int],
        grammars: Grammars,
        alignment: Alignment | None = None,
        max_batch: int = 16,
        lookahead: int = LOOKAHEAD,
        max_wait: int = MAX_WAIT,
    ) -> None:
        for name, value, least in (("max_batch", max_batch, 1), ("lookahead", lookahead, 0), ("max_wait", max_wait, 0)):
            if value < least:
                raise ConfigError(f"{name} is {value}, expected at least {least}")
        self.authors: list[Assistant] = [base, *assistants]
        self._vocab_size = base.model.vocab_size
        self._tokenizer = tokenizer
        self._eos_ids = eos_ids
        self._grammars = grammars
        self._alignment = alignment
        own_end = tokenizer.eos_token_id
        self._end_id = own_end if own_end in eos_ids else min(eos_ids, default=-1)
        self._max_batch = min([max_batch, *(one.most_slots for one in self.authors if one.most_slots is not None)])
        self._capacity = min((one.capacity for one in self.authors if one.capacity is not None), default=None)
        self._headroom = lookahead + _HEADROOM
        self._waiting: deque[Sequence] = deque()
        self._active: dict[int, Sequence] = {}
        self._count = 0
        self._outputs: list[RequestOutput] = []
        self._base = Reader(BASE, base, head)
        self._assistants = [Reader(author, runner) for author, runner in enumerate(assistants, start=1)]
        self._planner = Planner([self._base, *self._assistants], self._active, lookahead, max_wait)

    @property
    def has_work(self) -> bool:
        return bool(self._active or self._waiting)

    def add(self, request: Request) -> int:
        """Queue a request and return its number.

        Raises:
            RequestError: the prompt is empty, holds unknown token ids or leaves no room in a model's context or cache;
                or the parameters name unknown tokens or an unusable grammar.
            ConfigError: the policy names an author that does not exist.
        """
        check_request(request, self.authors, self._vocab_size, self._alignment)
        structured = request.params.structured_outputs
        grammar = self._grammars.compile(structured) if structured is not None else None
        rates = self._planner.acceptance.copy()
        sequence = Sequence(self._count, request, self.authors, self._tokenizer, self._eos_ids, rates, grammar)
        if self._alignment is not None:
            sequence.segments = SegmentUnit(sequence, self._alignment, self._end_id)
        self._count += 1
        self._waiting.append(sequence)
        return sequence.number

    def cancel(self, number: int) -> None:
        """Drop a running or waiting request and free its slots."""
        self._waiting = deque(sequence for sequence in self._waiting if sequence.number != number)
        if number in self._active:
            self._leave(self._active[number])

    def close(self) -> None:
        """Drop all requests."""
        self._waiting.clear()
        for sequence in list(self._active.values()):
            self._leave(sequence)

    @torch.inference_mode()
    def step(self) -> list[RequestOutput]:
        """Run the base once and the assistants where needed. Return new outputs in order.

        If a model or policy fails, only the sequences concerned end, each with a failure.
        """
        with self._planner.timed_step():
            self._schedule()
            consultations = self._run_base()
            for reader in self._assistants:
                self._run_assistant(reader, consultations)
            if consultations:
                self._combine(consultations)
        outputs, self._outputs = self._outputs, []
        return outputs

    def _schedule(self) -> None:
        """Preempt the youngest sequences while the caches are too small, then admit waiting ones that fit."""
        while len(self._active) > 1 and not self._have_room(self._active.values()):
            sequence = next(reversed(self._active.values()))
            self._leave(sequence)
            sequence.preempt()
            self._waiting.appendleft(sequence)
            _LOG.debug("sequence %d was preempted because the KV caches are full", sequence.number)
        while self._waiting and len(self._active) < self._max_batch:
            if self._active and not self._have_room([*self._active.values(), self._waiting[0]]):
                break
            sequence = self._waiting.popleft()
            self._active[sequence.number] = sequence

    def _have_room(self, sequences: Iterable[Sequence]) -> bool:
        """Whether every cache has room for these sequences and the tokens that a step may add."""
        if self._capacity is None:
            return True
        return sum(in_pages(sequence.most_positions(self._headroom)) for sequence in sequences) <= self._capacity

    def _run_base(self) -> dict[Sequence, Consultation]:
        """Run the base on unread tokens and choose an author for every position that it reads.

        Returns:
            The base's output for sequences whose policy consults assistants first.
        """
        unread = [sequence for sequence in self._active.values() if not self._base.has_read(sequence)]
        for sequence in unread:
            with self._isolate_failures(sequence):
                self._planner.draft_lookup(sequence)
        unread = [sequence for sequence in unread if sequence.number in self._active]
        run = self._planner.run_length(unread)
        output = self._read(self._base, {s: range(len(s.decisions), len(s.draft) + 1) for s in unread}, run)
        consultations: dict[Sequence, Consultation] = {}
        if output is None:
            return consultations
        for sequence, rows in output.rows.items():
            if sequence.consulted:
                consultations[sequence] = Consultation.of_base(output, rows[0])
                continue
            with self._isolate_failures(sequence):
                sequence.decide([(output.draws[row], output.numbers[row]) for row in rows])
                if run:
                    self._base.confirm(sequence)
                self._settle(sequence)
                self._planner.draft_guess(sequence)
        return consultations

    def _run_assistant(self, reader: Reader, consultations: Mapping[Sequence, Consultation]) -> None:
        """Run an assistant on sequences that wait for it, if a call pays now, and on those that consult it."""
        author = reader.author
        due = [s for s in self._active.values() if s.waits_for == author and self._base.has_read(s)]
        if due and not self._planner.should_call(author, due):
            for sequence in due:
                sequence.waited += 1
            due = []
        wanted = {sequence: sequence.undecided(author) for sequence in due}
        wanted |= {sequence: range(1) for sequence in consultations if author in sequence.consulted}
        output = self._read(reader, wanted) if wanted else None
        if output is None:
            return
        for sequence, rows in output.rows.items():
            if sequence in consultations:
                consultations[sequence].add(author, output.at(rows[0]) if output.draws[rows[0]] else None)
                continue
            with self._isolate_failures(sequence):
                for i, row in zip(wanted[sequence], rows, strict=True):
                    if sequence.decisions[i].author == author and sequence.decisions[i].choice is None:
                        sequence.resolve(i, output.draws[row])
                self._settle(sequence)
        self._draft_with_assistant(reader, [sequence for sequence in due if sequence.number in self._active])

    def _draft_with_assistant(self, reader: Reader, sequences: ListOf[Sequence]) -> None:
        """Let the assistant draft the next tokens in a run of deferrals, for the base to check in one pass."""
        lengths = {s: self._planner.assistant_draft_length(reader.author, s) for s in sequences}
        while wanted := {s: range(len(s.draft), len(s.draft) + 1) for s in lengths if len(s.draft) < lengths[s]}:
            output = self._read(reader, wanted)
            if output is None:
                return
            lengths = {sequence: lengths[sequence] for sequence in output.rows}
            for sequence, (row,) in output.rows.items():
                drawn = output.draws[row]
                if drawn is not None:
                    sequence.assistant_draft[len(sequence.steps) + len(sequence.draft)] = reader.author, drawn
                if drawn is None or drawn.token_id in sequence.end_ids:
                    del lengths[sequence]
                else:
                    sequence.draft.append(drawn.token_id)

    def _combine(self, consultations: Mapping[Sequence, Consultation]) -> None:
        """Draw the tokens of sequences whose policy has consulted assistants."""
        by_policy: dict[int, list[Sequence]] = {}
        for sequence in consultations:
            if sequence.number in self._active:
                by_policy.setdefault(id(sequence.request.policy), []).append(sequence)
        groups = list(by_policy.values())
        for sequences in groups:
            with self._isolate_failures(*sequences):
                try:
                    decisions = decide_together(sequences, [consultations[sequence] for sequence in sequences])
                except Exception:
                    if len(sequences) == 1:
                        raise
                    groups += [[sequence] for sequence in sequences]  # again one by one, so that only faulty ones fail
                    continue
                for sequence, decision in zip(sequences, decisions, strict=True):
                    with self._isolate_failures(sequence):
                        if decision.choice is not None and decision.choice.invalid:
                            raise PolicyFailure(
                                f"{sequence.request.policy} returned NaN logits although its authors' logits are finite"
                            )
                        sequence.decisions.append(decision)
                        self._settle(sequence)

    def _read(self, reader: Reader, wanted: Mapping[Sequence, range], run: int = 0) -> AuthorOutput | None:
        """Run an author on sequences that have not ended, and end those that fail."""
        wanted = {sequence: places for sequence, places in wanted.items() if sequence.number in self._active}
        output = reader.read(wanted, run) if wanted else None
        while reader.failures:
            sequence, failure = reader.failures.popitem()
            self._fail(failure, sequence)
        return output

    def _settle(self, sequence: Sequence) -> None:
        """Emit the tokens that are final, and remove the sequence once it has finished."""
        steps = sequence.settle()
        for step in steps:
            self.authors[step.author].usage.tokens_written += 1
            last = sequence.finish_reason is not None and step is steps[-1]
            self._outputs.append(RequestOutput(sequence.number, step, sequence.completion() if last else None))
        if sequence.finish_reason is not None:
            self._planner.acceptance = sequence.acceptance
            self._leave(sequence)

    def _leave(self, sequence: Sequence) -> None:
        """Take a sequence out of the batch and close its slots."""
        del self._active[sequence.number]
        for reader in (self._base, *self._assistants):
            reader.close(sequence)

    @contextmanager
    def _isolate_failures(self, *sequences: Sequence) -> Iterator[None]:
        """End only these sequences if the block raises."""
        try:
            yield
        except Exception as error:
            self._fail(as_failure(error, PolicyFailure, sequences[0].request.policy), *sequences)

    def _fail(self, failure: CollmError, *sequences: Sequence) -> None:
        for sequence in sequences:
            if sequence.number in self._active:
                self._leave(sequence)
                self._outputs.append(RequestOutput(sequence.number, failure=failure))
