"""Probability of a segment, the text between two boundaries, computed from an author's token probabilities.

The formula is in `text.alignment`; the last segment of a text has no final factor. All tokens that end a text are one
event, because decoding ends at any of them.

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
        opens: whether a segment begins, by row (for the text before) and first byte, bool, shape (R, 256).
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
        logprob: log-probability of the gold token, nats; of any end if it ends the text.
        log_start: log P(START), nats; 0 where no segment begins.
        correct: whether the gold token is the argmax; where a segment begins, the argmax among tokens that begin one.
            Any end is as good as another.
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
        gold: gold tokens, shape (N,).
        rows: row of `SegmentLaw.opens` where a segment begins, else -1, shape (N,).
    """
    logits = logits.masked_fill(~law.written, -torch.inf)
    norm = logits.logsumexp(-1)
    gold_logit = logits.gather(-1, gold.unsqueeze(-1)).squeeze(-1)
    ended = law.ends[gold].nonzero().squeeze(-1)
    gold_logit = gold_logit.index_put((ended,), logits[ended][:, law.ends].logsumexp(-1))
    argmax = logits.argmax(-1)
    log_start, stops = torch.zeros_like(norm), torch.zeros_like(gold, dtype=torch.bool)
    at = (rows >= 0).nonzero().squeeze(-1)
    if len(at):
        openings = law.openings(rows[at])
        opening = logits[at].masked_fill(~openings, -torch.inf)
        log_start = log_start.index_put((at,), opening.logsumexp(-1) - norm[at])
        stops[at] = openings.gather(-1, argmax[at].unsqueeze(-1)).squeeze(-1)
        argmax = argmax.index_put((at,), opening.argmax(-1))
    correct = (argmax == gold) | (law.ends[argmax] & law.ends[gold])
    return TokenTerms(gold_logit - norm, log_start, correct, stops)


def segment_scores(terms: TokenTerms, gold: Tensor, rows: Tensor, scored: Tensor, law: SegmentLaw) -> dict[str, Tensor]:
    """Score every segment of which the tokens are scored.

    Args:
        terms: the author's terms.
        gold, rows: as in `token_terms`.
        scored: whether the gold token belongs to a scored segment, bool, shape (N,); a truncated segment is not scored.

    Returns:
        Shape (D,) each: "logprob", log q(w | x) in nats; "correct", whether greedy decoding writes exactly the segment;
        "log_stop", log P(START) after it in nats, the probability that its author stops there, 0 at the end of a text.
    """
    begins = rows >= 0
    decided = begins & scored
    ends_text = law.ends[gold[begins]]

    def where_next_begins(values: Tensor, at_end: float | bool) -> Tensor:
        default = values.new_full((1,), at_end)
        following = torch.cat([values[begins][1:], default])
        return torch.where(ends_text, default, following)[decided[begins]]

    number = (decided.cumsum(0) - 1)[scored]
    total = terms.logprob.new_zeros(int(decided.sum()))
    wrong = torch.zeros_like(total).index_add(0, number, (~terms.correct[scored]).to(total.dtype))
    total = total.index_add(0, number, terms.logprob[scored])
    log_stop = where_next_begins(terms.log_start, 0.0)
    correct = (wrong == 0) & where_next_begins(terms.stops, True)
    return {"logprob": total - terms.log_start[decided] + log_stop, "correct": correct, "log_stop": log_stop}
