"""Decisions about segments instead of tokens, for sequences whose authors have different tokenizers."""

from __future__ import annotations

import random
from collections.abc import Sequence as ListOf

import torch

from collm.core.params import SamplingParams
from collm.core.types import BASE
from collm.engine.decision import Decision, Draw
from collm.engine.logits_processors import Edits, LogitsProcessors
from collm.engine.lookup import PromptLookup
from collm.engine.request import check_names_author, check_segment_params
from collm.engine.sequence import Sequence, shortest_limit
from collm.text.alignment import ANYTHING, NO_BOUNDARY, ONLY_ENDS, Alignment, Masks
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
    its own next token begins a segment. If the same author is chosen again, it needs no pass for the first token, which
    was drawn from the same logits, among the tokens that begin a segment.

    The log-probabilities of the output add up to those of its segments (`core.segments`). That of an assistant's
    segment is with its first token. That a segment of the base ends is known one token later, and is counted there.

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
        self.alignment = alignment
        self._end_id = end_id
        self._prompts = [request.prompt_ids, *request.assistant_prompts]
        self._texts = [GrowingIds(*each) for each in zip(alignment.tokenizers, self._prompts, strict=True)]
        self._answer = b""  # up to the last boundary
        self._boundaries: list[int] = []
        self._row = ANYTHING  # row of the opening table at a boundary, else NO_BOUNDARY
        self.current: list[Draw] = []
        self._next_opening: tuple[int, Draw] | None = None  # an author and its first token of the next segment
        self._log_end = 0.0  # log-probability that the base's last segment has ended, until a token is written
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

    @property
    def longest(self) -> int:
        """Length of the longest text that an author may hold, plus a segment."""
        of_assistants = [len(self.text_of(author)) for author in range(1, len(self._prompts))]
        return max(len(self.sequence.token_ids), *of_assistants) + MAX_SEGMENT_TOKENS

    # Logits

    def add_edits(self, edits: Edits, author: int, row: int) -> None:
        """Add the request's edits of an assistant's logits."""
        if self._params.ignore_eos:
            edits.ban(row, iter(self.alignment.tokenizers[author].eos_ids))
        if author != BASE and self._assistant_processors:
            generated = self.text_of(author)[len(self._prompts[author]) :]
            self._assistant_processors[author - 1].add_edits(edits, row, generated, length=len(self.sequence.steps))

    def masks(self, author: int, device: torch.device) -> Masks:
        """The tokens that the author may write next."""
        is_opening = self._is_opening(author)
        row = self._row if is_opening else self.alignment.row(self._answer + (self._segment_bytes(author) or b""))
        rows = (self._row if is_opening else ANYTHING, row, ONLY_ENDS)
        return Masks(*(self.alignment.opening_mask(author, each, device) for each in rows))

    def uniform(self, author: int, *, opening: bool = False) -> float:
        """The random number from [0, 1) for an author's next token, or for the one that it opens a segment with."""
        at = len(self._answer) + len(self._segment_bytes(author) or b"")
        return random.Random(f"{self._seed} {at} {opening or self._is_opening(author)}").random()

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
            self._log_end = guess.log_start
            canonical = [*self._prompts[BASE], *self._texts[BASE].ids]
            if canonical != sequence.token_ids:
                sequence.cut(BASE, min(common_prefix(canonical, sequence.token_ids), len(canonical) - 1))
                sequence.token_ids[:] = canonical
                sequence.lookup = PromptLookup(sequence.token_ids)
                return
        if self._row != NO_BOUNDARY:
            author, guess = (
                sequence.choose_author(len(sequence.decisions), defer_prob, author_probs),
                guess.opening or guess,
            )
        decision = Decision(author, defer_prob, guess, None, (author,))
        sequence.decisions.append(decision)
        if author == BASE:
            self._row = NO_BOUNDARY
            self._write(decision, guess)
            return
        text = self._texts[author]
        before = text.ids
        if text.grow(self._answer, self._boundaries):  # retokenised for the assistant up to the last boundary
            sequence.cut(author, len(self._prompts[author]) + common_prefix(before, text.ids))
        if self._next_opening is not None and self._next_opening[0] == author:
            self._add_to_segment(decision, self._next_opening[1])
        elif not (text.spells(self._answer) and _has_room(self, author)):
            self.resolve(decision, None)  # the assistant cannot continue the text

    def _reaches_boundary(self, next_id: int) -> bool:
        """Whether a segment ends before this token of the base. If so, set the boundary."""
        own = self._segment_bytes(BASE)
        if own is None:
            return False
        answer = self._answer + own
        row = self.alignment.row(answer)
        if not self.alignment.is_opening(BASE, row, next_id) or not self._texts[BASE].grow(answer, self._boundaries):
            return False
        self._set_boundary(answer)
        return True

    def _set_boundary(self, answer: bytes) -> None:
        self._answer, self._next_opening = answer, None
        self._boundaries.append(len(answer))
        self._row = self.alignment.row(answer)

    # Segments of assistants, which end where the assistant's next token begins a segment

    def resolve(self, decision: Decision, draw: Draw | None) -> None:
        """Continue or end the segment of the decision's author, given its next token; None if it abstains."""
        author = decision.author
        row = self.alignment.row(self._answer + (self._segment_bytes(author) or b""))
        if draw is None:  # a tool ends its segment by abstaining
            self._end_segment(decision, None, at_boundary=row != ONLY_ENDS)
        elif self.current and self.alignment.is_opening(author, row, draw.token_id):
            self._end_segment(decision, draw)
        else:
            self._add_to_segment(decision, draw)

    def _add_to_segment(self, decision: Decision, draw: Draw) -> None:
        self.current.append(draw)
        if draw.token_id in self.alignment.tokenizers[decision.author].eos_ids:
            logprob = sum(one.logprob for one in self.current)
            self.current.clear()
            self._write(decision, _as_draw(self._end_id, logprob, self._params))
        elif len(self.current) >= MAX_SEGMENT_TOKENS or not _has_room(self, decision.author):
            self._end_segment(decision, None, at_boundary=False)

    def _write(self, decision: Decision, draw: Draw) -> None:
        decision.choice, self._log_end = draw.after(self._log_end), 0.0

    def _end_segment(self, decision: Decision, following: Draw | None, *, at_boundary: bool = True) -> None:
        """Convert a segment to the base's tokens. If it does not end at a boundary, or exceeds what the policy allows,
        the base continues it.

        If the segment is empty or not in whole characters, the base writes its own token instead.

        Args:
            following: the author's next token, if it begins a segment.
        """
        author, text = decision.author, self._segment_bytes(decision.author)
        logprob = sum(draw.logprob for draw in self.current) + (0.0 if following is None else following.log_start)
        written = [draw.token_id for draw in self.current]
        self.current, self._next_opening = [], None
        answer = self._answer + (text or b"")
        encoded = self._texts[BASE].grown(answer, self._boundaries) if text else None
        before = len(self._texts[BASE].ids)
        if encoded is None or encoded.ids[:before] != self._texts[BASE].ids:
            assert decision.guess is not None
            decision.abstained = True
            self._write(decision, decision.guess)
        else:
            count = _most_allowed(self.sequence, len(encoded.ids) - before)
            at_boundary = at_boundary and before + count == len(encoded.ids)
            first, *rest = encoded.ids[before : before + count]
            self._write(decision, _as_draw(first, logprob, self._params))
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
            if following is not None and following.opening is not None and canonical == [*known, *written]:
                self._next_opening = author, following.opening
            kept = common_prefix(canonical, [*known, *written])
        self.sequence.cut(author, len(self._prompts[author]) + kept)


def _has_room(unit: SegmentUnit, author: int) -> bool:
    """Whether an assistant's context has room for another token."""
    limit = shortest_limit([unit.sequence.authors[author]])
    return limit is None or len(unit.text_of(author)) < limit


def _most_allowed(sequence: Sequence, count: int) -> int:
    """How many tokens of a segment the policy allows, at least the one that it has chosen."""
    policy, numbers = sequence.request.policy, range(count, 1, -1)
    return next((n for n in numbers if policy.allows(len(sequence.steps), sequence.deferred, n)), 1)


def _as_draw(token_id: int, logprob: float, params: SamplingParams) -> Draw:
    """A token of the base that stands for an assistant's segment."""
    return Draw(token_id, logprob, ((token_id, logprob),) if params.logprobs else ())
