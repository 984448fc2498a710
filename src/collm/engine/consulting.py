"""Decisions for which several authors are read first: by policies that see all of them, and by judges of drafts.

The positions of a sequence are decided together: the base drafted its own tokens, so all authors have read them. A
position counts only if the tokens before it are as drafted; `Sequence.advance` drops the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as ListOf
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from collm.core.combinations import CombiningPolicy
from collm.core.judges import Judge, RegretJudge
from collm.core.params import SamplingParams
from collm.core.policies import Policy
from collm.core.types import BASE
from collm.engine.decision import Consultation, Decision, Draw, Logits
from collm.engine.reader import Draft, draw_tokens
from collm.engine.sequence import Sequence
from collm.errors import PolicyFailure
from collm.models.language_model import to_device

_T = TypeVar("_T")

_MIN_LOGPROB = -1e4
"""Log-probability passed to combinations for a logit of -inf, so that sums and differences stay finite."""


class Place(NamedTuple):
    """A decision of a sequence, the `at`-th of its open ones, whose consulted authors have been read."""

    sequence: Sequence
    at: int
    decision: Decision
    read: Consultation

    @property
    def guess(self) -> Draw:
        """The base's token."""
        assert self.decision.guess is not None
        return self.decision.guess

    def decide(self, author: int, draw: Draw) -> None:
        self.decision.author, self.decision.choice = author, draw
        self.decision.abstained = author in self.read.abstained
        self.sequence.waited = 0
        self.sequence.observe(self.decision)


def open_places(sequence: Sequence) -> list[Place]:
    """The places of a sequence whose consulted authors have all been read, until one has not."""
    found = []
    for at, decision in enumerate(sequence.decisions):
        if decision.choice is None:
            if decision.consultation is None or any(map(decision.waits_for, decision.needs)):
                break
            found.append(Place(sequence, at, decision, decision.consultation))
    return found


def decide_together(policy: Policy, places: ListOf[Place]) -> None:
    """Decide about places whose policy is the same, those of a sequence in order.

    Raises:
        PolicyFailure: the policy returned NaN.
        Exception: the policy raised it.
    """
    if policy.judge is not None:
        _judge(policy.judge, places)
    elif isinstance(policy, CombiningPolicy):
        _combine(policy, places)
    else:
        _choose(places)
    if any(place.decision.choice and math.isnan(place.decision.choice.logprob) for place in places):
        raise PolicyFailure(f"{policy} returned NaN logits although its authors' logits are finite")


def _choose(places: ListOf[Place]) -> None:
    """Let each sequence's policy choose one of the authors, and take that author's token."""
    rows = [(place, logits) for place in places for logits in place.read.logits.values()]
    raw, processed = (torch.stack([getattr(logits, of) for _, logits in rows]) for of in Logits._fields)
    best = processed.max(-1, keepdim=True)
    logprobs = best.values - processed.logsumexp(-1, keepdim=True)
    params, uniforms = _drawing([place for place, _ in rows])
    drawn = zip(*draw_tokens(processed, params, uniforms, best.indices, logprobs, raw=raw), strict=True)
    of_places = [dict(zip(place.read.logits, drawn, strict=False)) for place in places]
    for place, by_author in _standing(zip(places, of_places, strict=True)):
        tops = {author: (int(token), math.exp(logprob)) for author, (_, (token, logprob)) in sorted(by_author.items())}
        author = place.sequence.choose_author(place.at, place.decision.defer_prob, place.read.author_probs, tops)
        place.decide(author, by_author[author][0])


def _combine(policy: CombiningPolicy, places: ListOf[Place]) -> None:
    """Draw each token from the policy's combined distribution, and credit it to an author."""
    by_author = torch.stack([place.read.author_logprobs for place in places])  # (n, K + 1)
    draws = _draw(policy, places, by_author)
    token_ids = to_device([[draw.token_id] for draw in draws], by_author.device)
    logprobs = {author: of.gather(-1, token_ids).squeeze(-1) for author, of in _logprobs(places, "processed").items()}
    authors = policy.credit(logprobs, by_author).tolist()
    for place, (author, draw) in _standing(zip(places, zip(authors, draws, strict=True), strict=True)):
        place.decide(author, draw)


def _judge(judge: Judge, places: ListOf[Place]) -> None:
    """Keep the base's tokens that stand, and let an assistant write in place of the others."""
    by_author = torch.stack([place.read.author_logprobs for place in places])
    spent, kept = [0.0] * len(places), None
    if isinstance(judge, RegretJudge):
        kept, total = list[bool](), {place.sequence: place.sequence.regret for place in places}
        for i, (place, regret) in enumerate(zip(places, _regrets(places), strict=True)):
            kept.append(regret <= judge.nats and total[place.sequence] + regret <= judge.budget)
            spent[i] = regret if kept[-1] else 0.0
            total[place.sequence] += spent[i]
    draws = _draw(judge, places, by_author, kept)
    stands = kept or [draw.token_id == place.guess.token_id for place, draw in zip(places, draws, strict=True)]
    for place, (draw, keeps, regret) in _standing(zip(places, zip(draws, stands, spent, strict=True), strict=True)):
        place.sequence.regret += regret
        if keeps:
            place.decide(BASE, draw)
            continue
        place.decision.rejected = place.guess.token_id
        place.decide(max(place.decision.needs, key=place.read.author_probs.__getitem__), draw)


def _standing(rows: Iterable[tuple[Place, _T]]) -> Iterator[tuple[Place, _T]]:
    """The rows whose tokens before them are as drafted, given that the caller decides about each in turn."""
    ended = set[Sequence]()
    for place, row in rows:
        if place.sequence in ended:
            continue
        yield place, row
        choice, drafted = place.decision.choice, place.sequence.draft[place.at : place.at + 1]
        if choice is None or drafted != [choice.token_id]:
            ended.add(place.sequence)


def _regrets(places: ListOf[Place]) -> list[float]:
    """log max P_k - log P_k(x) of the base's tokens x, nats."""
    logits = torch.stack([place.read.logits[place.decision.needs[0]].processed for place in places])
    guesses = to_device([[place.guess.token_id] for place in places], logits.device)
    return (logits.amax(-1, keepdim=True) - logits.gather(-1, guesses)).squeeze(-1).tolist()


def _draw(
    rule: CombiningPolicy | Judge, places: ListOf[Place], by_author: Tensor, kept: ListOf[bool] | None = None
) -> list[Draw]:
    """Draw from the rule's distribution, where the base's token is not `kept`."""
    logits = raw = rule.combine(_logprobs(places, "processed"), by_author)
    base = torch.stack([place.read.logits[BASE].processed for place in places])
    if any(place.sequence.processors is not None for place in places):
        # A combination of logits may not respect constraints, so exclude what they forbid.
        logits = logits.masked_fill(base == -torch.inf, -torch.inf)
        raw = rule.combine(_logprobs(places, "raw"), by_author)
    stands = None if kept is None else to_device(kept, base.device, torch.bool)
    if stands is not None:
        raw = torch.where(stands.unsqueeze(-1), torch.stack([place.read.logits[BASE].raw for place in places]), raw)
    draft = Draft(to_device([place.guess.token_id for place in places], base.device), base, stands)
    return draw_tokens(logits, *_drawing(places), raw=raw, draft=draft)[0]


def _drawing(places: ListOf[Place]) -> tuple[list[SamplingParams], list[float]]:
    """The sampling parameters and the random numbers of places."""
    uniforms = [place.sequence.token_uniforms(BASE, range(place.at, place.at + 1))[0] for place in places]
    return [place.sequence.request.params for place in places], uniforms


def _logprobs(places: ListOf[Place], kind: Literal["raw", "processed"]) -> dict[int, Tensor]:
    """Author -> log-probabilities at n places, shape (n, V), nats, finite.

    Judges that need one assistant find that of each place under the number of the first.
    """
    readers = [[BASE, *place.decision.needs] for place in places]
    return {
        author: torch.log_softmax(
            torch.stack([getattr(place.read.logits[of[i]], kind) for place, of in zip(places, readers, strict=True)]),
            -1,
        ).clamp(min=_MIN_LOGPROB)
        for i, author in enumerate(readers[0])
    }
