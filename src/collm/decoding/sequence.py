"""A request while it is decoded: its final tokens, its draft, and the author chosen for each position."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as ListOf
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from collm.core.policies import StepView
from collm.core.sampling import seeded
from collm.core.types import BASE, Completion, FinishReason, TokenStep
from collm.decoding.draws import Draw, Sampling
from collm.decoding.logits_processors import Edits, LogitsProcessors
from collm.decoding.lookup import PromptLookup
from collm.decoding.request import Request
from collm.decoding.speculation import AcceptanceRates
from collm.decoding.text import TextStream
from collm.errors import ConfigError
from collm.models.grammars import Grammar
from collm.models.runner import Assistant


@dataclass
class Decision:
    """The author chosen for one position, and the token it writes.

    Attributes:
        author: the policy's choice.
        defer_prob: 1 - P(Z = 0) at this position.
        guess: the token that the base would write; None if it is not needed.
        choice: the token that the author writes; None until the author has run.
        abstained: whether the author abstained, so that the base's guess is used.
        stood_in: whether the author's server was unavailable, so that the base writes.
        rest: tokens that follow `choice` in the same segment.
    """

    author: int
    defer_prob: float
    guess: Draw | None
    choice: Draw | None
    abstained: bool = False
    stood_in: bool = False
    rest: list[Draw] = field(default_factory=list)


class Sequence:
    """A request in progress.

    `token_ids` are final. `draft` holds tentative tokens after them, which are dropped once the author of a position
    is known to write another token. `decisions[i]` belongs to the token after `token_ids + draft[:i]`, as far as the
    base has read.

    Attributes:
        token_ids: prompt and completion.
        draft: tentative tokens.
        decisions: at most one more than there are draft tokens.
        assistant_draft: completion position -> assistant and its token, valid if the draft up to there is accepted.
        cuts: author -> number of leading tokens that it need not read again; its `Reader` rolls back to them.
        steps: the tokens generated so far.
        deferred: number of these for which an assistant was asked.
        last_author: the policy's choice for the last of these.
        waited: steps since the sequence began to wait for an assistant.
        consulted: assistants that the policy consults before it decides; if there are any, nothing is drafted.
        processors: the request's logits processors, or None.
        acceptance: acceptance rates of this sequence's drafts.
        finish_reason: set with the last token.
    """

    def __init__(
        self,
        number: int,
        request: Request,
        authors: ListOf[Assistant],
        tokenizer: PreTrainedTokenizerBase,
        eos_ids: frozenset[int],
        acceptance: AcceptanceRates,
        grammar: Grammar | None = None,
    ) -> None:
        self.number = number
        self.request = request
        self.token_ids = list(request.prompt_ids)
        self.draft: list[int] = []
        self.decisions: list[Decision] = []
        self.assistant_draft: dict[int, tuple[int, Draw]] = {}
        self.cuts: dict[int, int] = {}
        self.steps: list[TokenStep] = []
        self.deferred = 0
        self.last_author = BASE
        self.waited = 0
        self.acceptance = acceptance
        self.lookup = PromptLookup(self.token_ids)
        self.consulted = request.policy.consults(len(authors) - 1)
        self.finish_reason: FinishReason | None = None
        self._authors = authors
        params = request.params
        self._eos_ids = frozenset() if params.ignore_eos else eos_ids
        self._stop_ids = frozenset(params.stop_token_ids)
        self.processors: LogitsProcessors | None = None
        if params.changes_logits:
            ends = eos_ids | self._stop_ids  # min_tokens forbids EOS even if EOS is ignored
            self.processors = LogitsProcessors(params, request.prompt_ids, tokenizer, ends, grammar)
        limits = [limit for one in authors for limit in (one.max_length, one.capacity) if limit is not None]
        self._max_length = min(limits, default=None)
        self._stream = TextStream(
            tokenizer, request.prompt_ids, params.stop, keep_stop=params.include_stop_str_in_output
        )
        self._rng = seeded(params.seed)
        self._uniforms: list[tuple[float, float]] = []

    @property
    def text(self) -> list[int]:
        """The final tokens and the draft."""
        return self.token_ids + self.draft

    @property
    def generated(self) -> list[int]:
        """The final tokens after the prompt."""
        return self.token_ids[len(self.request.prompt_ids) :]

    @property
    def length(self) -> int:
        """Length of `text`."""
        return len(self.token_ids) + len(self.draft)

    @property
    def waits_for(self) -> int | None:
        """The assistant that must run before the next token is final."""
        return self.decisions[0].author if self.decisions and self.decisions[0].choice is None else None

    @property
    def draft_limit(self) -> int:
        """Longest draft that leaves room for one more token."""
        limit = self.request.params.max_new_tokens - len(self.steps) - 1
        return limit if self._max_length is None else min(limit, self._max_length - len(self.token_ids) - 1)

    @property
    def most_tokens(self) -> int:
        """Largest length that `text` can reach."""
        most = len(self.request.prompt_ids) + self.request.params.max_new_tokens
        return most if self._max_length is None else min(most, self._max_length)

    @property
    def cache_length(self) -> int:
        """Cache positions that `text` occupies."""
        return self.length

    def text_of(self, author: int) -> list[int]:
        """The tokens that an author reads."""
        return self.text

    def length_of(self, author: int, decision: int) -> int:
        """Number of these tokens that precede the given decision."""
        return len(self.token_ids) + decision

    @property
    def in_segment(self) -> bool:
        """Whether an assistant has written only part of a segment."""
        return False

    def can_ask(self, author: int) -> bool:
        """Whether an assistant can continue the text."""
        return True

    @property
    def edits_logits(self) -> bool:
        """Whether the request modifies logits."""
        return self.processors is not None

    def process(self, edits: Edits, author: int, rows: range, end: int) -> None:
        """Add the request's edits of an author's logits. The last row follows the first `end` tokens of the text."""
        if self.processors is None:
            return
        text, start = self.text, len(self.request.prompt_ids)
        for row, length in zip(rows, range(end - len(rows) + 1, end + 1), strict=True):
            self.processors.add_edits(edits, row, text[start:length])

    @property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end the text."""
        return self._eos_ids | self._stop_ids

    def ends(self, token_id: int) -> bool:
        """Whether this token ends the text."""
        return token_id in self._eos_ids or token_id in self._stop_ids

    def uniform(self, position: int, of: int) -> float:
        """The random number from [0, 1) of a completion position: for its author (`of` = 0) or its token (1)."""
        while len(self._uniforms) <= position:
            self._uniforms.append((self._rng.random(), self._rng.random()))
        return self._uniforms[position][of]

    def sampling(self, position: int) -> Sampling:
        """Sampling settings for the token at a completion position."""
        params = self.request.params
        return Sampling(params, self.uniform(position, 1)) if params.temperature else Sampling(params)

    def sampling_of(self, author: int, position: int) -> Sampling:
        """Sampling settings for an author's token at a completion position."""
        return self.sampling(position)

    def next_author(self, guess: Draw, defer_prob: float, author_probs: ListOf[float]) -> int | None:
        """The author after the last decision; None if the base must first read the text in other tokens.

        Args:
            guess: the token that the base would write.
        """
        return self.choose_author(defer_prob, author_probs)

    def resolve(self, i: int, draw: Draw | None) -> None:
        """Set the token that an assistant writes at decision i; `draw` is None if it abstains."""
        decision = self.decisions[i]
        decision.abstained = draw is None
        decision.choice = draw or decision.guess
        self.waited = 0
        if decision.guess is not None and decision.choice is not None:
            self.acceptance.observe_agreement(decision.guess.token_id == decision.choice.token_id)

    def choose_author(
        self, defer_prob: float, author_probs: ListOf[float], top: Mapping[int, tuple[int, float]] | None = None
    ) -> int:
        """Ask the policy for the author after the last decision.

        Args:
            top: author -> its most probable token and the probability, for the base and the consulted assistants.

        Raises:
            ConfigError: the policy chose an author that does not exist.
            Exception: the policy raised it.
        """
        position = len(self.steps) + len(self.decisions)
        view = StepView(
            position=position,
            deferred=self.deferred + sum(decision.author != BASE for decision in self.decisions),
            author_probs=author_probs,
            defer_prob=defer_prob,
            temperature=self.request.params.temperature,
            uniform=self.uniform(position, 0),
            top_tokens={author: token for author, (token, _) in (top or {}).items()},
            top_probs={author: prob for author, (_, prob) in (top or {}).items()},
        )
        author = self.request.policy.author(view)
        if not 0 <= author < len(self._authors):
            raise ConfigError(f"{self.request.policy} chose author {author}, expected 0 to {len(self._authors) - 1}")
        return author

    def settle(self) -> list[TokenStep]:
        """Reject draft tokens that their author does not write, and return the tokens that are now final."""
        self._check_draft()
        steps = []
        while self.decisions and (drawn := self.decisions[0].choice) and self.finish_reason is None:
            decision = self.decisions.pop(0)
            self.assistant_draft.pop(len(self.steps), None)
            for each in (drawn, *decision.rest):
                if self.finish_reason is None:
                    steps.append(self._append(decision, each))
            del self.draft[:1]
        return steps

    def _check_draft(self) -> None:
        for i, decision in enumerate(self.decisions):
            author, drawn = self.assistant_draft.get(len(self.steps) + i, (BASE, None))
            if decision.choice is None and decision.author == author:
                decision.choice = drawn
            if decision.choice and i < len(self.draft) and self.draft[i] != decision.choice.token_id:
                del self.draft[i:], self.decisions[i + 1 :]
                self.assistant_draft.clear()
                for author in range(len(self._authors)):
                    self._cut(author, self.length)
                return

    def _cut(self, author: int, length: int) -> None:
        self.cuts[author] = min(self.cuts.get(author, length), length)

    def _append(self, decision: Decision, drawn: Draw) -> TokenStep:
        self.acceptance.observe_token(self.last_author, decision.author, self.lookup.next_token(), drawn.token_id)
        self.last_author = decision.author
        self.token_ids.append(drawn.token_id)
        self.deferred += decision.author != BASE
        text = self._push(drawn.token_id)
        self.finish_reason = self._finished(drawn.token_id)
        if self.finish_reason is not None:
            text += self._stream.finish()
        writer = BASE if decision.abstained else decision.author
        numbers = (decision.defer_prob, drawn.logprob, drawn.top)
        step = TokenStep(drawn.token_id, text, writer, *numbers, stood_in=decision.stood_in)
        self.steps.append(step)
        return step

    def _push(self, token_id: int) -> str:
        """Detokenise the last token and return the text that is final."""
        params = self.request.params
        if self.ends(token_id) and not (params.include_stop_str_in_output and token_id in self._stop_ids):
            return ""
        return self._stream.push(token_id, may_stop=len(self.steps) >= params.min_tokens)

    def _finished(self, token_id: int) -> FinishReason | None:
        if token_id in self._eos_ids:
            return "eos"
        if token_id in self._stop_ids or self._stream.stopped:
            return "stop"
        if self.processors is not None and self.processors.is_complete(self.generated):
            return "stop"
        full = self._max_length is not None and len(self.token_ids) >= self._max_length
        if full or len(self.steps) + 1 >= self.request.params.max_new_tokens:
            return "length"
        return None

    def preempt(self) -> None:
        """Drop everything that is not final. It is computed again later."""
        self.draft.clear()
        self.decisions.clear()
        self.assistant_draft.clear()
        self.waited = 0

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
        )
