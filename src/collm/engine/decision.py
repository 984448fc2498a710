"""Who writes the token at one position, and what is known of it: draws, logits and decisions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import Tensor

from collm.core.types import BASE, TopLogprobs


@dataclass(frozen=True)
class Draw:
    """The token that an author writes at one position.

    Attributes:
        logprob: its log-probability in nats under the author's raw logits; NaN if these held no valid number.
        top: the author's most probable tokens, as many as the request asks for.
        opening: for segments, the token that the author writes if a segment begins here, given that one does.
        log_start: for segments, the log-probability in nats that one begins here or the text ends.
    """

    token_id: int
    logprob: float
    top: TopLogprobs = ()
    opening: Draw | None = None
    log_start: float = 0.0

    def after(self, logprob: float) -> Draw:
        """The token with an event before it, whose log-probability is added."""
        if not logprob:
            return self
        return replace(self, logprob=self.logprob + logprob, top=tuple((one, each + logprob) for one, each in self.top))


class Logits(NamedTuple):
    """An author's next-token logits at one position, shape (V,) each. Both are one tensor if nothing is processed.

    Attributes:
        raw: the author's logits, from which log-probabilities are reported.
        processed: logits after the request's logits processors, from which tokens are drawn.
    """

    raw: Tensor
    processed: Tensor


@dataclass
class Consultation:
    """The outputs of all authors at one position, for a policy that sees them before it decides.

    Attributes:
        author_probs: P(Z = 0..K).
        author_logprobs: log P(Z), shape (K + 1,).
        logits: author -> its next-token logits.
        abstained: assistants that abstain. The base's logits replace theirs.
    """

    author_probs: list[float]
    author_logprobs: Tensor
    logits: dict[int, Logits]
    abstained: set[int] = field(default_factory=set)

    def add(self, author: int, logits: Logits | None) -> None:
        """Add an assistant's logits, or None if it abstains."""
        if logits is None:
            self.abstained.add(author)
            logits = self.logits[BASE]
        self.logits[author] = Logits(*(each.to(self.author_logprobs.device) for each in logits))


@dataclass
class Decision:
    """Who writes the token at one position, and the token.

    Attributes:
        author: the policy's choice; BASE until the consulted authors have been read.
        defer_prob: 1 - P(Z = 0) at this position.
        guess: the token that the base would write; None if it is not needed.
        choice: the token that is written; None until its author is known and has been read.
        needs: the assistants that must be read before `choice` is known.
        consultation: their outputs, if the policy consults them before it decides, or a judge does.
        rejected: the token of the base that the judge replaced.
        abstained: whether the author abstained, so that the base's guess is used.
        stood_in: whether the author's server was unavailable, so that the base writes.
        rest: tokens that follow `choice` in the same segment.
    """

    author: int
    defer_prob: float
    guess: Draw | None
    choice: Draw | None
    needs: Sequence[int] = ()
    consultation: Consultation | None = None
    abstained: bool = False
    rejected: int | None = None
    stood_in: bool = False
    rest: list[Draw] = field(default_factory=list)

    def waits_for(self, author: int) -> bool:
        seen = self.consultation is not None and author in self.consultation.logits
        return self.choice is None and author in self.needs and not seen
