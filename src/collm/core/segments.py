"""Probability of a segment, the text between two boundaries, computed from an author's token probabilities.

For a segment w of tokens t_1..t_n after a text x, q(w | x) = P(t_1 | START) P(t_2) .. P(t_n) P(START | x w), where
START is the set of tokens that begin a segment (`text.alignment`). The last segment of a text has no final factor.

Shapes: N positions, D segments, V vocabulary. Positions are the tokens of whole answers, concatenated, with one more
token after an answer that was truncated.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SegmentLaw(NamedTuple):
    """The tokens of one author's vocabulary that begin a segment.

    Attributes:
        opens: whether a segment begins, by row (which depends on the text before) and the token's first byte, bool,
            shape (R, 256).
        first_byte: first byte of each token, -1 for a token without text, int64, shape (V,).
        ends: whether a token ends the text, bool, shape (V,).
    """

    opens: Tensor
    first_byte: Tensor
    ends: Tensor

    @property
    def written(self) -> Tensor:
        """Tokens that may occur in an answer, bool, shape (V,)."""
        return (self.first_byte >= 0) | self.ends

    def openings(self, rows: Tensor) -> Tensor:
        """Tokens that begin a segment or end the text, for rows of shape (n,): bool, shape (n, V)."""
        opening = self.opens[rows][:, self.first_byte.clamp(min=0)]
        return (opening & (self.first_byte >= 0)) | self.ends

    def to(self, device: torch.device) -> SegmentLaw:
        return SegmentLaw(*(tensor.to(device) for tensor in self))


class TokenTerms(NamedTuple):
    """Per-position terms of an author's segment probabilities, shape (N,) each.

    Attributes:
        logprob: log-probability of the gold token, nats.
        log_start: log P(START), nats; 0 where no segment begins.
        correct: whether the gold token is the argmax; where a segment begins, the argmax among tokens that begin one.
        stops: whether the argmax begins a segment; false where no segment begins.
    """

    logprob: Tensor
    log_start: Tensor
    correct: Tensor
    stops: Tensor


def token_terms(logits: Tensor, gold: Tensor, rows: Tensor, law: SegmentLaw) -> TokenTerms:
    """Compute the terms at N positions.

    Args:
        logits: fp32, shape (N, V).
        gold: the gold token, shape (N,).
        rows: row of `SegmentLaw.opens` where a segment begins, else -1, shape (N,).
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
    """Assignment of positions to segments.

    Attributes:
        opens: whether a segment begins, bool, shape (N,).
        decided: whether a scored segment begins, bool, shape (N,); a truncated segment is not scored.
        scored: whether the gold token belongs to a scored segment, bool, shape (N,).
        ends: whether the gold token ends the text, bool, shape (N,).
    """

    opens: Tensor
    decided: Tensor
    scored: Tensor
    ends: Tensor

    @classmethod
    def of(cls, gold: Tensor, rows: Tensor, is_target: Tensor, law: SegmentLaw) -> Spans:
        """Build from gold tokens, rows and the target mask, shape (N,) each."""
        opens = rows >= 0
        return cls(opens, opens & is_target, is_target, law.ends[gold])


def segment_logprobs(terms: TokenTerms, spans: Spans) -> Tensor:
    """log q(w | x) of every segment, in order, nats, shape (D,)."""
    number = spans.decided.cumsum(0) - 1
    total = terms.logprob.new_zeros(int(spans.decided.sum()))
    total = total.index_add(0, number[spans.scored], terms.logprob[spans.scored])
    return total - terms.log_start[spans.decided] + stop_logprobs(terms, spans)


def stop_logprobs(terms: TokenTerms, spans: Spans) -> Tensor:
    """log P(START) after every segment: the probability that its author stops there. 0 at the end; shape (D,)."""
    return _at_next_start(terms.log_start, spans, 0.0)


def segments_correct(terms: TokenTerms, spans: Spans) -> Tensor:
    """Whether greedy decoding writes exactly each segment, bool, shape (D,)."""
    number = spans.decided.cumsum(0) - 1
    wrong = torch.zeros(int(spans.decided.sum()), device=number.device)
    wrong = wrong.index_add(0, number[spans.scored], (~terms.correct[spans.scored]).float())
    return (wrong == 0) & _at_next_start(terms.stops, spans, True)


def _at_next_start(values: Tensor, spans: Spans, at_end: float | bool) -> Tensor:
    """For each segment, the value where the next one begins, or `at_end` for a segment that ends the text."""
    default = values.new_full((1,), at_end)
    following = torch.cat([values[spans.opens][1:], default])
    return torch.where(spans.ends[spans.opens], default, following)[spans.decided[spans.opens]]
