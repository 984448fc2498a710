"""The one decoding loop: any number of sequences and assistants, joining and leaving between steps."""

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
from collm.core.types import BASE, Completion, TokenStep
from collm.decoding.author_outputs import AuthorOutputs, chosen, combined
from collm.decoding.draws import Draw, draw_tokens
from collm.decoding.logits_processors import Edits
from collm.decoding.reader import AuthorOutput, Reader, ReadSpan
from collm.decoding.request import Request, check_cache, check_params, check_prompt
from collm.decoding.segments import SegmentSequence
from collm.decoding.sequence import Decision, Sequence
from collm.decoding.speculation import AcceptanceRates, ahead_length, guess_depth, lookup_length, run_length, wait_steps
from collm.errors import CollmError, ConfigError, ModelFailure, PolicyFailure, RequestError
from collm.models.alignment import Alignment
from collm.models.grammars import Grammars
from collm.models.kv_cache import PAGE, in_pages
from collm.models.runner import Assistant, ModelRunner

_LOG = logging.getLogger(__name__)

LOOKAHEAD = 16
"""Default for the most tentative tokens of a sequence."""
MAX_WAIT = 16
"""Default for the most steps that a sequence waits for company."""
_ROOM = 2 * PAGE
"""Positions that a sequence is given beyond its text and draft before another may take them."""
_PLAN_LASTS = 8
"""Steps after which the waiting is planned anew."""


@dataclass(frozen=True)
class RequestOutput:
    """What became certain of the sequence that `Engine.add` numbered `number`.

    Attributes:
        step: a token; None if the sequence failed.
        completion: everything that was generated, with the last token.
        failure: why the sequence ended early; its neighbours go on.
    """

    number: int
    step: TokenStep | None = None
    completion: Completion | None = None
    failure: CollmError | None = None


@dataclass(frozen=True)
class Said:
    """What an author said, on the host.

    Attributes:
        rows: sequence -> its rows; sequences that failed are missing.
        draws: for each row the token it writes.
        numbers: for each row what else was asked for.
        abstained: rows at which the author abstains.
    """

    rows: dict[Sequence, range]
    draws: list[Draw]
    numbers: list[list[float]]
    abstained: frozenset[int]


class DecodingLoop(Protocol):
    """Decodes requests that come and go, on models in memory or across servers; from one thread."""

    @property
    def has_work(self) -> bool: ...

    def add(self, request: Request) -> int: ...

    def cancel(self, number: int) -> None: ...

    def step(self) -> list[RequestOutput]: ...

    def close(self) -> None: ...


class Engine:
    """Decodes requests together.

    A step lets the base read whatever it can of every sequence, decides who writes there, and asks the assistants for
    sequences that cannot go on without them. Which tentative tokens are read, and which sequences wait for each other,
    follows from measured times and never changes a token.

    Args:
        base: runner of the base.
        assistants: authors 1..K.
        head: the deferral head, K outputs.
        tokenizer: of all models.
        eos_ids: tokens that end a sequence.
        grammars: compiles what texts must be.
        alignment: of the authors, if they do not share a tokenizer; then `tokenizer` and `eos_ids` are the base's.
        max_batch: most sequences decoded at once; further ones wait.
        lookahead: most tentative tokens of a sequence; 0 reads nothing ahead.
        max_wait: most steps a sequence waits for others that need the same assistant; 0 never waits.

    Raises:
        ConfigError: a limit out of range.
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
        self._waits: dict[int, int] = {}  # assistant -> steps to wait for company
        self._replan = 0
        self._host_seconds = 0.0  # of a step, beside reading

    @property
    def has_work(self) -> bool:
        return bool(self._active or self._waiting)

    def add(self, request: Request) -> int:
        """Queue a request; its number tells its steps from others'.

        Raises:
            RequestError: the prompt is empty, holds unknown token ids or leaves no room in a model's context or cache;
                or the parameters name unknown tokens or a grammar that cannot be followed.
            ConfigError: the policy asks for an author that does not exist.
        """
        for authors, vocab_size, prompt_ids in self._prompts(request):
            check_prompt(authors, vocab_size, prompt_ids)
            check_cache(authors, prompt_ids)
        check_params(request.params, self._vocab_size)
        consulted = request.policy.consults(len(self.authors) - 1)
        unknown = [author for author in consulted if not 1 <= author < len(self.authors)]
        if unknown:
            raise ConfigError(f"{request.policy} asks for author {unknown[0]}, expected 0 to {len(self.authors) - 1}")
        structured = request.params.structured_outputs
        grammar = self.grammars.compile(structured) if structured is not None else None
        made = self._count, request, self.authors, self.tokenizer, self.eos_ids, self._acceptance.copy(), grammar
        sequence = (
            Sequence(*made)
            if self.alignment is None
            else SegmentSequence(*made, alignment=self.alignment, end_id=self._end_id)
        )
        self._count += 1
        self._waiting.append(sequence)
        return sequence.number

    def _prompts(self, request: Request) -> list[tuple[ListOf[Assistant], int, list[int]]]:
        """Authors with the size of their vocabulary and their prompt."""
        if self.alignment is None:
            return [(self.authors, self._vocab_size, request.prompt_ids)]
        prompts = [request.prompt_ids, *request.assistant_prompts]
        of_each = zip(self.authors, self.alignment.tokenizers, prompts, strict=True)
        return [([author], tokenizer.vocab_size, prompt_ids) for author, tokenizer, prompt_ids in of_each]

    def cancel(self, number: int) -> None:
        """Drop a request, running or waiting; its slots are free at once."""
        self._waiting = deque(sequence for sequence in self._waiting if sequence.number != number)
        if number in self._active:
            self._active.pop(number).leave()

    def close(self) -> None:
        """Drop all requests."""
        self._waiting.clear()
        while self._active:
            self._active.popitem()[1].leave()

    @torch.inference_mode()
    def step(self) -> list[RequestOutput]:
        """Let the base read once, and the assistants that are due; what became certain, in order.

        A sequence whose model or policy breaks down leaves with its failure; the others go on.
        """
        start, reading = time.perf_counter(), sum(reader.seconds for reader in self._readers)
        self._steps += 1
        self._schedule()
        consultations = self._read_base()
        for author in range(1, len(self.authors)):
            self._ask(author, consultations)
        self._combine(consultations)
        outputs, self._outputs = self._outputs, []
        spent = time.perf_counter() - start - (sum(reader.seconds for reader in self._readers) - reading)
        self._host_seconds += 0.1 * (spent - self._host_seconds)
        return outputs

    # Who takes part

    def _schedule(self) -> None:
        """Take back the youngest sequences that the caches have no room for, and take in those that wait for room."""
        while len(self._active) > 1 and not self._fit(self._active.values()):
            sequence = self._active.popitem()[1]
            sequence.pause()
            self._waiting.appendleft(sequence)
            _LOG.debug("sequence %d waits for room in the caches", sequence.number)
        while self._waiting and len(self._active) < self.max_batch:
            if self._active and not self._fit([*self._active.values(), self._waiting[0]]):
                break
            sequence = self._waiting.popleft()
            self._active[sequence.number] = sequence

    def _fit(self, sequences: Iterable[Sequence]) -> bool:
        """Whether these sequences have room in every cache for what a step may add to them."""
        if self._capacity is None:
            return True
        ahead = self.lookahead + _ROOM
        return sum(in_pages(min(s.cache_length + ahead, s.most_tokens)) for s in sequences) <= self._capacity

    # The base reads, and every position it reads is decided

    def _read_base(self) -> dict[Sequence, AuthorOutputs]:
        """Extend every sequence that has something unread; those whose policy asks first come back undecided."""
        reader = self._readers[BASE]
        reading = [s for s in self._active.values() if not reader.has_read(s, s.length)]
        for sequence in reading:
            self._look_up(sequence)
        run = self._run_length(reading)
        heard = self._read(reader, {s: ReadSpan(s.length, len(s.draft) + 1 - len(s.decisions)) for s in reading}, run)
        if heard is None:
            return {}
        assert heard.hidden is not None
        u = self.head(heard.hidden)  # (R, K)
        by_author = author_logprobs(u)  # (R, K + 1)
        followed = heard.raw.new_full((len(heard.raw),), -1) if heard.followed is None else heard.followed
        said = self._fetch(heard, reader, followed.unsqueeze(-1), defer_probs(u).unsqueeze(-1), by_author.exp())
        consultations = {}
        for sequence, rows in said.rows.items():
            if any(math.isnan(said.numbers[row][1]) or said.draws[row].broken for row in rows):
                self._fail_with_nan(sequence, BASE)
            elif sequence.consulted:
                _, defer_prob, *probs = said.numbers[rows[0]]
                logits = {BASE: heard.at(rows[0])}
                consultations[sequence] = AuthorOutputs(defer_prob, probs, by_author[rows[0]], logits)
            else:
                with self._alone(sequence):
                    self._decide(sequence, [said.numbers[row] for row in rows], [said.draws[row] for row in rows])
                    self._settle(sequence)
                    self._go_on(sequence)
        return consultations

    def _decide(self, sequence: Sequence, numbers: ListOf[list[float]], draws: ListOf[Draw]) -> None:
        """Decide the positions after the last decision, where the base has been heard.

        Args:
            numbers: for each the token that was read on with, or -1; the defer prob; P(author).
            draws: what the base writes there.
        """
        for (followed, defer_prob, *probs), guess in zip(numbers, draws, strict=True):
            author = sequence.author_at(guess, defer_prob, probs)
            if author is None:
                return
            sequence.decisions.append(Decision(author, defer_prob, guess, guess if author == BASE else None))
            if followed >= 0:
                if author != BASE or guess.token_id != followed or sequence.ends(guess.token_id):
                    break
                sequence.draft.append(guess.token_id)
        runner, slot = self._base, sequence.slots[BASE]
        runner.confirm(slot, sequence.text[runner.length(slot) :])

    def _look_up(self, sequence: Sequence) -> None:
        """Draft what prompt lookup says, if enough of it is likely to hold."""
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

    def _go_on(self, sequence: Sequence) -> None:
        """Let the base read on after a position that waits for an assistant, as if its own guess were right."""
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

    # Assistants are asked

    def _ask(self, author: int, consultations: Mapping[Sequence, AuthorOutputs]) -> None:
        """Let an assistant read the sequences that wait for it, if the call is worth it now, and those that consult."""
        reader = self._readers[author]
        self._pass_over(author)
        due = [s for s in self._active.values() if s.waits_for == author and self._readers[BASE].has_read(s, s.length)]
        if not self._worth_calling(author, due):
            for sequence in due:
                sequence.waited += 1
            due = []
        asked = {sequence: _asked_of(author, sequence) for sequence in due}
        wanted = {s: ReadSpan(s.length_of(author, at[-1]), at[-1] - at[0] + 1) for s, at in asked.items()}
        wanted |= {s: ReadSpan(s.length) for s in consultations if author in s.consulted}
        heard = self._read(reader, wanted)
        if heard is None:
            return
        said = self._fetch(heard, reader)
        for sequence, rows in said.rows.items():
            if any(said.draws[row].broken for row in rows):
                self._fail_with_nan(sequence, author)
            elif sequence in consultations:
                consultations[sequence].hear(author, None if rows[0] in said.abstained else heard.at(rows[0]))
            else:
                with self._alone(sequence):
                    for i in asked[sequence]:
                        row = rows[i - asked[sequence][0]]
                        sequence.answer(i, None if row in said.abstained else said.draws[row])
                    self._settle(sequence)
        self._write_ahead(author, [s for s in due if s.number in self._active])

    def _pass_over(self, author: int) -> None:
        """Let the base write where this assistant cannot read the text."""
        for sequence in list(self._active.values()):
            if sequence.waits_for == author and not sequence.can_ask(author):
                sequence.answer(0, None)
                self._settle(sequence)

    def _worth_calling(self, author: int, due: ListOf[Sequence]) -> bool:
        """Whether some sequence has waited long enough for company, or nothing else can be done."""
        if not due:
            return False
        base = self._readers[BASE]
        stalled = all(s.waits_for is not None and base.has_read(s, s.length) for s in self._active.values())
        longest = max(sequence.waited for sequence in due)
        return stalled or any(s.is_writing for s in due) or longest >= self._wait_steps(author)

    def _write_ahead(self, author: int, sequences: ListOf[Sequence]) -> None:
        """In a run of deferrals let the assistant write the next tokens too, for the base to check in one pass."""
        lengths = {s: self._ahead_length(author, s) for s in sequences}
        while wanted := {s: ReadSpan(s.length) for s, length in lengths.items() if len(s.draft) < length}:
            heard = self._read(self._readers[author], wanted)
            if heard is None:
                return
            said = self._fetch(heard, self._readers[author])
            lengths = {s: length for s, length in lengths.items() if s in said.rows}
            for sequence, (row,) in said.rows.items():
                position, drawn = len(sequence.steps) + len(sequence.draft), said.draws[row]
                if drawn.broken:
                    self._fail_with_nan(sequence, author)
                if row not in said.abstained:
                    sequence.ahead[position] = author, drawn
                if drawn.broken or row in said.abstained or sequence.ends(drawn.token_id):
                    del lengths[sequence]
                else:
                    sequence.draft.append(drawn.token_id)

    # Policies that asked everyone decide

    def _combine(self, consultations: Mapping[Sequence, AuthorOutputs]) -> None:
        by_policy: dict[int, list[Sequence]] = {}
        for sequence in consultations:
            if sequence.number in self._active:
                by_policy.setdefault(id(sequence.request.policy), []).append(sequence)
        for sequences in by_policy.values():
            policy = sequences[0].request.policy
            of_each = [consultations[sequence] for sequence in sequences]
            with self._alone(*sequences):
                if isinstance(policy, CombiningPolicy):
                    written = combined(policy, sequences, of_each)
                else:
                    written = chosen(sequences, of_each)
                for sequence, said, (author, drawn) in zip(sequences, of_each, written, strict=True):
                    if drawn.broken:
                        raise PolicyFailure(f"{policy} made NaN of its authors' logits")
                    abstained = author in said.abstained
                    sequence.decisions.append(Decision(author, said.defer_prob, None, drawn, abstained))
                    self._settle(sequence)

    # Sequences come and go

    def _read(self, reader: Reader, wanted: Mapping[Sequence, ReadSpan], run: int = 0) -> AuthorOutput | None:
        """The answers after what each sequence's request does to their logits."""
        heard = reader.read(wanted, run) if wanted else None
        while reader.failures:
            self._fail(*reader.failures.popitem())
        if heard is None:
            return None
        edits, processed = Edits(heard.logits.shape[-1], heard.logits.device), False
        for sequence, rows in list(heard.rows.items()):
            if sequence.edits_logits:
                with self._alone(sequence):
                    sequence.process(edits, reader.author, rows, wanted[sequence].end)
                    processed = True
        return replace(heard, logits=edits.apply(heard.raw)) if processed else heard

    def _fetch(self, heard: AuthorOutput, reader: Reader, *others: Tensor) -> Said:
        """What the host is to know of the answers, in one wait for the device.

        An assistant that may abstain does so where a request's constraints change what it says. A sequence that no
        token may follow fails.

        Args:
            *others: further numbers for each row, shape (R, n) each.
        """
        edited = heard.logits is not heard.raw
        if edited:
            best, argmax = heard.logits.max(-1)
            others = torch.stack([best, argmax != heard.raw.argmax(-1)], dim=-1), *others
        draws, numbers = draw_tokens(heard.logits, heard.samplings, *others, raw=heard.raw)
        reader.clock()
        rows = {sequence: rows for sequence, rows in heard.rows.items() if sequence.number in self._active}
        if not edited:
            return Said(rows, draws, numbers, heard.abstained)
        abstained = heard.abstained
        if reader.runner.may_abstain:
            abstained |= {row for row, (_, changed, *_) in enumerate(numbers) if changed}
        else:
            for sequence in [one for one in rows if any(numbers[row][0] == -math.inf for row in rows[one])]:
                if sequence.edits_logits:
                    self._fail(
                        sequence, RequestError("the request's constraints let no token follow; loosen one of them")
                    )
                    del rows[sequence]
        return Said(rows, draws, [row[2:] for row in numbers], abstained)

    def _settle(self, sequence: Sequence) -> None:
        """Send out what has become certain."""
        steps = sequence.settle()
        for step in steps:
            self.authors[step.author].usage.tokens_written += 1
            last = sequence.finish_reason is not None and step is steps[-1]
            self._outputs.append(RequestOutput(sequence.number, step, sequence.completion() if last else None))
        if sequence.finish_reason is not None:
            self._acceptance = sequence.acceptance
            self._active.pop(sequence.number).leave()

    @contextmanager
    def _alone(self, *sequences: Sequence) -> Iterator[None]:
        """What goes wrong inside the block ends these sequences and no others."""
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
        for sequence in sequences:
            if sequence.number in self._active:
                self._fail(sequence, failure)

    def _fail_with_nan(self, sequence: Sequence, author: int) -> None:
        self._fail(
            sequence,
            ModelFailure(
                f"{self.authors[author].name} returned NaN logits after {len(sequence.token_ids)} tokens; "
                "check its weights and dtype"
            ),
            spoiled=author,
        )

    def _fail(self, sequence: Sequence, failure: CollmError, spoiled: int | None = None) -> None:
        self._active.pop(sequence.number).leave(spoiled)
        self._outputs.append(RequestOutput(sequence.number, failure=failure))

    # What pays

    def _wait_steps(self, author: int) -> int:
        active = len(self._active)
        if active == 1 or not self.max_wait:
            return 0
        if self._steps >= self._replan:
            self._replan = self._steps + _PLAN_LASTS
            self._waits.clear()
        if author not in self._waits:
            start, run = (
                sum(getattr(s.acceptance, of) for s in self._active.values()) / active for of in ("start", "run")
            )
            times = self._readers[BASE].times, self._readers[author].times
            self._waits[author] = wait_steps(start, run, *times, active, self.max_wait)
        return self._waits[author]

    def _run_length(self, reading: ListOf[Sequence]) -> int:
        """Tokens that the base reads on with before the host looks."""
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

    def _ahead_length(self, author: int, sequence: Sequence) -> int:
        """Writing ahead is for a sequence alone: among others each token ahead would be a pass for few rows."""
        if len(self._active) > 1 or not self.lookahead:
            return 0
        if sequence.decisions or sequence.draft or sequence.steps[-1].author != author:
            return 0
        times = self._readers[BASE].times, self._readers[author].times
        return ahead_length(sequence.acceptance, *times, min(self.lookahead, sequence.draft_limit))


def _asked_of(author: int, sequence: Sequence) -> list[int]:
    """The decisions that wait for this assistant."""
    return [i for i, decision in enumerate(sequence.decisions) if decision.author == author and decision.choice is None]
