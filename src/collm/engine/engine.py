"""The decoding loop. Sequences join and leave the batch between steps."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence as ListOf
from dataclasses import dataclass, fields
from typing import Protocol, cast

import torch
from transformers import PreTrainedTokenizerBase

from collm.core.head import DeferralHead
from collm.core.types import BASE, Completion, TokenStep
from collm.engine.consulting import Place, decide_together, open_places
from collm.engine.decision import Consultation
from collm.engine.kv_cache import PAGE, in_pages
from collm.engine.planner import Planner
from collm.engine.reader import Ahead, AuthorOutput, Reader, as_failure
from collm.engine.request import Request, check_request
from collm.engine.runner import ModelRunner
from collm.engine.segments import SegmentUnit
from collm.engine.sequence import Sequence
from collm.engine.shared_pass import SharedPass, groups_of, read_ahead
from collm.errors import CollmError, ConfigError, PolicyFailure
from collm.models.assistant import Assistant
from collm.text.alignment import Alignment
from collm.text.grammars import Grammars

_LOG = logging.getLogger(__name__)

_HEADROOM = 2 * PAGE
"""Cache positions reserved for each sequence beyond its text and draft."""


@dataclass(frozen=True)
class EngineConfig:
    """Limits of a decoding loop.

    Attributes:
        max_batch: largest number of sequences decoded at once; further requests wait.
        lookahead: largest number of draft tokens per sequence; 0 disables drafts.
        max_wait: largest number of steps a sequence waits for others that need the same assistant; 0 disables waiting.

    Raises:
        ConfigError: a limit is out of range.
    """

    max_batch: int = 16
    lookahead: int = 16
    max_wait: int = 16

    def __post_init__(self) -> None:
        for name, value, least in zip((one.name for one in fields(self)), vars(self).values(), (1, 0, 0), strict=True):
            if value < least:
                raise ConfigError(f"{name} is {value}, expected at least {least}")


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
        authors: runners of the base and of the assistants 1..K.
        head: the deferral head, K outputs.
        tokenizer: the tokenizer of all models.
        grammars: compiles structured output constraints, and has the tokens that end a sequence.
        alignment: alignment of authors with different tokenizers; `tokenizer` and `grammars` are then the base's.
        shared: passes that serve several assistants at once.
    """

    def __init__(
        self,
        authors: ListOf[Assistant],
        head: DeferralHead,
        tokenizer: PreTrainedTokenizerBase,
        config: EngineConfig | None = None,
        *,
        grammars: Grammars,
        alignment: Alignment | None = None,
        shared: ListOf[SharedPass] = (),
    ) -> None:
        config = config or EngineConfig()
        self.authors = authors
        self._tokenizer = tokenizer
        self._grammars = grammars
        self._alignment = alignment
        own_end = tokenizer.eos_token_id
        self._end_id = own_end if own_end in grammars.eos_ids else min(grammars.eos_ids, default=-1)
        self._max_batch = min([config.max_batch, *(one.most_slots for one in authors if one.most_slots is not None)])
        self._capacity = min((one.capacity for one in authors if one.capacity is not None), default=None)
        self._headroom = config.lookahead + _HEADROOM
        self._waiting: deque[Sequence] = deque()
        self._active: dict[int, Sequence] = {}
        self._count = 0
        self._outputs: list[RequestOutput] = []
        self._base = Reader(BASE, authors[BASE], head)
        self._assistants = [Reader(author, runner) for author, runner in enumerate(authors[1:], start=1)]
        self._groups = groups_of(self._assistants, shared)
        self._planner: Planner | None = None
        if config.lookahead or (config.max_wait and self._max_batch > 1):
            self._planner = Planner(len(authors), self._active, config.lookahead, config.max_wait)

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
        base = cast(ModelRunner, self.authors[BASE])
        check_request(request, self.authors, base.model.vocab_size, self._alignment)
        structured = request.params.structured_outputs
        grammar = self._grammars.compile(structured) if structured is not None else None
        acceptance = self._planner.acceptance.copy() if self._planner is not None else None
        sequence = Sequence(
            self._count, request, self.authors, self._tokenizer, self._grammars.eos_ids, grammar, acceptance
        )
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
        if self._waiting or len(self._active) > 1:
            self._schedule()
        self._run_base()
        if any(sequence.decisions for sequence in self._active.values()):  # some positions need an assistant
            for readers, shared in self._groups:
                wanted = {reader: _due(reader.author, self._active, self._planner) for reader in readers}
                ahead = {} if shared is None else read_ahead(shared, wanted)
                for reader in readers:
                    self._run_assistant(reader, wanted[reader], ahead.get(reader))
            self._decide_consulted()
        outputs, self._outputs = self._outputs, []
        return outputs

    def _schedule(self) -> None:
        """Preempt the youngest sequences while the caches are too small, then admit waiting ones that fit."""

        def fit(*sequences: Sequence) -> bool:
            needed = (in_pages(_most_positions(sequence, self._headroom)) for sequence in sequences)
            return self._capacity is None or sum(needed) <= self._capacity

        while len(self._active) > 1 and not fit(*self._active.values()):
            sequence = next(reversed(self._active.values()))
            self._leave(sequence)
            sequence.preempt()
            self._waiting.appendleft(sequence)
            _LOG.debug("sequence %d was preempted because the KV caches are full", sequence.number)
        while self._waiting and len(self._active) < self._max_batch:
            if self._active and not fit(*self._active.values(), self._waiting[0]):
                break
            sequence = self._waiting.popleft()
            self._active[sequence.number] = sequence

    def _run_base(self) -> None:
        """Run the base on unread tokens and choose an author for every position that it reads."""
        unread = [sequence for sequence in self._active.values() if not sequence.has_read(BASE)]
        if self._planner is not None:
            for sequence in unread:
                try:
                    self._planner.draft_lookup(sequence)
                except Exception as error:
                    self._fail(error, sequence)
        output = self._read(self._base, {s: range(len(s.decisions), len(s.draft) + 1) for s in unread})
        if output is None:
            return
        for sequence, rows in output.rows.items():
            try:
                sequence.decide([(output.draws[row], output.numbers[row]) for row in rows])
                if sequence.tentative:
                    for decision, row in zip(sequence.decisions[-len(rows) :], rows, strict=True):
                        if decision.choice is None and decision.author == BASE:
                            decision.consultation = _consultation(output, row)
                self._advance(sequence)
                if self._planner is not None:
                    self._planner.draft_guess(sequence)
            except Exception as error:
                self._fail(error, sequence)

    def _run_assistant(self, reader: Reader, wanted: Mapping[Sequence, range], ahead: Ahead | None) -> None:
        """Run an assistant on sequences that need it, which it may have read ahead."""
        output = self._read(reader, wanted, ahead)
        if output is None:
            return
        for sequence, rows in output.rows.items():
            if sequence.number not in self._active:  # it has failed since the pass
                continue
            try:
                for i, row in zip(wanted[sequence], rows, strict=True):
                    decision, draw = sequence.decisions[i], output.draws[row]
                    if decision.consultation is not None:
                        decision.consultation.add(reader.author, None if draw is None else output.at(row))
                    elif decision.waits_for(reader.author):
                        sequence.resolve(decision, draw)
                self._advance(sequence)
            except Exception as error:
                self._fail(error, sequence)
        if self._planner is not None:
            self._draft_with_assistant(reader, self._planner)

    def _draft_with_assistant(self, reader: Reader, planner: Planner) -> None:
        """Let the assistant draft the next tokens in a run of deferrals, for the base to check in one pass."""
        lengths = {s: planner.assistant_draft_length(reader.author, s) for s in self._active.values()}
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

    def _decide_consulted(self) -> None:
        """Decide about the positions at which all authors that decide have been read, together for each policy."""
        by_policy: dict[int, list[list[Place]]] = {}
        for sequence in self._active.values():
            if places := open_places(sequence):
                by_policy.setdefault(id(sequence.request.policy), []).append(places)
        groups = list(by_policy.values())
        for group in groups:
            sequences = [places[0].sequence for places in group]
            try:
                decide_together(sequences[0].request.policy, [place for places in group for place in places])
            except Exception as error:
                for places in group:
                    for place in places:
                        place.decision.choice = None
                if len(group) == 1:
                    self._fail(error, *sequences)
                else:  # again one by one, so that only faulty ones fail
                    groups += [[places] for places in group]
                continue
            for sequence in sequences:
                try:
                    self._advance(sequence)
                except Exception as error:
                    self._fail(error, sequence)

    def _read(
        self, reader: Reader, wanted: Mapping[Sequence, range], ahead: Ahead | None = None
    ) -> AuthorOutput | None:
        """Run an author on sequences that have not ended, and end those that fail."""
        if ahead is None:
            wanted = {sequence: places for sequence, places in wanted.items() if sequence.number in self._active}
        output = reader.read(wanted, ahead) if wanted else None
        while reader.failures:
            sequence, failure = reader.failures.popitem()
            self._fail(failure, sequence)
        if output is not None and self._planner is not None:
            self._planner.times[reader.author].record(output.num_tokens, output.seconds)
        return output

    def _advance(self, sequence: Sequence) -> None:
        """Emit the tokens that are final, and remove the sequence once it has finished."""
        steps = sequence.advance()
        for step in steps:
            self.authors[step.author].usage.tokens_written += 1
            last = sequence.finish_reason is not None and step is steps[-1]
            self._outputs.append(RequestOutput(sequence.number, step, sequence.completion() if last else None))
        if sequence.finish_reason is not None:
            if self._planner is not None and sequence.acceptance is not None:
                self._planner.acceptance = sequence.acceptance
            self._leave(sequence)

    def _leave(self, sequence: Sequence) -> None:
        """Take a sequence out of the batch and close its slots."""
        del self._active[sequence.number]
        for reader in (self._base, *self._assistants):
            reader.close(sequence)

    def _fail(self, error: Exception, *sequences: Sequence) -> None:
        """End these sequences with a failure. Other sequences continue."""
        failure = as_failure(error, PolicyFailure, sequences[0].request.policy)
        for sequence in sequences:
            if sequence.number in self._active:
                self._leave(sequence)
                self._outputs.append(RequestOutput(sequence.number, failure=failure))


def _due(author: int, active: Mapping[int, Sequence], planner: Planner | None) -> dict[Sequence, range]:
    """The sequences that need an assistant, and where, unless a call for several of them pays more later."""
    due = [sequence for sequence in active.values() if sequence.waits_for(author) and sequence.has_read(BASE)]
    if due and planner is not None and not planner.should_call(author, due):
        for sequence in due:
            sequence.waited += 1
        return {}
    return {sequence: sequence.undecided(author) for sequence in due}


def _consultation(output: AuthorOutput, row: int) -> Consultation:
    """What the base predicts, for those who decide once the assistants have been read."""
    assert output.author_logprobs is not None
    return Consultation(output.numbers[row][1:], output.author_logprobs[row], {BASE: output.at(row)})


def _most_positions(sequence: Sequence, extra: int) -> int:
    """Cache positions that an author may need after `extra` more tokens."""
    num_tokens = len(sequence.token_ids) + len(sequence.draft)
    most = len(sequence.request.prompt_ids) + sequence.request.params.max_tokens
    most = most if sequence.max_length is None else min(most, sequence.max_length)
    longest = num_tokens if sequence.segments is None else sequence.segments.longest
    return longest + min(extra, most - num_tokens)
