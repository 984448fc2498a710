"""What all authors say of a token, for policies that ask them before they decide."""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as ListOf
from dataclasses import dataclass, field

import torch
from torch import Tensor

from collm.core.combinations import CombiningPolicy
from collm.core.transfers import to_device
from collm.core.types import BASE
from collm.decoding.draws import Draw, Logits, draw_tokens
from collm.decoding.sequence import Sequence

_EXCLUDED = -1e4
"""Log-probability that combinations are given for a token whose logit is -inf: sums and differences stay numbers."""


@dataclass
class AuthorOutputs:
    """What all authors say of the next token of one sequence.

    Attributes:
        defer_prob, author_probs: from the head.
        author_logprobs: log P(Z), shape (K + 1,).
        logits: author -> its next-token logits.
        abstained: assistants that abstain; the base's logits stand in for theirs.
    """

    defer_prob: float
    author_probs: list[float]
    author_logprobs: Tensor
    logits: dict[int, Logits]
    abstained: set[int] = field(default_factory=set)

    def hear(self, author: int, logits: Logits | None) -> None:
        """Note an assistant's logits; None where it abstains."""
        if logits is None:
            self.abstained.add(author)
            logits = self.logits[BASE]
        self.logits[author] = Logits(*(each.to(self.author_logprobs.device) for each in logits))


def chosen(sequences: ListOf[Sequence], of_each: ListOf[AuthorOutputs]) -> list[tuple[int, Draw]]:
    """Author and token where the policy picks one of the authors it asked."""
    rows = [
        (sequence, said, author) for sequence, said in zip(sequences, of_each, strict=True) for author in said.logits
    ]
    raw, processed = (
        torch.stack([getattr(said.logits[author], of) for _, said, author in rows]) for of in Logits._fields
    )
    likeliest = processed.max(-1, keepdim=True)
    logprobs = likeliest.values - processed.logsumexp(-1, keepdim=True)
    samplings = [sequence.sampling(len(sequence.steps)) for sequence, _, _ in rows]
    draws, numbers = draw_tokens(processed, samplings, likeliest.indices, logprobs, raw=raw)
    told = list(zip(rows, draws, numbers, strict=True))
    written = []
    for sequence, said in zip(sequences, of_each, strict=True):
        own = {author: (draw, top) for (one, _, author), draw, top in told if one is sequence}
        tops = {author: (int(token_id), math.exp(logprob)) for author, (_, (token_id, logprob)) in sorted(own.items())}
        author = sequence.author_of_next(said.defer_prob, said.author_probs, tops)
        written.append((author, own[author][0]))
    return written


def combined(
    policy: CombiningPolicy, sequences: ListOf[Sequence], of_each: ListOf[AuthorOutputs]
) -> list[tuple[int, Draw]]:
    """Author credited and token where the policy makes one distribution of several."""
    by_author = torch.stack([said.author_logprobs for said in of_each])  # (n, K + 1)
    logprobs = _logprobs([{author: logits.processed for author, logits in said.logits.items()} for said in of_each])
    logits = raw = policy.combine(logprobs, by_author)
    if any(sequence.processors is not None for sequence in sequences):
        allowed = torch.stack([_allowed(said) for said in of_each])
        logits = logits.masked_fill(~allowed, -torch.inf)
        raw = policy.combine(
            _logprobs([{author: logits.raw for author, logits in said.logits.items()} for said in of_each]), by_author
        )
    draws, _ = draw_tokens(logits, [sequence.sampling(len(sequence.steps)) for sequence in sequences], raw=raw)
    token_ids = to_device([[draw.token_id] for draw in draws], logits.device)
    of_tokens = {author: each.gather(-1, token_ids).squeeze(-1) for author, each in logprobs.items()}
    return list(zip(policy.credit(of_tokens, by_author).tolist(), draws, strict=True))


def _logprobs(of_each: ListOf[Mapping[int, Tensor]]) -> dict[int, Tensor]:
    """Author -> log-probabilities, shape (n, V), finite; of logits (V,) by author, for each of n sequences."""
    return {
        author: torch.log_softmax(torch.stack([logits[author] for logits in of_each]), dim=-1).clamp(min=_EXCLUDED)
        for author in of_each[0]
    }


def _allowed(said: AuthorOutputs) -> Tensor:
    """The tokens that no constraint forbids, bool, shape (V,): a sum of log-probabilities need not respect it."""
    return said.logits[BASE].processed > -torch.inf
