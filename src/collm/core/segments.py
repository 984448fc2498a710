"""The law of a segment: an author's probability of a text between two boundaries, from those of its tokens.

For a segment w of tokens t_1..t_n behind a text x, q(w | x) = P(t_1 | START) P(t_2) .. P(t_n) P(START | x w), where
START are the tokens that begin a segment (`models.alignment`). The segment that ends a text has no last term.

Shapes: N positions, D segments, V vocabulary. Positions are those of the tokens of whole answers, one answer behind the
other, and of a token behind an answer that was cut off.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SegmentLaw(NamedTuple):
    """Which tokens of one author begin a segment.

    Attributes:
        opens: by the row of the text before and the token's first byte, bool, shape (R, 256).
        first_byte: of each token, -1 for one that is no text, int64, shape (V,).
        ends: tokens that end the text, bool, shape (V,).
    """

    opens: Tensor
    first_byte: Tensor
    ends: Tensor

    @property
    def written(self) -> Tensor:
        """Tokens that may stand in an answer, bool, shape (V,)."""
        return (self.first_byte >= 0) | self.ends

    def openings(self, rows: Tensor) -> Tensor:
        """Tokens that begin a segment, or end the text, at each of these rows (n,): bool, shape (n, V)."""
        opening = self.opens[rows][:, self.first_byte.clamp(min=0)]
        return (opening & (self.first_byte >= 0)) | self.ends

    def to(self, device: torch.device) -> SegmentLaw:
        return SegmentLaw(*(tensor.to(device) for tensor in self))


class TokenTerms(NamedTuple):
    """What an author says at each position, shape (N,) each.

    Attributes:
        logprob: of the gold token, nats.
        log_start: log P(START), nats; 0 where no segment begins.
        correct: the gold token is the argmax; where a segment begins, among the tokens that begin one.
        stops: the argmax is a token that begins a segment; false where none begins.
    """

    logprob: Tensor
    log_start: Tensor
    correct: Tensor
    stops: Tensor


def token_terms(logits: Tensor, gold: Tensor, rows: Tensor, law: SegmentLaw) -> TokenTerms:
    """The terms at positions with these logits.

    Args:
        logits: fp32, shape (N, V).
        gold: the token that follows, shape (N,).
        rows: of the opening table where a segment begins, else -1, shape (N,).
        law: of the author.
    """
    logits = logits.masked_fill(~law.written, -torch.inf)
    norm = logits.logsumexp(-1)
    logprob = logits.gather(-1, gold.unsqueeze(-1)).squeeze(-1) - norm
    argmax = logits.argmax(-1)
    log_start, stops = torch.zeros_like(norm), torch.zeros_like(gold, dtype=torch.bool)
    at = (rows >= 0).nonzero().squeeze(-1)
    if len(at):
        openings = law.openings(rows[at])
        opening = logits[at].masked_fill(~openings, -torch.inf)
        log_start = log_start.index_put((at,), opening.logsumexp(-1) - norm[at])
        stops[at] = openings.gather(-1, argmax[at].unsqueeze(-1)).squeeze(-1)
        argmax = argmax.index_put((at,), opening.argmax(-1))
    return TokenTerms(logprob, log_start, argmax == gold, stops)


class Spans(NamedTuple):
    """How positions make segments.

    Attributes:
        opens: a segment begins, bool, shape (N,).
        decided: it is one of those that are scored, bool, shape (N,); not the one that was cut off.
        scored: the gold token belongs to one of them, bool, shape (N,).
        ends: the gold token ends the text, bool, shape (N,).
    """

    opens: Tensor
    decided: Tensor
    scored: Tensor
    ends: Tensor

    @classmethod
    def of(cls, gold: Tensor, rows: Tensor, is_target: Tensor, law: SegmentLaw) -> Spans:
        """Of positions with these gold tokens, rows and target marks, shape (N,) each."""
        opens = rows >= 0
        return cls(opens, opens & is_target, is_target, law.ends[gold])


def segment_logprobs(terms: TokenTerms, spans: Spans) -> Tensor:
    """log q of every segment, in order, nats, shape (D,)."""
    number = spans.decided.cumsum(0) - 1
    total = terms.logprob.new_zeros(int(spans.decided.sum()))
    total = total.index_add(0, number[spans.scored], terms.logprob[spans.scored])
    return total - terms.log_start[spans.decided] + stop_logprobs(terms, spans)


def stop_logprobs(terms: TokenTerms, spans: Spans) -> Tensor:
    """log P(START) behind every segment, so how likely its author stops there; 0 at the end of a text; shape (D,)."""
    return _behind(terms.log_start, spans, 0.0)


def segments_correct(terms: TokenTerms, spans: Spans) -> Tensor:
    """Whether greedy decoding writes each segment, and no more, bool, shape (D,)."""
    number = spans.decided.cumsum(0) - 1
    wrong = torch.zeros(int(spans.decided.sum()), device=number.device)
    wrong = wrong.index_add(0, number[spans.scored], (~terms.correct[spans.scored]).float())
    return (wrong == 0) & _behind(terms.stops, spans, True)


def _behind(values: Tensor, spans: Spans, at_end: float | bool) -> Tensor:
    """Of each segment the value where the next begins; `at_end` for those that end the text."""
    nothing = values.new_full((1,), at_end)
    following = torch.cat([values[spans.opens][1:], nothing])
    return torch.where(spans.ends[spans.opens], nothing, following)[spans.decided[spans.opens]]
