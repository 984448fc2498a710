"""Decisions about segments instead of tokens, for sequences whose authors have different tokenizers."""

from __future__ import annotations

import random
from collections.abc import Sequence as ListOf

from collm.core.params import SamplingParams
from collm.core.types import BASE
from collm.engine.logits_processors import Edits, LogitsProcessors
from collm.engine.lookup import PromptLookup
from collm.engine.request import check_names_author, check_segment_params
from collm.engine.sequence import Decision, Draw, Sequence, shortest_limit
from collm.text.alignment import ANYTHING, NO_BOUNDARY, ONLY_ENDS, Alignment
from collm.text.text_tokenizer import GrowingIds
from collm.text.token_ids import common_prefix

MAX_SEGMENT_TOKENS = 64
"""Longest segment of an assistant. If it reaches no boundary by then, the base continues from there."""


class SegmentUnit:
    """The segments of one sequence.

    Authors share the answer as bytes. The output consists of the base's tokens, and each assistant reads the answer in
    its own tokens. Every author reads the canonical tokens, those its tokenizer splits the answer into, so that the
    continuation depends on the text alone. If an author wrote a segment in other tokens, it reads the segment again.

    A decision is made where the base's next token begins a segment (`text.alignment`). The chosen author writes until
    its own next token begins a segment. That token is kept in case the same author is chosen again.

    Args:
        sequence: the sequence, which has no tokens yet.
        alignment: alignment of all authors.
        end_id: the base's token that replaces an assistant's EOS.

    Attributes:
        sequence: the sequence.
        current: an assistant's tokens of the segment that it has begun.

    Raises:
        ConfigError: the policy or the parameters need a shared vocabulary.
    """

    def __init__(self, sequence: Sequence, alignment: Alignment, end_id: int) -> None:
        request = sequence.request
        check_names_author(request.policy, len(sequence.authors) - 1)
        check_segment_params(request.params)
        sequence.max_length, sequence.edits_logits = shortest_limit(sequence.authors[:1]), True
        self.sequence = sequence
        self._params = request.params
        self._alignment = alignment
        self._end_id = end_id
        self._prompts = [request.prompt_ids, *request.assistant_prompts]
        self._texts = [GrowingIds(*each) for each in zip(alignment.tokenizers, self._prompts, strict=True)]
        self._answer = b""  # up to the last boundary
        self._boundaries: list[int] = []
        self._row = ANYTHING  # row of the opening table at a boundary, else NO_BOUNDARY
        self.current: list[Draw] = []
        self._next_opening: tuple[int, Draw] | None = None  # an author and its first token of the next segment
        self._seed = sequence.rng.getrandbits(64)
        self._assistant_processors = [
            LogitsProcessors(self._params, prompt, one.tokenizer, one.eos_ids, None)
            for one, prompt in zip(alignment.tokenizers[1:], self._prompts[1:], strict=True)
            if self._params.changes_logits
        ]

    # Text that authors read

    def text_of(self, author: int) -> list[int]:
        """The tokens that an assistant reads."""
        return [*self._prompts[author], *self._texts[author].ids, *(draw.token_id for draw in self.current)]

    def _length(self, author: int) -> int:
        if author == BASE:
            return len(self.sequence.token_ids)
        return len(self._prompts[author]) + len(self._texts[author].ids) + len(self.current)

    @property
    def longest(self) -> int:
        """Length of the longest text that an author may hold, plus a segment."""
        return max(map(self._length, range(len(self._prompts)))) + MAX_SEGMENT_TOKENS

    # Logits

    def add_edits(self, edits: Edits, author: int, row: int) -> None:
        """Allow only tokens that may come next, and add the request's edits of an assistant's logits."""
        mask = self._alignment.opening_mask(author, self._row if self._is_opening(author) else ANYTHING, edits.device)
        edits.forbid(row, ~mask)
        if self._params.ignore_eos:
            edits.ban(row, iter(self._alignment.tokenizers[author].eos_ids))
        if author != BASE and self._assistant_processors:
            generated = self.text_of(author)[len(self._prompts[author]) :]
            self._assistant_processors[author - 1].add_edits(edits, row, generated, length=len(self.sequence.steps))

    def uniform(self, author: int) -> float:
        """The random number from [0, 1) for an author's next token."""
        at = len(self._answer) + len(self._segment_bytes(author) or b"")
        return random.Random(f"{self._seed} {at} {self._is_opening(author)}").random()

    def _is_opening(self, author: int) -> bool:
        """Whether the author's next token must begin a segment."""
        return self._row != NO_BOUNDARY and not (author != BASE and self.current)

    def _segment_bytes(self, author: int) -> bytes | None:
        """Bytes that an author has written since the last boundary; None if a token has no text."""
        if author == BASE:
            own = self.sequence.token_ids[len(self._prompts[BASE]) + len(self._texts[BASE].ids) :]
        else:
            own = [draw.token_id for draw in self.current]
        return self._texts[author].spell(own)

    # Boundaries: decisions are made where the base's next token begins a segment

    def decide(self, guess: Draw, defer_prob: float, author_probs: ListOf[float]) -> None:
        """Choose the author of the next token, unless the base must first read the text in other tokens."""
        sequence, author = self.sequence, BASE
        if self._row == NO_BOUNDARY and self._reaches_boundary(guess.token_id):
            canonical = [*self._prompts[BASE], *self._texts[BASE].ids]
            if canonical != sequence.token_ids:
                sequence.cut(BASE, min(common_prefix(canonical, sequence.token_ids), len(canonical) - 1))
                sequence.token_ids[:] = canonical
                sequence.lookup = PromptLookup(sequence.token_ids)
                return
        if self._row != NO_BOUNDARY:
            author = sequence.choose_author(defer_prob, author_probs)
        decision = Decision(author, defer_prob, guess, guess if author == BASE else None, (author,))
        sequence.decisions.append(decision)
        if author == BASE:
            self._row = NO_BOUNDARY
            return
        text = self._texts[author]
        before = text.ids
        if text.grow(self._answer, self._boundaries):  # retokenised for the assistant up to the last boundary
            sequence.cut(author, len(self._prompts[author]) + common_prefix(before, text.ids))
        if self._next_opening is not None and self._next_opening[0] == author:
            self._add_to_segment(decision, self._next_opening[1])
        elif not (text.spells(self._answer) and self._has_room(author)):
            self.resolve(decision, None)  # the assistant cannot continue the text

    def _reaches_boundary(self, next_id: int) -> bool:
        """Whether a segment ends before this token of the base. If so, set the boundary."""
        own = self._segment_bytes(BASE)
        if own is None:
            return False
        answer = self._answer + own
        row = self._alignment.row(answer)
        if not self._alignment.is_opening(BASE, row, next_id) or not self._texts[BASE].grow(answer, self._boundaries):
            return False
        self._set_boundary(answer)
        return True

    def _set_boundary(self, answer: bytes) -> None:
        self._answer, self._next_opening = answer, None
        self._boundaries.append(len(answer))
        self._row = self._alignment.row(answer)

    def _has_room(self, author: int) -> bool:
        limit = shortest_limit([self.sequence.authors[author]])
        return limit is None or self._length(author) < limit

    # Segments of assistants, which end where the assistant's next token begins a segment

    def resolve(self, decision: Decision, draw: Draw | None) -> None:
        """Continue or end the segment of the decision's author, given its next token; None if it abstains."""
        author = decision.author
        row = self._alignment.row(self._answer + (self._segment_bytes(author) or b""))
        if draw is None:  # a tool ends its segment by abstaining
            self._end_segment(decision, None, at_boundary=row != ONLY_ENDS)
        elif self.current and self._alignment.is_opening(author, row, draw.token_id):
            self._end_segment(decision, draw)
        else:
            self._add_to_segment(decision, draw)

    def _add_to_segment(self, decision: Decision, draw: Draw) -> None:
        self.current.append(draw)
        if draw.token_id in self._alignment.tokenizers[decision.author].eos_ids:
            self.current.clear()
            decision.choice = _as_draw(self._end_id, draw.logprob, self._params)
        elif len(self.current) >= MAX_SEGMENT_TOKENS or not self._has_room(decision.author):
            self._end_segment(decision, None, at_boundary=False)

    def _end_segment(self, decision: Decision, following: Draw | None, *, at_boundary: bool = True) -> None:
        """Convert a segment to the base's tokens. If it does not end at a boundary, the base continues it.

        If the segment is empty or not in whole characters, the base writes its own token instead.

        Args:
            following: the author's first token of the next segment, if known.
        """
        author, text = decision.author, self._segment_bytes(decision.author)
        logprob = sum(draw.logprob for draw in self.current)
        written = [draw.token_id for draw in self.current]
        self.current, self._next_opening = [], None
        answer = self._answer + (text or b"")
        encoded = self._texts[BASE].grown(answer, self._boundaries) if text else None
        before = len(self._texts[BASE].ids)
        if encoded is None or encoded.ids[:before] != self._texts[BASE].ids:
            decision.choice, decision.abstained = decision.guess, True
        else:
            first, *rest = encoded.ids[before:]
            decision.choice = _as_draw(first, logprob, self._params)
            decision.rest = [_as_draw(token_id, 0.0, self._params) for token_id in rest]
        known = self._texts[author].ids
        kept = len(known)
        if decision.abstained or not at_boundary:
            self._row = NO_BOUNDARY
        else:
            self._texts[BASE].grow(answer, self._boundaries)
            self._texts[author].grow(answer, self._boundaries)
            self._set_boundary(answer)
            canonical = self._texts[author].ids
            if following is not None and canonical == [*known, *written]:
                self._next_opening = author, following
            kept = common_prefix(canonical, [*known, *written])
        self.sequence.cut(author, len(self._prompts[author]) + kept)


def _as_draw(token_id: int, logprob: float, params: SamplingParams) -> Draw:
    """A token of the base that stands for an assistant's segment."""
    return Draw(token_id, logprob, ((token_id, logprob),) if params.logprobs else ())
