"""What all authors say of a token, for policies that ask them before they decide."""

from __future__ import annotations

import math
from collections.abc import Sequence as ListOf
from dataclasses import dataclass, field

import torch
from torch import Tensor

from collm.core.combinations import CombiningPolicy
from collm.core.types import BASE
from collm.decoding.draws import Draw, greedy_draws
from collm.decoding.sequence import Sequence

_EXCLUDED = -1e4
"""Log-probability that combinations are given for a token whose logit is -inf: sums and differences stay numbers."""


@dataclass
class Consultation:
    """What all authors say of the next token of one sequence.

    Attributes:
        defer_prob, author_probs: from the head.
        author_logprobs: log P(Z), shape (K + 1,).
        logits: author -> next-token logits, shape (V,).
        silent: assistants that abstain; the base's logits stand in for theirs.
    """

    defer_prob: float
    author_probs: list[float]
    author_logprobs: Tensor
    logits: dict[int, Tensor]
    silent: set[int] = field(default_factory=set)

    def hear(self, author: int, logits: Tensor | None) -> None:
        """Note an assistant's logits (V,); None where it abstains."""
        if logits is None:
            self.silent.add(author)
            logits = self.logits[BASE]
        self.logits[author] = logits.to(self.author_logprobs.device)


def chosen(sequences: ListOf[Sequence], of_each: ListOf[Consultation]) -> list[tuple[int, Draw]]:
    """Author and token where the policy picks one of the authors it asked."""
    written = []
    for sequence, said in zip(sequences, of_each, strict=True):
        authors = sorted(said.logits)
        greedy, _ = greedy_draws(torch.stack([said.logits[author] for author in authors]))
        draws = dict(zip(authors, greedy, strict=True))
        top = {author: (draw.token_id, math.exp(draw.logprob)) for author, draw in draws.items()}
        author = sequence.author_of_next(said.defer_prob, said.author_probs, top)
        written.append((author, sequence.draw(len(sequence.steps), said.logits[author], draws[author])))
    return written


def combined(
    policy: CombiningPolicy, sequences: ListOf[Sequence], of_each: ListOf[Consultation]
) -> list[tuple[int, Draw]]:
    """Author credited and token where the policy makes one distribution of several."""
    by_author = torch.stack([said.author_logprobs for said in of_each])  # (n, K + 1)
    logprobs = {
        author: torch.log_softmax(torch.stack([said.logits[author] for said in of_each]), dim=-1).clamp(min=_EXCLUDED)
        for author in of_each[0].logits
    }
    logits = policy.combine(logprobs, by_author)
    greedy, _ = greedy_draws(logits)
    draws = [
        sequence.draw(len(sequence.steps), row, draw)
        for sequence, row, draw in zip(sequences, logits, greedy, strict=True)
    ]
    token_ids = torch.tensor([[draw.token_id] for draw in draws], device=logits.device)
    of_tokens = {author: each.gather(-1, token_ids).squeeze(-1) for author, each in logprobs.items()}
    return list(zip(policy.credit(of_tokens, by_author).tolist(), draws, strict=True))
