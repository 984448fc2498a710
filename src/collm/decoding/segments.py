"""Sequences whose authors have different tokenizers. Decisions are made per segment instead of per token."""

from __future__ import annotations

import random
from collections.abc import Sequence as ListOf
from dataclasses import replace
from typing import Any

from collm.core.types import BASE, TokenStep
from collm.decoding.draws import Draw, Sampling
from collm.decoding.logits_processors import Edits, LogitsProcessors
from collm.decoding.lookup import PromptLookup
from collm.decoding.request import check_names_author, check_segment_params
from collm.decoding.sequence import Decision, Sequence
from collm.models.alignment import ANYTHING, NO_BOUNDARY, ONLY_ENDS, Alignment
from collm.models.runner import common_prefix
from collm.models.text_tokenizer import GrowingIds

MAX_SEGMENT_TOKENS = 64
"""Longest segment of an assistant. If it reaches no boundary by then, the base continues from there."""


class SegmentSequence(Sequence):
    """A request in progress whose authors have different tokenizers.

    Authors share the answer as bytes. The output consists of the base's tokens, and each assistant reads the answer in
    its own tokens. Every author reads the canonical tokens, those its tokenizer splits the answer into, so that the
    continuation depends on the text alone. If an author wrote a segment in other tokens, it reads the segment again.

    A decision is made where the base's next token begins a segment (`models.alignment`). The chosen author writes until
    its own next token begins a segment. That token is kept in case the same author is chosen again.

    Args:
        alignment: alignment of all authors.
        end_id: the base's token that replaces an assistant's EOS.

    Other arguments and attributes are those of `Sequence`.

    Raises:
        ConfigError: the policy or the parameters need a shared vocabulary.
    """

    def __init__(self, *args: Any, alignment: Alignment, end_id: int, **options: Any) -> None:
        super().__init__(*args, **options)
        check_names_author(self.request.policy, len(self._authors) - 1)
        check_segment_params(self.request.params)
        self._alignment = alignment
        self._end_id = end_id
        self._prompts = [self.request.prompt_ids, *self.request.assistant_prompts]
        texts = [GrowingIds(*each) for each in zip(alignment.tokenizers, self._prompts, strict=True)]
        self._texts: list[GrowingIds] = texts
        limits = [
            limit for limit in (self._authors[BASE].max_length, self._authors[BASE].capacity) if limit is not None
        ]
        self._max_length = min(limits, default=None)
        self._answer = b""  # up to the last boundary
        self._boundaries: list[int] = []
        self._row = ANYTHING  # row of the opening table at a boundary, else NO_BOUNDARY
        self._segment: list[Draw] = []  # an assistant's tokens of the current segment
        self._next_opening: tuple[int, Draw] | None = None  # an author and its first token of the next segment
        self._seed = self._rng.getrandbits(64)
        self._assistant_processors = [
            LogitsProcessors(self.request.params, prompt, one.tokenizer, one.eos_ids, None)
            for one, prompt in zip(alignment.tokenizers[1:], self._prompts[1:], strict=True)
            if self.processors is not None
        ]

    # Text that authors read

    @property
    def draft_limit(self) -> int:
        """Segments are not drafted."""
        return 0

    @property
    def cache_length(self) -> int:
        """Length of the longest text that an author may hold, plus a segment."""
        return max(map(self._length, range(len(self._authors)))) + MAX_SEGMENT_TOKENS

    @property
    def most_tokens(self) -> int:
        return super().most_tokens + self.cache_length - self.length

    def text_of(self, author: int) -> list[int]:
        if author == BASE:
            return self.text
        return [*self._prompts[author], *self._texts[author].ids, *(draw.token_id for draw in self._segment)]

    def length_of(self, author: int, decision: int) -> int:
        return self._length(author)

    def _length(self, author: int) -> int:
        if author == BASE:
            return self.length
        return len(self._prompts[author]) + len(self._texts[author].ids) + len(self._segment)

    @property
    def in_segment(self) -> bool:
        return bool(self._segment)

    # Logits

    @property
    def edits_logits(self) -> bool:
        return True

    def process(self, edits: Edits, author: int, rows: range, end: int) -> None:
        row = self._row if self._is_opening(author) else ANYTHING
        edits.keep(rows[-1], self._alignment.opening_mask(author, row, edits.device))
        if self.request.params.ignore_eos:
            edits.ban(rows[-1], iter(self._alignment.tokenizers[author].eos_ids))
        if author == BASE:
            super().process(edits, author, rows, end)
        elif self._assistant_processors:
            generated = self.text_of(author)[len(self._prompts[author]) :]
            self._assistant_processors[author - 1].add_edits(edits, rows[-1], generated, length=len(self.steps))

    def sampling_of(self, author: int, position: int) -> Sampling:
        params = self.request.params
        if not params.temperature:
            return Sampling(params)
        opening = self._is_opening(author)
        at = len(self._answer) + len(self._segment_bytes(author) or b"")
        return Sampling(params, random.Random(f"{self._seed} {at} {opening}").random())

    def _is_opening(self, author: int) -> bool:
        """Whether the author's next token must begin a segment."""
        return self._row != NO_BOUNDARY and not (author != BASE and self._segment)

    def _segment_bytes(self, author: int) -> bytes | None:
        """Bytes that an author has written since the last boundary; None if a token has no text."""
        if author == BASE:
            own = self.token_ids[len(self._prompts[BASE]) + len(self._texts[BASE].ids) :]
        else:
            own = [draw.token_id for draw in self._segment]
        return self._texts[author].spell(own)

    # Boundaries: decisions are made where the base's next token begins a segment

    def next_author(self, guess: Draw, defer_prob: float, author_probs: ListOf[float]) -> int | None:
        if self._row == NO_BOUNDARY:
            if not self._reaches_boundary(guess.token_id):
                return BASE
            if not self._canonicalise_base():
                return None
        author = self.choose_author(defer_prob, author_probs)
        if author != BASE:
            self._catch_up(author)
        return author

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

    def _canonicalise_base(self) -> bool:
        """Make the base's tokens canonical. Return False if they changed and the base must read them again."""
        canonical = [*self._prompts[BASE], *self._texts[BASE].ids]
        if canonical == self.token_ids:
            return True
        kept = min(common_prefix(canonical, self.token_ids), len(canonical) - 1)
        self.token_ids[:] = canonical
        self.lookup = PromptLookup(self.token_ids)
        self._cut(BASE, kept)
        return False

    def _catch_up(self, author: int) -> None:
        """Retokenise the text for an assistant up to the last boundary."""
        text = self._texts[author]
        before = text.ids
        if not text.grow(self._answer, self._boundaries):
            return
        self._cut(author, len(self._prompts[author]) + common_prefix(before, text.ids))

    def _has_room(self, author: int) -> bool:
        most = self._authors[author].max_length
        capacity = self._authors[author].capacity
        return all(limit is None or self._length(author) < limit for limit in (most, capacity))

    def can_ask(self, author: int) -> bool:
        return self._texts[author].spells(self._answer) and self._has_room(author)

    # Segments of assistants, which end where the assistant's next token begins a segment

    def settle(self) -> list[TokenStep]:
        if self._next_opening is not None and self.waits_for == self._next_opening[0] and not self._segment:
            self._add_to_segment(self.decisions[0], self._next_opening[1])
        return super().settle()

    def resolve(self, i: int, draw: Draw | None) -> None:
        decision, author = self.decisions[i], self.decisions[i].author
        self.waited = 0
        row = self._alignment.row(self._answer + (self._segment_bytes(author) or b""))
        if draw is None:  # a tool ends its segment by abstaining
            self._end_segment(decision, None, at_boundary=row != ONLY_ENDS)
        elif self._segment and self._alignment.is_opening(author, row, draw.token_id):
            self._end_segment(decision, draw)
        else:
            self._add_to_segment(decision, draw)

    def _add_to_segment(self, decision: Decision, draw: Draw) -> None:
        self._segment.append(draw)
        if draw.token_id in self._alignment.tokenizers[decision.author].eos_ids:
            self._segment.clear()
            decision.choice = Draw(self._end_id, draw.logprob)
        elif len(self._segment) >= MAX_SEGMENT_TOKENS or not self._has_room(decision.author):
            self._end_segment(decision, None, at_boundary=False)

    def _end_segment(self, decision: Decision, following: Draw | None, *, at_boundary: bool = True) -> None:
        """Convert a segment to the base's tokens. If it does not end at a boundary, the base continues it.

        If the segment is empty or not in whole characters, the base writes its own token instead.

        Args:
            following: the author's first token of the next segment, if known.
        """
        author, text = decision.author, self._segment_bytes(decision.author)
        logprob = sum(draw.logprob for draw in self._segment)
        written = [draw.token_id for draw in self._segment]
        self._segment, self._next_opening = [], None
        answer = self._answer + (text or b"")
        encoded = self._texts[BASE].grown(answer, self._boundaries) if text else None
        before = len(self._texts[BASE].ids)
        if encoded is None or encoded.ids[:before] != self._texts[BASE].ids:
            decision.choice, decision.abstained = decision.guess, True
        else:
            first, *rest = encoded.ids[before:]
            decision.choice, decision.rest = Draw(first, logprob), [Draw(token_id, 0.0) for token_id in rest]
        known = self._texts[author].ids
        if decision.abstained or not at_boundary:
            self._row = self._row if decision.abstained else NO_BOUNDARY
            self._cut(author, len(self._prompts[author]) + len(known))
            return
        self._texts[BASE].grow(answer, self._boundaries)
        self._texts[author].grow(answer, self._boundaries)
        self._set_boundary(answer)
        canonical = self._texts[author].ids
        if following is not None and canonical == [*known, *written]:
            self._next_opening = author, following
        self._cut(author, len(self._prompts[author]) + common_prefix(canonical, [*known, *written]))

    def _append(self, decision: Decision, drawn: Draw) -> TokenStep:
        if decision.author == BASE or decision.abstained:
            self._row = NO_BOUNDARY
        if self.request.params.logprobs and not drawn.top:
            drawn = replace(drawn, top=((drawn.token_id, drawn.logprob),))
        return super()._append(decision, drawn)

    def preempt(self) -> None:
        super().preempt()
        self._segment = []
