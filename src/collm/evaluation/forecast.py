"""Whether a collaboration will pay, from the scores of frozen models on a few rows, before any training.

Rules that choose the author of each gold token are compared at equal deferral rates. Intervals are 95 %, with examples
as the items.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor

from collm.core.head import DeferralHead
from collm.core.types import BASE, author_name
from collm.engine.speculation import PassTimes
from collm.evaluation.gold import deferred, likelihoods, views_of
from collm.evaluation.intervals import Interval, statistic_interval
from collm.training.gain import FOLDS, crossed_gains
from collm.training.inspection import LabelReport, TokenViews, label_tokens
from collm.training.scores import Scores, stored_examples

RANDOM, DOUBT, LEARNED, ORACLE = "random", "doubt", "learned", "oracle"
RATES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
MOST = 0.3  # deferral rate up to which the verdict looks for the best one
LITTLE = 0.02  # nats per token for which no assistant is worth its calls
FAR = 1.0  # nats per token behind the assistant, from which a base needs tuning where no head makes up for it
DRAFTS = range(1, 9)  # lengths of drafts in speculative decoding


@dataclass(frozen=True)
class AuthorForecast:
    """One author on the gold tokens.

    Attributes:
        nll: mean NLL, nats. Where a tool abstains, it is the base's.
        right: share of tokens that are its argmax.
        best: share of tokens to which it gives the most probability of all authors; of equal ones, the base.
        lead_nats: mean difference to the second best author there.
        agreement: shares of tokens that are the argmax of both base and author, of only one of them, and of neither.
        pass_ms: milliseconds of a pass over one token; None if it was not measured.
    """

    name: str
    nll: Interval
    right: Interval
    best: Interval
    lead_nats: float
    agreement: tuple[float, ...]
    pass_ms: float | None


@dataclass(frozen=True)
class RatePoint:
    """All rules at one deferral rate: mean NLL in nats and share of right tokens by rule, and the speed of decoding."""

    rate: float
    nll: Mapping[str, Interval]
    right: Mapping[str, Interval]
    tokens_per_s: float | None


@dataclass(frozen=True)
class Drafting:
    """Lossless speculative decoding of the assistant with drafts of the base, estimated from teacher-forced argmaxes.

    A pass of the assistant over a draft of `length` tokens gives `tokens` on average, its own token among them.
    """

    length: int
    tokens: float
    tokens_per_s: float


@dataclass(frozen=True)
class Forecast:
    """What to expect of a collaboration.

    Attributes:
        unit: what is counted: tokens, or segments if tokenizers differ.
        rule: the best rule that decoding could follow: learned, or without hidden states doubt.
        points: by rate, up to the share of tokens for which an assistant has an answer (all but tools always have).
        reachable_nll: mean NLL in nats if the best author writes each token.
        rate: the rate up to `MOST` at which `rule` is best.
        minus: NLL of the learned rule minus that of each other rule at this rate.
        learning: number of rows that a head was fitted to -> NLL at this rate, minus that of a head fitted to most.
        assistant: number of the assistant that gains most in the mean.
    """

    num_examples: int
    num_tokens: int
    unit: str
    authors: tuple[AuthorForecast, ...]
    rule: str
    points: tuple[RatePoint, ...]
    reachable_nll: Interval
    rate: float
    minus: Mapping[str, Interval]
    learning: Mapping[int, Interval]
    labels: LabelReport
    assistant: int
    drafting: Drafting | None

    @property
    def verdict(self) -> str:
        """What to do: the first rule of this table that applies (docs/evaluation.md)."""
        base, other = self.authors[BASE], self.authors[self.assistant]
        point = next(point for point in self.points if point.rate == self.rate)
        behind, most = base.nll.mean - other.nll.mean, base.nll.mean - self.reachable_nll.mean
        ours, alone = point.tokens_per_s or math.inf, 1000 / (other.pass_ms or math.inf)
        drafted = 0.0 if self.drafting is None else self.drafting.tokens_per_s
        fastest, answers = self.points[0].tokens_per_s or math.inf, self.points[-1].rate == RATES[-1]
        is_as_good, random = other.nll.mean <= point.nll[self.rule].mean, self.minus.get(RANDOM)
        at, gain = f"with {self.rate:.0%} of the {self.unit} by assistants", f"{most:.2f} nats for each of them"
        against = f"than the collaboration {at}, and no worse: {drafted:.3g} tokens/s drafted, {alone:.3g} plain"
        table = (
            (most < LITTLE, f"Keep the base: even a perfect choice of authors would gain only {gain}."),
            (
                is_as_good and answers and behind > FAR and fastest > max(alone, drafted),
                f"Tune the base first (collm tune): it is {behind:.2f} nats behind, so a head would defer everywhere.",
            ),
            (is_as_good and alone >= max(ours, drafted), f"Use the assistant alone: it is faster {against}."),
            (is_as_good and drafted >= ours, f"Use speculative decoding: it is faster {against}, {ours:.3g} together."),
            (
                is_as_good and not answers,
                "Ask the tool at every token (threshold -1): it knows where it has an answer, and a head would only "
                "save calls.",
            ),
            (random is None, "Keep the base's hidden states (cache_hidden_states) to see what a head would choose."),
            (
                random is not None and random.high >= 0,
                f"More rows: a head from {max(self.learning, default=0)} chooses no better than chance. A perfect "
                f"choice would gain {gain}.",
            ),
            (
                True,
                f"The head will pay: {at}, expect {point.nll[self.rule].mean:.3f} nats for each, against "
                f"{base.nll.mean:.3f} of the base and {point.nll[RANDOM].mean:.3f} if chance chooses.",
            ),
        )
        return next(text for applies, text in table if applies)


def forecast(
    base: Scores,
    assistants: Sequence[Scores],
    *,
    clip: float,
    times: Sequence[PassTimes | None] = (),
    unit: str = "tokens",
    seed: int = 0,
) -> Forecast:
    """What a collaboration of these authors would do on the scored texts.

    Args:
        base: with hidden states and doubt for the rules that read them.
        clip: `gain_clip` of training.
        times: pass times of each author, the base first; None for a tool. Empty if they were not measured.

    Raises:
        ConfigError: there are no assistants, or their scores belong to other examples.
        DataError: there are too few examples for cross-validation.
    """
    labels, views = label_tokens(base, assistants)[1], views_of(*map(likelihoods, (base, *assistants)))
    times = times or [None] * (1 + len(assistants))
    mean, gains = partial(_mean, base.offsets), views.assistant_logprobs - views.base_logprob.unsqueeze(-1)
    best, learned = int(gains.mean(0).argmax()), _learned(base, assistants, clip, seed)
    only = torch.full_like(gains, -torch.inf).index_fill(-1, torch.tensor(best), 0.0)  # rules that choose no assistant
    rules = {RANDOM: only} | ({DOUBT: only - base.doubt[:, :1]} if base.doubt is not None else {})
    rules |= {LEARNED: learned[max(learned)], ORACLE: gains} if learned else {ORACLE: gains}
    rule = next(rule for rule in (LEARNED, DOUBT, RANDOM) if rule in rules)
    answered, points = 1 - cast(Tensor, views.assistant_abstained).all(-1).double().mean().item(), []
    for rate in RATES[: max(1, sum(rate <= answered for rate in RATES))]:
        found = {name: written(views, scores, rate) for name, scores in rules.items()}
        nlls, rights = ({name: mean(one[at]) for name, one in found.items()} for at in (0, 1))
        points.append(RatePoint(rate, nlls, rights, tokens_per_s(times, found[rule][2].tolist())))
    rate = min(points, key=lambda point: (point.rate > MOST, point.nll[rule].mean)).rate
    chosen = {name: written(views, scores, rate)[0] for name, scores in rules.items()}
    return Forecast(
        num_examples=len(base.offsets) - 1,
        num_tokens=len(base.logprobs),
        unit=unit,
        authors=tuple(_author(author, views, base.offsets, times[author]) for author in range(gains.shape[-1] + 1)),
        rule=rule,
        points=tuple(points),
        reachable_nll=mean(-views.base_logprob - gains.amax(-1).clamp(min=0)),
        rate=rate,
        minus={name: mean(chosen[LEARNED] - nll) for name, nll in chosen.items() if learned and name != LEARNED},
        learning={n: mean(written(views, scores, rate)[0] - chosen[LEARNED]) for n, scores in learned.items()},
        labels=labels,
        assistant=best + 1,
        drafting=_drafting(base, assistants[best], times[BASE], times[best + 1]),
    )


def _mean(offsets: Tensor, values: Tensor) -> Interval:
    """Mean per token. `offsets` as in `Scores`."""
    sums = torch.segment_reduce(values.double(), "sum", offsets=offsets)
    return statistic_interval(lambda totals: totals[..., 0] / totals[..., 1], torch.stack([sums, offsets.diff()], -1))


def written(views: TokenViews, scores: Tensor, rate: float) -> tuple[Tensor, Tensor, Tensor]:
    """Let the assistant with the largest score (M, K) write the tokens where it is largest, a share `rate` of all.

    Where it abstains, the base writes, and that is no deferral. Of equal scores, chance decides.

    Returns:
        The expected NLL in nats, the probability that the token is its author's argmax, shape (M,), and the deferral
        rate of each assistant, shape (K,).
    """
    writes, correct, logprob = deferred(replace(views, defer_logits=scores))
    largest, who = scores.double().max(-1)
    largest = largest.masked_fill(~writes, -torch.inf)
    number = min(rate * len(largest), int(writes.sum()))
    cut = largest.sort(descending=True).values[max(math.ceil(number) - 1, 0)]
    above, equal = (largest > cut).double(), ((largest == cut) & writes).double()
    share = above + equal * (number - above.sum()) / equal.sum().clamp(min=1)  # of each token by the assistant
    nll = -views.base_logprob - share * (logprob - views.base_logprob)
    right = (1 - share) * views.base_correct + share * correct
    return nll, right, torch.zeros(scores.shape[-1]).double().index_add(0, who, share) / len(share)


def _learned(base: Scores, assistants: Sequence[Scores], clip: float, seed: int) -> dict[int, Tensor]:
    """Number of rows -> the gains, (M, K), that heads fitted to so many other examples predict."""
    if base.hidden is None or base.doubt is None:
        return {}
    data = stored_examples(base, assistants)
    head = DeferralHead(data[0]["hidden"].shape[-1], len(assistants), doubt=True)
    sizes = (1, 2, FOLDS - 1)
    head.to("cuda" if torch.cuda.is_available() else "cpu")
    gains = crossed_gains(head, data, clip=clip, seed=seed, sizes=sizes)
    return {len(data) * size // FOLDS: one.cpu() for size, one in zip(sizes, gains, strict=True)}


def tokens_per_s(times: Sequence[PassTimes | None], rates: Sequence[float]) -> float | None:
    """Speed at a deferral rate of each assistant, if every token costs a pass of the base, and a deferred one another.

    An assistant that writes a share r reads 1 / r tokens in a pass on average. The time of tools is left out. None if
    the base was not measured.
    """
    base, *others = times[: len(rates) + 1]
    passes = [rate * one.at(1 / rate) for rate, one in zip(rates, others, strict=True) if rate and one is not None]
    return None if base is None else 1 / (base.at(1) + sum(passes))


def _author(author: int, views: TokenViews, offsets: Tensor, times: PassTimes | None) -> AuthorForecast:
    logprobs = torch.cat([views.base_logprob.unsqueeze(-1), views.assistant_logprobs], -1)
    (first, second), ours = logprobs.topk(2).values.unbind(-1), views.base_correct
    is_best = torch.where(logprobs[:, BASE] == first, BASE, logprobs[:, 1:].argmax(-1) + 1) == author
    right = views.assistant_correct[:, author - 1] if author else ours
    cases = (ours & right, ours & ~right, ~ours & right, ~ours & ~right) if author else ()
    return AuthorForecast(
        author_name(author),
        nll=_mean(offsets, -logprobs[:, author]),
        right=_mean(offsets, right),
        best=_mean(offsets, is_best),
        lead_nats=(first - second)[is_best].double().mean().nan_to_num().item(),
        agreement=tuple(case.double().mean().item() for case in cases),
        pass_ms=None if times is None else 1000 * times.at(1),
    )


def tokens_per_pass(agrees: Sequence[Sequence[bool]], length: int) -> float:
    """Tokens for each pass of the assistant that checks `length` drafts, which are right where `agrees` says."""
    passes = 0
    for text in agrees:
        at = 0
        while at < len(text):
            drafts = text[at : at + length]
            at += (drafts.index(False) if False in drafts else length) + 1
            passes += 1
    return sum(map(len, agrees)) / passes


def _drafting(base: Scores, assistant: Scores, drafter: PassTimes | None, checker: PassTimes | None) -> Drafting | None:
    """The fastest plan, if argmaxes and pass times are known."""
    if drafter is None or checker is None or base.predicted is None or assistant.predicted is None:
        return None
    same = (base.predicted == assistant.predicted).tolist()
    agrees = [same[start:end] for start, end in pairwise(base.offsets.tolist())]
    plans = []
    for length in DRAFTS:
        tokens = tokens_per_pass(agrees, length)
        plans.append(Drafting(length, tokens, tokens / (length * drafter.at(1) + checker.at(length + 1))))
    return max(plans, key=lambda plan: plan.tokens_per_s)
