"""Decisions of policies that consult assistants: an author is chosen, or all authors' distributions are combined."""

from __future__ import annotations

import math
from collections.abc import Sequence as ListOf
from typing import Literal

import torch
from torch import Tensor

from collm.core.combinations import CombiningPolicy
from collm.core.types import BASE
from collm.engine.reader import draw_tokens
from collm.engine.sequence import Consultation, Draw, Logits, Sequence
from collm.models.language_model import to_device

_MIN_LOGPROB = -1e4
"""Log-probability passed to combinations for a logit of -inf, so that sums and differences stay finite."""


def decide_together(policy: object, sequences: ListOf[Sequence]) -> list[tuple[int, Draw]]:
    """The author and the token of each sequence's open position, whose consulted authors have all been read."""
    consulted = [sequence.decisions[0].consultation for sequence in sequences]
    consultations = [one for one in consulted if one is not None]
    if isinstance(policy, CombiningPolicy):
        return _draw_from_combination(policy, sequences, consultations)
    return _draw_from_chosen(sequences, consultations)


def _draw_from_chosen(sequences: ListOf[Sequence], consultations: ListOf[Consultation]) -> list[tuple[int, Draw]]:
    """Let each sequence's policy choose one of the authors, and draw that author's token."""
    rows = [(one, author) for one, read in zip(sequences, consultations, strict=True) for author in read.logits]
    each_logits = [logits for read in consultations for logits in read.logits.values()]
    raw, processed = (torch.stack([getattr(one, of) for one in each_logits]) for of in Logits._fields)
    best = processed.max(-1, keepdim=True)
    logprobs = best.values - processed.logsumexp(-1, keepdim=True)
    params = [sequence.request.params for sequence, _ in rows]
    uniforms = [uniform for sequence, author in rows for uniform in sequence.token_uniforms(author, range(1))]
    draws, numbers = draw_tokens(processed, params, uniforms, best.indices, logprobs, raw=raw)
    drawn = dict(zip(rows, zip(draws, numbers, strict=True), strict=True))
    written = []
    for sequence, read in zip(sequences, consultations, strict=True):
        tops = {}
        for author in sorted(read.logits):
            token_id, logprob = drawn[sequence, author][1]
            tops[author] = int(token_id), math.exp(logprob)
        author = sequence.choose_author(sequence.decisions[0].defer_prob, read.author_probs, tops)
        written.append((author, drawn[sequence, author][0]))
    return written


def _draw_from_combination(
    policy: CombiningPolicy, sequences: ListOf[Sequence], consultations: ListOf[Consultation]
) -> list[tuple[int, Draw]]:
    """Draw a token of each sequence from the policy's combined distribution, and credit it to an author."""
    by_author = torch.stack([read.author_logprobs for read in consultations])  # (n, K + 1)
    logprobs = _logprobs(consultations, "processed")
    logits = raw = policy.combine(logprobs, by_author)
    if any(sequence.processors is not None for sequence in sequences):
        # A combination of logits may not respect constraints, so exclude what they forbid.
        allowed = torch.stack([read.logits[BASE].processed for read in consultations]) > -torch.inf
        logits = logits.masked_fill(~allowed, -torch.inf)
        raw = policy.combine(_logprobs(consultations, "raw"), by_author)
    params = [sequence.request.params for sequence in sequences]
    uniforms = [uniform for sequence in sequences for uniform in sequence.token_uniforms(BASE, range(1))]
    draws, _ = draw_tokens(logits, params, uniforms, raw=raw)
    token_ids = to_device([[draw.token_id] for draw in draws], logits.device)
    token_logprobs = {author: each.gather(-1, token_ids).squeeze(-1) for author, each in logprobs.items()}
    return list(zip(policy.credit(token_logprobs, by_author).tolist(), draws, strict=True))


def _logprobs(consultations: ListOf[Consultation], kind: Literal["raw", "processed"]) -> dict[int, Tensor]:
    """Author -> log-probabilities of n sequences, shape (n, V), nats, finite."""
    return {
        author: torch.log_softmax(
            torch.stack([getattr(read.logits[author], kind) for read in consultations]), dim=-1
        ).clamp(min=_MIN_LOGPROB)
        for author in consultations[0].logits
    }
