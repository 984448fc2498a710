"""A request while it is decoded: its final tokens, its draft, and the author of each position."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as ListOf
from typing import Protocol

import torch
from transformers import PreTrainedTokenizerBase

from collm.core.judges import Judge
from collm.core.policies import StepView
from collm.core.sampling import seeded
from collm.core.types import BASE, Completion, FinishReason, TokenStep
from collm.engine.decision import Decision, Draw
from collm.engine.logits_processors import Edits, LogitsProcessors
from collm.engine.lookup import PromptLookup
from collm.engine.request import Request
from collm.engine.speculation import AcceptanceRates
from collm.errors import ConfigError
from collm.models.assistant import Assistant
from collm.text.alignment import Alignment, Masks
from collm.text.grammars import Grammar
from collm.text.token_text import TextStream


class Unit(Protocol):
    """What a decision is about, if not a token (`engine.segments`)."""

    alignment: Alignment
    current: list[Draw]

    @property
    def longest(self) -> int: ...

    def text_of(self, author: int) -> list[int]: ...

    def add_edits(self, edits: Edits, author: int, row: int) -> None: ...

    def masks(self, author: int, device: torch.device) -> Masks: ...

    def uniform(self, author: int, *, opening: bool = False) -> float: ...

    def decide(self, guess: Draw, defer_prob: float, author_probs: ListOf[float]) -> None: ...

    def resolve(self, decision: Decision, draw: Draw | None) -> None: ...


class Sequence:
    """A request in progress.

    `token_ids` are final. `draft` holds tentative tokens after them, which are dropped once the author of a position
    is known to write another token. `decisions[i]` belongs to the token after `token_ids + draft[:i]`, as far as the
    base has read.

    Args:
        acceptance: acceptance rates of drafts to start with; None if nothing is planned from them.

    Attributes:
        token_ids: prompt and completion.
        draft: tentative tokens.
        decisions: at most one more than there are draft tokens.
        num_computed: for each author, the number of leading tokens of its text that it has read and that still hold.
        segments: the unit of decisions if the authors have different tokenizers; None if it is a token.
        assistant_draft: completion position -> assistant and its token, valid if the draft up to there is accepted.
        steps: the tokens generated so far.
        deferred: number of these for which an assistant was asked.
        waited: steps since the sequence began to wait for an assistant.
        consulted: assistants that the policy consults before it decides.
        judge: what decides which tokens of the base stand, or None.
        tentative: whether the base's tokens wait for what assistants say of them.
        regret: nats that the judge's assistants lost by the tokens that stand.
        end_ids: the tokens that end the text.
        max_length: largest length of `token_ids` in the models' contexts and caches; None if unlimited.
        processors: the request's logits processors, or None.
        edits_logits: whether logits are edited before tokens are drawn from them.
        lookup: drafts by prompt lookup.
        finish_reason: set with the last token.
    """

    def __init__(
        self,
        number: int,
        request: Request,
        authors: ListOf[Assistant],
        tokenizer: PreTrainedTokenizerBase,
        eos_ids: frozenset[int],
        grammar: Grammar | None = None,
        acceptance: AcceptanceRates | None = None,
    ) -> None:
        params = request.params
        self.number = number
        self.request = request
        self.authors = authors
        self.token_ids = list(request.prompt_ids)
        self.draft: list[int] = []
        self.decisions: list[Decision] = []
        self.num_computed = [0] * len(authors)
        self.segments: Unit | None = None
        self.assistant_draft: dict[int, tuple[int, Draw]] = {}
        self.steps: list[TokenStep] = []
        self.deferred = 0
        self.waited = 0
        self.acceptance = acceptance
        self.lookup = PromptLookup(self.token_ids)
        self.consulted = request.policy.consults(len(authors) - 1)
        self.judge: Judge | None = request.policy.judge
        self.tentative = bool(self.consulted) or self.judge is not None
        self.regret = 0.0
        self.finish_reason: FinishReason | None = None
        self.max_length = shortest_limit(authors)
        self._eos_ids = frozenset() if params.ignore_eos else eos_ids
        self.end_ids = self._eos_ids.union(params.stop_token_ids)
        self.processors: LogitsProcessors | None = None
        if params.changes_logits:
            ends = eos_ids | self.end_ids  # min_tokens forbids EOS even if EOS is ignored
            self.processors = LogitsProcessors(params, request.prompt_ids, tokenizer, ends, grammar)
        self.edits_logits = self.processors is not None
        self._spelled = tokenizer.decode
        self._stream = TextStream(
            tokenizer, request.prompt_ids, params.stop, keep_stop=params.include_stop_str_in_output
        )
        self.rng = seeded(params.seed)
        self._uniforms: list[tuple[float, float]] = []

    @property
    def generated(self) -> list[int]:
        """The final tokens after the prompt."""
        return self.token_ids[len(self.request.prompt_ids) :]

    def text_of(self, author: int) -> list[int]:
        """The tokens that an author reads: the final ones and the draft."""
        if self.segments is not None and author != BASE:
            return self.segments.text_of(author)
        return self.token_ids + self.draft

    def has_read(self, author: int) -> bool:
        """Whether the author has read all final and draft tokens."""
        return self.num_computed[author] >= len(self.token_ids) + len(self.draft)

    def cut(self, author: int, length: int) -> None:
        """Let an author keep only the first `length` tokens that it has read."""
        self.num_computed[author] = min(self.num_computed[author], length)

    @property
    def draft_limit(self) -> int:
        """Longest draft that leaves room for one more token. Segments are not drafted."""
        if self.segments is not None:
            return 0
        limit = self.request.params.max_tokens - len(self.steps) - 1
        return limit if self.max_length is None else min(limit, self.max_length - len(self.token_ids) - 1)

    def add_edits(self, edits: Edits, author: int, rows: range, first: int) -> None:
        """Add the request's edits of an author's logits, whose rows belong to the decisions from `first` on."""
        if self.segments is not None:
            self.segments.add_edits(edits, author, rows[0])
        if self.processors is not None and (self.segments is None or author == BASE):
            generated = self.generated
            for i, row in enumerate(rows, first):
                self.processors.add_edits(edits, row, generated + self.draft[:i])

    def uniform(self, position: int, of: int) -> float:
        """The random number from [0, 1) of a completion position: for its author (`of` = 0) or its token (1)."""
        while len(self._uniforms) <= position:
            self._uniforms.append((self.rng.random(), self.rng.random()))
        return self._uniforms[position][of]

    def token_uniforms(self, author: int, decisions: range) -> list[float]:
        """The random numbers for an author's tokens at these decisions."""
        if self.segments is not None:
            return [self.segments.uniform(author)]
        return [self.uniform(len(self.steps) + i, 1) for i in decisions]

    def decide(self, rows: Iterable[tuple[Draw | None, ListOf[float]]]) -> None:
        """Choose authors for the positions that the base has just read.

        Args:
            rows: for each position, the token that the base would write; and the defer prob, followed by P(author).
        """
        for guess, (defer_prob, *author_probs) in rows:
            assert guess is not None
            if self.segments is not None:
                self.segments.decide(guess, defer_prob, author_probs)
                return
            if self.consulted:
                self.decisions.append(Decision(BASE, defer_prob, guess, None, self.consulted))
                continue
            author = self.choose_author(len(self.decisions), defer_prob, author_probs)
            needs: ListOf[int] = () if author == BASE else (author,)
            if author == BASE and self.judge is not None:
                assistants = range(1, len(author_probs))
                likely = max(assistants, key=lambda each: author_probs[each])
                needs = self.judge.needs(likely, len(assistants))
            self.decisions.append(Decision(author, defer_prob, guess, None if needs else guess, needs))

    def choose_author(
        self,
        place: int,
        defer_prob: float,
        author_probs: ListOf[float],
        top: Mapping[int, tuple[int, float]] | None = None,
    ) -> int:
        """Ask the policy for an author.

        Args:
            place: the number of decisions before this one.
            top: author -> its most probable token and the probability, for the base and the consulted assistants.

        Raises:
            ConfigError: the policy chose an author that does not exist.
            Exception: the policy raised it.
        """
        top = top or {}
        position, params = len(self.steps) + place, self.request.params
        view = StepView(
            position=position,
            deferred=self.deferred + sum([decision.author != BASE for decision in self.decisions[:place]]),
            author_probs=author_probs,
            defer_prob=defer_prob,
            temperature=params.temperature,
            uniform=self.uniform(position, 0) if params.temperature or self.request.policy.draws else 0.0,
            top_tokens={author: token for author, (token, _) in top.items()},
            top_probs={author: prob for author, (_, prob) in top.items()},
        )
        author = self.request.policy.author(view)
        if not 0 <= author < len(self.authors):
            raise ConfigError(f"{self.request.policy} chose author {author}, expected 0 to {len(self.authors) - 1}")
        return author

    def waits_for(self, author: int) -> bool:
        """Whether the first decision that waits for authors waits for this one."""
        for decision in self.decisions:
            if waited := [each for each in decision.needs if decision.waits_for(each)]:
                return author in waited
        return False

    def undecided(self, author: int) -> range:
        """The decisions from the first to the last one that waits for this assistant."""
        waiting = [i for i, decision in enumerate(self.decisions) if decision.waits_for(author)]
        return range(waiting[0], waiting[-1] + 1)

    def resolve(self, decision: Decision, draw: Draw | None) -> None:
        """Set the token that an assistant writes; `draw` is None if it abstains."""
        self.waited = 0
        if self.segments is not None:
            self.segments.resolve(decision, draw)
            return
        decision.abstained = draw is None
        decision.choice = draw or decision.guess
        self.observe(decision)

    def observe(self, decision: Decision) -> None:
        """Record whether the assistants wrote what the base would have written."""
        if self.acceptance is not None and decision.guess is not None and decision.choice is not None:
            agrees = decision.guess.token_id == decision.choice.token_id
            if decision.consultation is None:
                self.acceptance.observe_agreement(agrees)
            else:
                self.acceptance.observe_stand(agrees)

    def advance(self) -> list[TokenStep]:
        """Cut the draft where an author writes another token, and return the tokens that are now final."""
        for i, decision in enumerate(self.decisions):
            author, drawn = self.assistant_draft.get(len(self.steps) + i, (BASE, None))
            if decision.choice is None and decision.author == author:
                decision.choice = drawn
            if decision.choice and i < len(self.draft) and self.draft[i] != decision.choice.token_id:
                del self.draft[i:], self.decisions[i + 1 :]
                self.assistant_draft.clear()
                for author in range(len(self.authors)):
                    self.cut(author, len(self.token_ids) + i)
                break
        steps = []
        while self.decisions and (drawn := self.decisions[0].choice) and self.finish_reason is None:
            decision = self.decisions.pop(0)
            self.assistant_draft.pop(len(self.steps), None)
            for each in (drawn, *decision.rest):
                if self.finish_reason is None:
                    steps.append(self._append(decision, each))
            del self.draft[:1]
        return steps

    def _append(self, decision: Decision, drawn: Draw) -> TokenStep:
        token_id, params = drawn.token_id, self.request.params
        if self.acceptance is not None:
            self.acceptance.observe_token(decision.author, self.lookup.next_token(), token_id)
        self.token_ids.append(token_id)
        self.deferred += decision.author != BASE
        text = ""
        if token_id not in self.end_ids or (params.include_stop_str_in_output and token_id in params.stop_token_ids):
            text = self._stream.push(token_id, may_stop=len(self.steps) >= params.min_tokens)
        if token_id in self._eos_ids:
            self.finish_reason = "eos"
        elif (
            token_id in self.end_ids
            or self._stream.stopped
            or (self.processors is not None and self.processors.is_complete(self.generated))
        ):
            self.finish_reason = "stop"
        elif len(self.steps) + 1 >= params.max_tokens or (
            self.max_length is not None and len(self.token_ids) >= self.max_length
        ):
            self.finish_reason = "length"
        if self.finish_reason is not None:
            text += self._stream.finish()
        writer = BASE if decision.abstained else decision.author
        rejected = None if decision.rejected is None else (decision.rejected, self._spelled(decision.rejected))
        numbers = (decision.defer_prob, drawn.logprob, drawn.top)
        step = TokenStep(token_id, text, writer, *numbers, stood_in=decision.stood_in, rejected=rejected)
        self.steps.append(step)
        return step

    def preempt(self) -> None:
        """Drop everything that is not final. It is computed again later."""
        self.draft.clear()
        self.decisions.clear()
        self.assistant_draft.clear()
        self.waited = 0
        if self.segments is not None:
            self.segments.current.clear()

    def completion(self) -> Completion:
        """The completion of a finished sequence."""
        assert self.finish_reason is not None
        return Completion(
            token_ids=[step.token_id for step in self.steps],
            token_texts=[step.text for step in self.steps],
            authors=[step.author for step in self.steps],
            defer_probs=[step.defer_prob for step in self.steps],
            logprobs=[step.logprob for step in self.steps],
            finish_reason=self.finish_reason,
            prompt_token_ids=self.request.prompt_ids,
            top_logprobs=[step.top_logprobs for step in self.steps if step.top_logprobs],
            stood_in=[i for i, step in enumerate(self.steps) if step.stood_in],
            rejected={i: step.rejected[0] for i, step in enumerate(self.steps) if step.rejected is not None},
        )


def shortest_limit(authors: ListOf[Assistant]) -> int | None:
    """Largest length that the contexts and caches of all these authors allow; None if unlimited."""
    return min([n for one in authors for n in (one.max_length, one.capacity) if n is not None], default=None)
