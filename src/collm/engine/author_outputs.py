"""Outputs of all authors for one token, for policies that consult assistants before they decide."""

from __future__ import annotations

import math
from collections.abc import Sequence as ListOf
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from collm.core.combinations import CombiningPolicy
from collm.core.transfers import to_device
from collm.core.types import BASE
from collm.engine.draws import Draw, Logits, draw_tokens
from collm.engine.reader import AuthorOutput
from collm.engine.sequence import Decision, Sequence

_MIN_LOGPROB = -1e4
"""Log-probability passed to combinations for a logit of -inf, so that sums and differences stay finite."""


@dataclass
class Consultation:
    """Outputs of all authors for the next token of one sequence.

    Attributes:
        defer_prob, author_probs: the head's output.
        author_logprobs: log P(Z), shape (K + 1,).
        logits: author -> its next-token logits.
        abstained: assistants that abstain. The base's logits replace theirs.
    """

    defer_prob: float
    author_probs: list[float]
    author_logprobs: Tensor
    logits: dict[int, Logits]
    abstained: set[int] = field(default_factory=set)

    @classmethod
    def of_base(cls, output: AuthorOutput, row: int) -> Consultation:
        """The base's output at one row."""
        assert output.author_logprobs is not None
        _, defer_prob, *probs = output.numbers[row]
        return cls(defer_prob, probs, output.author_logprobs[row], {BASE: output.at(row)})

    def add(self, author: int, logits: Logits | None) -> None:
        """Add an assistant's logits, or None if it abstains."""
        if logits is None:
            self.abstained.add(author)
            logits = self.logits[BASE]
        self.logits[author] = Logits(*(each.to(self.author_logprobs.device) for each in logits))


def decide_together(sequences: ListOf[Sequence], all_outputs: ListOf[Consultation]) -> list[Decision]:
    """Let the policy that all these sequences share decide about the next token of each."""
    policy = sequences[0].request.policy
    if isinstance(policy, CombiningPolicy):
        written = _draw_from_combination(policy, sequences, all_outputs)
    else:
        written = _draw_from_chosen(sequences, all_outputs)
    return [
        Decision(author, outputs.defer_prob, None, drawn, author in outputs.abstained)
        for outputs, (author, drawn) in zip(all_outputs, written, strict=True)
    ]


def _draw_from_chosen(sequences: ListOf[Sequence], all_outputs: ListOf[Consultation]) -> list[tuple[int, Draw]]:
    """Let each sequence's policy choose one of the authors, and draw that author's token."""
    rows = [
        (sequence, outputs, author)
        for sequence, outputs in zip(sequences, all_outputs, strict=True)
        for author in outputs.logits
    ]
    raw, processed = (
        torch.stack([getattr(outputs.logits[author], of) for _, outputs, author in rows]) for of in Logits._fields
    )
    best = processed.max(-1, keepdim=True)
    logprobs = best.values - processed.logsumexp(-1, keepdim=True)
    samplings = [sequence.sampling(author, 0) for sequence, _, author in rows]
    draws, numbers = draw_tokens(processed, samplings, best.indices, logprobs, raw=raw)
    drawn = list(zip(rows, draws, numbers, strict=True))
    written = []
    for sequence, outputs in zip(sequences, all_outputs, strict=True):
        own = {author: (draw, top) for (one, _, author), draw, top in drawn if one is sequence}
        tops = {author: (int(token_id), math.exp(logprob)) for author, (_, (token_id, logprob)) in sorted(own.items())}
        author = sequence.choose_author(outputs.defer_prob, outputs.author_probs, tops)
        written.append((author, own[author][0]))
    return written


def _draw_from_combination(
    policy: CombiningPolicy, sequences: ListOf[Sequence], all_outputs: ListOf[Consultation]
) -> list[tuple[int, Draw]]:
    """Draw a token of each sequence from the policy's combined distribution, and credit it to an author."""
    by_author = torch.stack([outputs.author_logprobs for outputs in all_outputs])  # (n, K + 1)
    logprobs = _logprobs(all_outputs, "processed")
    logits = raw = policy.combine(logprobs, by_author)
    if any(sequence.processors is not None for sequence in sequences):
        # A combination of logits may not respect constraints, so exclude what they forbid.
        allowed = torch.stack([outputs.logits[BASE].processed for outputs in all_outputs]) > -torch.inf
        logits = logits.masked_fill(~allowed, -torch.inf)
        raw = policy.combine(_logprobs(all_outputs, "raw"), by_author)
    draws, _ = draw_tokens(logits, [sequence.sampling(BASE, 0) for sequence in sequences], raw=raw)
    token_ids = to_device([[draw.token_id] for draw in draws], logits.device)
    token_logprobs = {author: each.gather(-1, token_ids).squeeze(-1) for author, each in logprobs.items()}
    return list(zip(policy.credit(token_logprobs, by_author).tolist(), draws, strict=True))


def _logprobs(all_outputs: ListOf[Consultation], kind: Literal["raw", "processed"]) -> dict[int, Tensor]:
    """Author -> log-probabilities of n sequences, shape (n, V), nats, finite."""
    stacked = {
        author: torch.stack([getattr(outputs.logits[author], kind) for outputs in all_outputs])
        for author in all_outputs[0].logits
    }
    return {author: torch.log_softmax(each, dim=-1).clamp(min=_MIN_LOGPROB) for author, each in stacked.items()}
