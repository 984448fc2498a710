"""The decoding loop. Sequences join and leave the batch between steps."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as ListOf
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from collm.core.combinations import CombiningPolicy
from collm.core.head import DeferralHead
from collm.core.objective import author_logprobs, defer_probs
from collm.core.policies import SingleAuthorPolicy
from collm.core.types import BASE, Completion, TokenStep
from collm.decoding.author_outputs import AuthorOutputs, draw_from_chosen_author, draw_from_combination
from collm.decoding.draws import Draw, draw_tokens
from collm.decoding.logits_processors import Edits
from collm.decoding.reader import AuthorOutput, Reader, ReadSpan
from collm.decoding.request import Request, check_cache, check_params, check_prompt
from collm.decoding.segments import SegmentSequence
from collm.decoding.sequence import Decision, Sequence
from collm.decoding.speculation import (
    AcceptanceRates,
    assistant_draft_length,
    guess_depth,
    lookup_length,
    run_length,
    wait_steps,
)
from collm.errors import CollmError, ConfigError, ModelFailure, PolicyFailure, RequestError
from collm.models.alignment import Alignment
from collm.models.grammars import Grammars
from collm.models.kv_cache import PAGE, in_pages
from collm.models.runner import Assistant, ModelRunner

_LOG = logging.getLogger(__name__)

LOOKAHEAD = 16
"""Default limit of draft tokens per sequence."""
MAX_WAIT = 16
"""Default limit of steps that a sequence waits so that an assistant call serves several sequences."""
_HEADROOM = 2 * PAGE
"""Cache positions reserved for each sequence beyond its text and draft."""
_REPLAN_STEPS = 8
"""Steps after which the number of steps to wait is planned again."""


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


@dataclass(frozen=True)
class HostOutput:
    """An author's output, transferred to the host.

    Attributes:
        rows: sequence -> its rows; sequences that failed are missing.
        draws: the drawn token of each row.
        numbers: the other numbers requested for each row.
        abstained: rows at which the author abstains.
    """

    rows: dict[Sequence, range]
    draws: list[Draw]
    numbers: list[list[float]]
    abstained: frozenset[int]


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
        self._base = base
        self.head = head
        self.tokenizer = tokenizer
        self.eos_ids = eos_ids
        self.grammars = grammars
        self.alignment = alignment
        self.max_batch = min([max_batch, *(one.most_slots for one in self.authors if one.most_slots is not None)])
        self.lookahead = lookahead
        self.max_wait = max_wait
        self._capacity = min((one.capacity for one in self.authors if one.capacity is not None), default=None)
        self._vocab_size = base.model.vocab_size
        own_end = tokenizer.eos_token_id
        self._end_id = own_end if own_end in eos_ids else min(eos_ids, default=-1)
        self._readers = [Reader(author, runner) for author, runner in enumerate(self.authors)]
        self._waiting: deque[Sequence] = deque()
        self._active: dict[int, Sequence] = {}
        self._count = 0
        self._outputs: list[RequestOutput] = []
        self._acceptance = AcceptanceRates()
        self._steps = 0
        self._planned_waits: dict[int, int] = {}  # assistant -> steps to wait before a call
        self._next_plan_step = 0
        self._host_seconds = 0.0  # moving average of a step's time outside forward passes

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
        for authors, vocab_size, prompt_ids in self._prompts(request):
            check_prompt(authors, vocab_size, prompt_ids)
            check_cache(authors, prompt_ids)
        check_params(request.params, self._vocab_size)
        policy = request.policy
        named = [policy.writer] if isinstance(policy, SingleAuthorPolicy) else policy.consults(len(self.authors) - 1)
        unknown = [author for author in named if not 0 <= author < len(self.authors)]
        if unknown:
            raise ConfigError(f"{policy} asks for author {unknown[0]}, expected 0 to {len(self.authors) - 1}")
        structured = request.params.structured_outputs
        grammar = self.grammars.compile(structured) if structured is not None else None
        arguments = self._count, request, self.authors, self.tokenizer, self.eos_ids, self._acceptance.copy(), grammar
        sequence = (
            Sequence(*arguments)
            if self.alignment is None
            else SegmentSequence(*arguments, alignment=self.alignment, end_id=self._end_id)
        )
        self._count += 1
        self._waiting.append(sequence)
        return sequence.number

    def _prompts(self, request: Request) -> list[tuple[ListOf[Assistant], int, list[int]]]:
        """Groups of authors that share a tokenizer, with vocabulary size and prompt."""
        if self.alignment is None:
            return [(self.authors, self._vocab_size, request.prompt_ids)]
        prompts = [request.prompt_ids, *request.assistant_prompts]
        by_author = zip(self.authors, self.alignment.tokenizers, prompts, strict=True)
        return [([author], tokenizer.vocab_size, prompt_ids) for author, tokenizer, prompt_ids in by_author]

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
        start, reading = time.perf_counter(), sum(reader.seconds for reader in self._readers)
        self._steps += 1
        self._schedule()
        consultations = self._read_base()
        for author in range(1, len(self.authors)):
            self._run_assistant(author, consultations)
        self._combine(consultations)
        outputs, self._outputs = self._outputs, []
        spent = time.perf_counter() - start - (sum(reader.seconds for reader in self._readers) - reading)
        self._host_seconds += 0.1 * (spent - self._host_seconds)
        return outputs

    # Scheduling

    def _schedule(self) -> None:
        """Preempt the youngest sequences while the caches are too small, then admit waiting ones that fit."""
        while len(self._active) > 1 and not self._have_room(self._active.values()):
            sequence = next(reversed(self._active.values()))
            self._leave(sequence)
            sequence.preempt()
            self._waiting.appendleft(sequence)
            _LOG.debug("sequence %d was preempted because the KV caches are full", sequence.number)
        while self._waiting and len(self._active) < self.max_batch:
            if self._active and not self._have_room([*self._active.values(), self._waiting[0]]):
                break
            sequence = self._waiting.popleft()
            self._active[sequence.number] = sequence

    def _have_room(self, sequences: Iterable[Sequence]) -> bool:
        """Whether every cache has room for these sequences and the tokens that a step may add."""
        if self._capacity is None:
            return True
        extra = self.lookahead + _HEADROOM
        return sum(in_pages(min(s.cache_length + extra, s.most_tokens)) for s in sequences) <= self._capacity

    # Run the base and choose an author for every position it reads

    def _read_base(self) -> dict[Sequence, AuthorOutputs]:
        """Run the base on unread tokens. Return the outputs of sequences whose policy consults assistants first."""
        reader = self._readers[BASE]
        reading = [s for s in self._active.values() if not reader.has_read(s, s.length)]
        for sequence in reading:
            with self._isolate_failures(sequence):
                self._draft_lookup(sequence)
        reading = [sequence for sequence in reading if self._runs(sequence)]
        run = self._run_length(reading)
        output = self._read(reader, {s: ReadSpan(s.length, len(s.draft) + 1 - len(s.decisions)) for s in reading}, run)
        if output is None:
            return {}
        assert output.hidden is not None
        u = self.head(output.hidden)  # (R, K)
        by_author = author_logprobs(u)  # (R, K + 1)
        followed = output.raw.new_full((len(output.raw),), -1) if output.followed is None else output.followed
        fetched = self._fetch(output, reader, followed.unsqueeze(-1), defer_probs(u).unsqueeze(-1), by_author.exp())
        consultations = {}
        for sequence, rows in fetched.rows.items():
            if any(math.isnan(fetched.numbers[row][1]) or fetched.draws[row].invalid for row in rows):
                self._fail_with_nan(sequence, BASE)
            elif sequence.consulted:
                _, defer_prob, *probs = fetched.numbers[rows[0]]
                logits = {BASE: output.at(rows[0])}
                consultations[sequence] = AuthorOutputs(defer_prob, probs, by_author[rows[0]], logits)
            else:
                with self._isolate_failures(sequence):
                    self._decide(sequence, [fetched.numbers[row] for row in rows], [fetched.draws[row] for row in rows])
                    self._settle(sequence)
                    self._draft_guess(sequence)
        return consultations

    def _decide(self, sequence: Sequence, numbers: ListOf[list[float]], draws: ListOf[Draw]) -> None:
        """Choose authors for the positions that the base has just read.

        Args:
            numbers: for each position, the token fed next in a run or -1, the defer prob, and P(author).
            draws: the base's token at each position.
        """
        for (followed, defer_prob, *probs), guess in zip(numbers, draws, strict=True):
            author = sequence.next_author(guess, defer_prob, probs)
            if author is None:
                return
            sequence.decisions.append(Decision(author, defer_prob, guess, guess if author == BASE else None))
            if followed >= 0:
                if author != BASE or guess.token_id != followed or sequence.ends(guess.token_id):
                    break
                sequence.draft.append(guess.token_id)
        self._readers[BASE].confirm(sequence)

    def _draft_lookup(self, sequence: Sequence) -> None:
        """Draft tokens by prompt lookup, if they are likely enough to be accepted."""
        if not self.lookahead or sequence.consulted or sequence.draft or sequence.decisions:
            return
        draft = sequence.lookup.draft(min(self.lookahead, sequence.draft_limit))
        if draft and sequence.processors is not None:
            draft = draft[: sequence.processors.permitted(sequence.generated, draft)]
        times = self._readers[BASE].times, self._readers[1].times
        length = lookup_length(sequence.acceptance, *times, len(self._active), len(draft)) if draft else 0
        for token_id in draft[:length]:
            if sequence.ends(token_id):
                break
            sequence.draft.append(token_id)

    def _draft_guess(self, sequence: Sequence) -> None:
        """Draft the base's own guess at a position that waits for an assistant, so that the base can continue."""
        if sequence.waits_for is None or len(sequence.draft) >= len(sequence.decisions):
            return
        last = sequence.decisions[-1]
        likely = last.choice or last.guess
        if likely is None or sequence.ends(likely.token_id):
            return
        if len(sequence.draft) >= min(self.lookahead, sequence.draft_limit):
            return
        unknown = sum(decision.choice is None for decision in sequence.decisions)
        if unknown >= self._guess_depth(sequence):
            return
        sequence.draft.append(likely.token_id)

    # Run the assistants

    def _run_assistant(self, author: int, consultations: Mapping[Sequence, AuthorOutputs]) -> None:
        """Run an assistant on sequences that wait for it, if a call pays now, and on those that consult it."""
        reader = self._readers[author]
        self._skip_unreadable(author)
        due = [s for s in self._active.values() if s.waits_for == author and self._readers[BASE].has_read(s, s.length)]
        if not self._should_call(author, due):
            for sequence in due:
                sequence.waited += 1
            due = []
        asked = {sequence: _decisions_for(author, sequence) for sequence in due}
        wanted = {s: ReadSpan(s.length_of(author, at[-1]), at[-1] - at[0] + 1) for s, at in asked.items()}
        wanted |= {s: ReadSpan(s.length) for s in consultations if author in s.consulted}
        output = self._read(reader, wanted)
        if output is None:
            return
        fetched = self._fetch(output, reader)
        for sequence, rows in fetched.rows.items():
            if any(fetched.draws[row].invalid for row in rows):
                self._fail_with_nan(sequence, author)
            elif sequence in consultations:
                consultations[sequence].add(author, None if rows[0] in fetched.abstained else output.at(rows[0]))
            else:
                with self._isolate_failures(sequence):
                    for i in asked[sequence]:
                        row = rows[i - asked[sequence][0]]
                        sequence.resolve(i, None if row in fetched.abstained else fetched.draws[row])
                    self._settle(sequence)
        self._draft_with_assistant(author, list(filter(self._runs, due)))

    def _skip_unreadable(self, author: int) -> None:
        """Let the base write where this assistant cannot continue the text."""
        for sequence in list(self._active.values()):
            with self._isolate_failures(sequence):
                if sequence.waits_for == author and not sequence.can_ask(author):
                    sequence.resolve(0, None)
                    self._settle(sequence)

    def _should_call(self, author: int, due: ListOf[Sequence]) -> bool:
        """Whether some sequence has waited long enough, or no sequence can continue without an assistant."""
        if not due:
            return False
        base = self._readers[BASE]
        stalled = all(s.waits_for is not None and base.has_read(s, s.length) for s in self._active.values())
        longest = max(sequence.waited for sequence in due)
        return stalled or any(s.in_segment for s in due) or longest >= self._wait_steps(author)

    def _draft_with_assistant(self, author: int, sequences: ListOf[Sequence]) -> None:
        """Let the assistant draft the next tokens in a run of deferrals, for the base to check in one pass."""
        lengths = {s: self._assistant_draft_length(author, s) for s in sequences}
        while wanted := {s: ReadSpan(s.length) for s, length in lengths.items() if len(s.draft) < length}:
            output = self._read(self._readers[author], wanted)
            if output is None:
                return
            fetched = self._fetch(output, self._readers[author])
            lengths = {s: length for s, length in lengths.items() if s in fetched.rows}
            for sequence, (row,) in fetched.rows.items():
                position, drawn = len(sequence.steps) + len(sequence.draft), fetched.draws[row]
                if drawn.invalid:
                    self._fail_with_nan(sequence, author)
                if row not in fetched.abstained:
                    sequence.assistant_draft[position] = author, drawn
                if drawn.invalid or row in fetched.abstained or sequence.ends(drawn.token_id):
                    del lengths[sequence]
                else:
                    sequence.draft.append(drawn.token_id)

    # Policies that consult assistants

    def _combine(self, consultations: Mapping[Sequence, AuthorOutputs]) -> None:
        """Draw the tokens of sequences whose policy has consulted assistants."""
        by_policy: dict[int, list[Sequence]] = {}
        for sequence in consultations:
            if self._runs(sequence):
                by_policy.setdefault(id(sequence.request.policy), []).append(sequence)
        groups = list(by_policy.values())
        for sequences in groups:
            policy = sequences[0].request.policy
            outputs = [consultations[sequence] for sequence in sequences]
            with self._isolate_failures(*sequences):
                try:
                    if isinstance(policy, CombiningPolicy):
                        written = draw_from_combination(policy, sequences, outputs)
                    else:
                        written = draw_from_chosen_author(sequences, outputs)
                except Exception:
                    if len(sequences) == 1:
                        raise
                    groups += [[sequence] for sequence in sequences]  # again one by one, so that only faulty ones fail
                    continue
                for sequence, output, (author, drawn) in zip(sequences, outputs, written, strict=True):
                    with self._isolate_failures(sequence):
                        if drawn.invalid:
                            raise PolicyFailure(f"{policy} returned NaN logits although its authors' logits are finite")
                        abstained = author in output.abstained
                        sequence.decisions.append(Decision(author, output.defer_prob, None, drawn, abstained))
                        self._settle(sequence)

    # Reading, failures and finished sequences

    def _read(self, reader: Reader, wanted: Mapping[Sequence, ReadSpan], run: int = 0) -> AuthorOutput | None:
        """Run an author and apply each request's logits processors to its output. Sequences that ended are left out."""
        wanted = {sequence: span for sequence, span in wanted.items() if self._runs(sequence)}
        output = reader.read(wanted, run) if wanted else None
        while reader.failures:
            self._fail(*reader.failures.popitem())
        if output is None:
            return None
        edits, processed = Edits(output.logits.shape[-1], output.logits.device), False
        for sequence, rows in list(output.rows.items()):
            if sequence.edits_logits:
                with self._isolate_failures(sequence):
                    sequence.process(edits, reader.author, rows, wanted[sequence].end)
                    processed = True
        return replace(output, logits=edits.apply(output.raw)) if processed else output

    def _fetch(self, output: AuthorOutput, reader: Reader, *others: Tensor) -> HostOutput:
        """Draw tokens and transfer them to the host, waiting for the device once.

        A tool abstains where a request's constraints change its token. A sequence fails if its constraints allow no
        token.

        Args:
            *others: further numbers to transfer for each row, shape (R, n) each.
        """
        edited = output.logits is not output.raw
        if edited:
            best, argmax = output.logits.max(-1)
            others = torch.stack([best, argmax != output.raw.argmax(-1)], dim=-1), *others
        draws, numbers = draw_tokens(output.logits, output.samplings, *others, raw=output.raw)
        reader.record_time()
        rows = {sequence: rows for sequence, rows in output.rows.items() if self._runs(sequence)}
        if not edited:
            return HostOutput(rows, draws, numbers, output.abstained)
        abstained = output.abstained
        if reader.runner.may_abstain:
            abstained |= {row for row, (_, changed, *_) in enumerate(numbers) if changed}
        else:
            for sequence in [one for one in rows if any(numbers[row][0] == -math.inf for row in rows[one])]:
                if sequence.edits_logits:
                    self._fail(
                        sequence, RequestError("the request's constraints allow no next token; loosen one of them")
                    )
                    del rows[sequence]
        return HostOutput(rows, draws, [row[2:] for row in numbers], abstained)

    def _settle(self, sequence: Sequence) -> None:
        """Emit the tokens that are final, and remove the sequence once it has finished."""
        steps = sequence.settle()
        for step in steps:
            self.authors[step.author].usage.tokens_written += 1
            last = sequence.finish_reason is not None and step is steps[-1]
            self._outputs.append(RequestOutput(sequence.number, step, sequence.completion() if last else None))
        if sequence.finish_reason is not None:
            self._acceptance = sequence.acceptance
            self._leave(sequence)

    def _runs(self, sequence: Sequence) -> bool:
        return sequence.number in self._active

    def _leave(self, sequence: Sequence, wiped: int | None = None) -> None:
        """Take a sequence out of the batch and close its slots. The slot of author `wiped` holds NaN."""
        del self._active[sequence.number]
        for reader in self._readers:
            reader.close(sequence, wipe=reader.author == wiped)

    @contextmanager
    def _isolate_failures(self, *sequences: Sequence) -> Iterator[None]:
        """End only these sequences if the block raises."""
        try:
            yield
        except CollmError as error:
            self._fail_all(sequences, error)
        except Exception as error:
            policy = sequences[0].request.policy
            failure = PolicyFailure(f"{policy} raised {type(error).__name__}: {error}")
            failure.__cause__ = error
            self._fail_all(sequences, failure)

    def _fail_all(self, sequences: ListOf[Sequence], failure: CollmError) -> None:
        for sequence in filter(self._runs, sequences):
            self._fail(sequence, failure)

    def _fail_with_nan(self, sequence: Sequence, author: int) -> None:
        self._fail(
            sequence,
            ModelFailure(
                f"{self.authors[author].name} returned NaN logits after {len(sequence.token_ids)} tokens; "
                "check its weights and dtype"
            ),
            wiped=author,
        )

    def _fail(self, sequence: Sequence, failure: CollmError, wiped: int | None = None) -> None:
        self._leave(sequence, wiped)
        self._outputs.append(RequestOutput(sequence.number, failure=failure))

    # Planning

    def _wait_steps(self, author: int) -> int:
        active = len(self._active)
        if active == 1 or not self.max_wait:
            return 0
        if self._steps >= self._next_plan_step:
            self._next_plan_step = self._steps + _REPLAN_STEPS
            self._planned_waits.clear()
        if author not in self._planned_waits:
            start, run = (
                sum(getattr(s.acceptance, of) for s in self._active.values()) / active for of in ("start", "run")
            )
            times = self._readers[BASE].times, self._readers[author].times
            self._planned_waits[author] = wait_steps(start, run, *times, active, self.max_wait)
        return self._planned_waits[author]

    def _run_length(self, reading: ListOf[Sequence]) -> int:
        """Number of its own tokens that the base reads before the host inspects them."""
        if not reading or not self._base.runs_ahead:
            return 0
        for s in reading:
            if s.request.params.temperature or s.processors is not None or s.consulted or s.draft or s.decisions:
                return 0
        longest = min(self.lookahead, *(s.draft_limit for s in reading))
        active = len(reading)
        start = sum(s.acceptance.start for s in reading) / active
        reader = self._readers[BASE]
        return run_length(start, reader.times.at(active), reader.run_times.at(active), self._host_seconds, longest)

    def _guess_depth(self, sequence: Sequence) -> int:
        base, assistant = (self._readers[author].times for author in (BASE, sequence.decisions[0].author))
        active = len(self._active)
        return guess_depth(sequence.acceptance, base, assistant, active, min(self.lookahead, 8))

    def _assistant_draft_length(self, author: int, sequence: Sequence) -> int:
        """Draft tokens to ask of an assistant. Only a single sequence drafts, as passes over few rows do not pay."""
        if len(self._active) > 1 or not self.lookahead:
            return 0
        if sequence.decisions or sequence.draft or sequence.steps[-1].author != author:
            return 0
        times = self._readers[BASE].times, self._readers[author].times
        return assistant_draft_length(sequence.acceptance, *times, min(self.lookahead, sequence.draft_limit))


def _decisions_for(author: int, sequence: Sequence) -> list[int]:
    """Indices of the decisions that wait for this assistant."""
    return [i for i, decision in enumerate(sequence.decisions) if decision.author == author and decision.choice is None]
