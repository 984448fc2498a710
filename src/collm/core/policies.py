"""Policies that choose the author of the next token from one sequence's `StepView`.

Policies that combine the authors' distributions (mixture, product, contrastive, proxy) are in `combinations`. An option
outside its range raises a `ConfigError`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, ClassVar

from collm.core.types import BASE, check_threshold
from collm.errors import ConfigError


@dataclass(frozen=True)
class StepView:
    """Everything a policy may use to choose the author of one sequence's next token.

    Attributes:
        position: number of tokens generated so far.
        deferred: number of these for which an assistant was chosen.
        author_probs: P(Z = 0..K), K + 1 numbers.
        defer_prob: 1 - P(Z = 0).
        temperature: the request's temperature; at 0 the choice must be deterministic.
        uniform: a random number from [0, 1) that belongs to this position and never changes; 0 at temperature 0, unless
            the policy `draws`.
        top_tokens, top_probs: author -> argmax of its logits, and its probability, in author order; empty unless the
            policy consults assistants.
    """

    position: int
    deferred: int
    author_probs: Sequence[float]
    defer_prob: float
    temperature: float
    uniform: float
    top_tokens: Mapping[int, int] = field(default_factory=dict)
    top_probs: Mapping[int, float] = field(default_factory=dict)


class Policy:
    """Base class of policies. A policy is a pure function of the step."""

    name: ClassVar[str] = ""
    """The name by which users choose the policy; none if it needs more than numbers."""
    judge: Any = None
    """What decides which of the base's tokens stand (`judges.JudgedPolicy`); None keeps all."""
    every = 0
    """Largest number of tokens that wait for the judge; 0 without a judge."""
    draws = False
    """Whether the choice of the author is random even at temperature 0, so that a seed has an effect."""

    def consults(self, num_assistants: int) -> Sequence[int]:
        """The assistants whose logits the policy needs before it decides."""
        return ()

    def author(self, step: StepView) -> int:
        """Choose the author: 0 for the base, k for assistant k."""
        raise NotImplementedError

    def allows(self, position: int, deferred: int, tokens: int) -> bool:
        """Whether assistants may write this many tokens in a row, with `position` and `deferred` as in `StepView`."""
        return True


def check_share(name: str, value: float) -> None:
    """Raise a ConfigError unless `value` is in [0, 1]."""
    if not 0 <= value <= 1:  # also false for NaN
        raise ConfigError(f"{name} is {value}, expected a number from 0 to 1")


class ThresholdRule(Policy):
    """Base class of: author = 0 if 1 - P(Z = 0) <= threshold else argmax_k u_k. A tie goes to the lowest k.

    The threshold must not depend on the models' outputs at the step.
    """

    def threshold_at(self, position: int, deferred: int, uniform: float) -> float:
        """The threshold at one position, given as in `StepView`. Below 0 the step always defers, at 1 it never does."""
        raise NotImplementedError

    def author(self, step: StepView) -> int:
        if step.defer_prob <= self.threshold_at(step.position, step.deferred, step.uniform):
            return BASE
        return max(range(1, len(step.author_probs)), key=lambda author: step.author_probs[author])


@dataclass(frozen=True)
class ThresholdPolicy(ThresholdRule):
    """Defer where 1 - P(Z = 0) exceeds a fixed threshold in [-1, 1] (arXiv 2403.03870)."""

    name = "threshold"
    threshold: float

    def __post_init__(self) -> None:
        check_threshold(self.threshold)

    def threshold_at(self, position: int, deferred: int, uniform: float) -> float:
        return self.threshold


_SHAPES: Mapping[str, Callable[[float], float]] = {
    "linear": lambda x: x,
    "exponential": lambda x: math.expm1(-5 * x) / math.expm1(-5),
    "cosine": lambda x: (1 - math.cos(math.pi * x)) / 2,
}


@dataclass(frozen=True)
class ScheduledPolicy(ThresholdRule):
    """The threshold rule with a schedule: start + (end - start) * s(min(position / steps, 1)).

    With a low start the assistants write the beginning of the text, where a mistake costs most, and the base the rest.
    Thresholds are in [-1, 1], and `steps` is at least 1. The shape s(x) is x ("linear"), 1 - exp(-5 x) up to a factor
    that makes it end at 1 ("exponential"), or (1 - cos(pi x)) / 2 ("cosine").
    """

    name = "schedule"
    start: float
    end: float
    steps: int
    shape: str = "linear"

    def __post_init__(self) -> None:
        check_threshold(self.start)
        check_threshold(self.end)
        if self.steps < 1:
            raise ConfigError(f"steps is {self.steps}, expected at least 1 token from start to end")
        if self.shape not in _SHAPES:
            raise ConfigError(f"shape is {self.shape!r}, expected one of {', '.join(_SHAPES)}")

    def threshold_at(self, position: int, deferred: int, uniform: float) -> float:
        return self.start + (self.end - self.start) * _SHAPES[self.shape](min(position / self.steps, 1.0))


@dataclass(frozen=True)
class BudgetPolicy(ThresholdRule):
    """The threshold rule with a limit on each completion's deferral rate.

    After n tokens at most budget * n + burst are deferred, as in a token bucket that gains `budget` per token. A
    deferral counts even if the assistant abstains. If tokenizers differ, these are the base's tokens. A segment is cut
    where the limit is reached, and the base continues from there.

    Args:
        budget: deferral rate, 0 to 1.
        threshold: as in `ThresholdPolicy`.
        burst: number of tokens by which deferrals may exceed the rate.
    """

    name = "budget"
    budget: float
    threshold: float = 0.5
    burst: int = 1

    def __post_init__(self) -> None:
        check_share("budget", self.budget)
        check_threshold(self.threshold)
        if self.burst < 0:
            raise ConfigError(f"burst is {self.burst}, expected 0 or more tokens")

    def threshold_at(self, position: int, deferred: int, uniform: float) -> float:
        return self.threshold if self.allows(position, deferred, 1) else 1.0

    def allows(self, position: int, deferred: int, tokens: int) -> bool:
        return deferred + tokens <= self.budget * (position + tokens) + self.burst


@dataclass(frozen=True)
class PricePolicy(ThresholdRule):
    """Defer to the assistant argmax_k (g_k - price_k) where that is above 0, with the gains g that the head predicts.

    Only for heads of the objective "gain". With one price it is the threshold rule with sigmoid(price). A tie goes to
    the lowest k.

    Args:
        prices: nats per token, one for all assistants or one for each.
    """

    name = "price"
    prices: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.prices or any(map(math.isnan, self.prices)):
            raise ConfigError(f"prices are {list(self.prices)}, expected nats per token, one or one for each assistant")

    def threshold_at(self, position: int, deferred: int, uniform: float) -> float:
        return 1 / (1 + math.exp(-max(self.prices[0], -700)))

    def author(self, step: StepView) -> int:
        if len(self.prices) == 1:
            return super().author(step)
        defer_prob, probs = step.defer_prob, step.author_probs[1:]
        if defer_prob == 0:
            return BASE
        most = max(probs)  # of the assistant with the largest gain, which is the logit of the defer prob
        largest = math.log(defer_prob) - math.log(max(1 - defer_prob, sys.float_info.min))
        gains = [largest + math.log(prob / most) if prob else -math.inf for prob in probs]
        worth = [gain - price for gain, price in zip(gains, self.prices, strict=True)]
        best = max(range(len(worth)), key=worth.__getitem__)
        return best + 1 if worth[best] > 0 else BASE


@dataclass(frozen=True)
class SingleAuthorPolicy(Policy):
    """One author writes every token: 0 the base, k assistant k."""

    name = "single"
    writer: int

    def author(self, step: StepView) -> int:
        return self.writer


@dataclass(frozen=True)
class JointPolicy(Policy):
    """Draw the author from P(Z)^(1/temperature), normalised. At temperature 1 this samples the joint model exactly.

    At temperature 0 the most probable author writes. A tie goes to the lowest author number.
    """

    name = "joint"

    def author(self, step: StepView) -> int:
        authors = range(len(step.author_probs))
        if step.temperature == 0:
            return max(authors, key=lambda author: step.author_probs[author])
        largest = max(step.author_probs)  # dividing by it prevents underflow to all zeros at low temperatures
        cumulative = list(accumulate((prob / largest) ** (1 / step.temperature) for prob in step.author_probs))
        return next((author for author in authors if cumulative[author] > step.uniform * cumulative[-1]), authors[-1])


@dataclass(frozen=True)
class RandomPolicy(ThresholdRule):
    """A baseline that defers with probability `rate`, regardless of the text, to the assistant argmax_k u_k."""

    name = "random"
    rate: float
    draws = True

    def __post_init__(self) -> None:
        check_share("rate", self.rate)

    def threshold_at(self, position: int, deferred: int, uniform: float) -> float:
        return -1.0 if uniform < self.rate else 1.0


@dataclass(frozen=True)
class ConfidencePolicy(Policy):
    """author = argmax_z max_x P_z(x): the author with the highest token probability. It ignores the head.

    A tie goes to the lowest author number. Confidence as the largest softmax probability is from arXiv 1610.02136.
    """

    name = "confidence"

    def consults(self, num_assistants: int) -> Sequence[int]:
        return range(1, num_assistants + 1)

    def author(self, step: StepView) -> int:
        return max(step.top_probs, key=lambda author: step.top_probs[author])


@dataclass(frozen=True)
class OraclePolicy(Policy):
    """Choose the first author whose argmax is the next token of `reference`, or the base if there is none.

    This is the upper bound for policies that choose an author per token greedily.
    """

    reference: tuple[int, ...]

    def consults(self, num_assistants: int) -> Sequence[int]:
        return range(1, num_assistants + 1)

    def author(self, step: StepView) -> int:
        if step.position >= len(self.reference):
            return BASE
        gold = self.reference[step.position]
        return next((author for author, token in step.top_tokens.items() if token == gold), BASE)
