"""Who writes the next token, by which equation. A policy sees one sequence's step and names an author.

Policies whose choice is a distribution of its own (mixture, product, contrastive, proxy) are in `combinations`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from collm.core.types import BASE, check_threshold
from collm.errors import ConfigError


@dataclass(frozen=True)
class StepView:
    """What a policy may look at before the next token of one sequence.

    Attributes:
        position: how many tokens have been generated so far.
        deferred: for how many of those an assistant was asked.
        author_probs: P(Z = 0..K), K + 1 numbers.
        defer_prob: 1 - P(Z = 0).
        temperature: of the request; 0 asks for a deterministic choice.
        uniform: this position's own draw from [0, 1), the same however often the position is looked at.
        top_tokens: author -> argmax of its logits, in order; empty unless the policy consults assistants.
        top_probs: author -> the probability of that token; likewise.
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
    """Names the author of the next token: a pure function of the step.

    Attributes:
        draws: the choice itself is random, so a seed matters even at temperature 0.
    """

    draws = False

    def consults(self, num_assistants: int) -> Sequence[int]:
        """The assistants that read the text before the decision, chosen or not."""
        return ()

    def author(self, step: StepView) -> int:
        """0 for the base, k for assistant k."""
        raise NotImplementedError


def likeliest_assistant(author_probs: Sequence[float]) -> int:
    """argmax over k >= 1 of P(Z = k), which is argmax_k u_k; the lowest k on a tie."""
    return max(range(1, len(author_probs)), key=lambda author: author_probs[author])


def check_share(name: str, value: float) -> None:
    """Raise a ConfigError for a number outside [0, 1]."""
    if not 0 <= value <= 1:  # also false for NaN
        raise ConfigError(f"{name} is {value}, expected a number from 0 to 1")


class ThresholdRule(Policy):
    """author = 0 if 1 - P(Z = 0) <= threshold else argmax_k u_k, with a threshold that is known before the step."""

    def threshold_at(self, position: int, deferred: int, uniform: float) -> float:
        """The threshold at one position; below 0 it defers whatever the text, at 1 never.

        Args:
            position, deferred, uniform: as in `StepView`.
        """
        raise NotImplementedError

    def author(self, step: StepView) -> int:
        threshold = self.threshold_at(step.position, step.deferred, step.uniform)
        return BASE if step.defer_prob <= threshold else likeliest_assistant(step.author_probs)


@dataclass(frozen=True)
class ThresholdPolicy(ThresholdRule):
    """author = 0 if 1 - P(Z = 0) <= threshold else argmax_k u_k (arXiv 2403.03870).

    Raises:
        ConfigError: the threshold is outside [-1, 1].
    """

    threshold: float

    def __post_init__(self) -> None:
        check_threshold(self.threshold)

    def threshold_at(self, position: int, deferred: int, uniform: float) -> float:
        return self.threshold


@dataclass(frozen=True)
class ScheduledPolicy(ThresholdRule):
    """The threshold rule with a threshold that moves: start + (end - start) * min(position / steps, 1).

    A low start lets the assistants open the text, where a wrong turn costs most, and hands over to the base.

    Raises:
        ConfigError: a threshold outside [-1, 1], or fewer than one step.
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        check_threshold(self.start)
        check_threshold(self.end)
        if self.steps < 1:
            raise ConfigError(f"steps is {self.steps}, expected at least 1 token from start to end")

    def threshold_at(self, position: int, deferred: int, uniform: float) -> float:
        return self.start + (self.end - self.start) * min(position / self.steps, 1.0)


@dataclass(frozen=True)
class BudgetPolicy(ThresholdRule):
    """The threshold rule within a deferral rate that no prefix of this one completion exceeds by more than a burst.

    Defers only if 1 - P(Z = 0) > threshold and deferred + 1 <= budget * (position + 1) + burst, so after n tokens at
    most budget * n + burst were deferred: a token bucket that fills by `budget` for each token. A deferral to an
    assistant that then abstains counts too.

    Args:
        budget: deferral rate, 0 to 1.
        threshold: as in `ThresholdPolicy`.
        burst: tokens that may be deferred ahead of the rate.

    Raises:
        ConfigError: a value out of range.
    """

    budget: float
    threshold: float = 0.5
    burst: int = 1

    def __post_init__(self) -> None:
        check_share("budget", self.budget)
        check_threshold(self.threshold)
        if self.burst < 0:
            raise ConfigError(f"burst is {self.burst}, expected 0 or more tokens")

    def threshold_at(self, position: int, deferred: int, uniform: float) -> float:
        return self.threshold if deferred + 1 <= self.budget * (position + 1) + self.burst else 1.0


@dataclass(frozen=True)
class SingleAuthorPolicy(Policy):
    """One author writes everything: 0 the base alone, k assistant k alone."""

    writer: int

    def author(self, step: StepView) -> int:
        return self.writer


@dataclass(frozen=True)
class JointPolicy(Policy):
    """Z ~ P(Z)^(1/temperature), normalised: at temperature 1 exact samples of the trained joint model.

    At temperature 0 the likeliest author, 0 on a tie.
    """

    def author(self, step: StepView) -> int:
        authors = range(len(step.author_probs))
        if step.temperature == 0:
            return max(authors, key=lambda author: step.author_probs[author])
        largest = max(step.author_probs)  # dividing by it keeps low temperatures from underflowing to all zeros
        cumulative = list(accumulate((prob / largest) ** (1 / step.temperature) for prob in step.author_probs))
        return next((author for author in authors if cumulative[author] > step.uniform * cumulative[-1]), authors[-1])


@dataclass(frozen=True)
class RandomPolicy(ThresholdRule):
    """Defers with probability `rate`, whatever the text; among assistants, argmax_k u_k. A baseline.

    Raises:
        ConfigError: the rate is outside [0, 1].
    """

    rate: float
    draws = True

    def __post_init__(self) -> None:
        check_share("rate", self.rate)

    def threshold_at(self, position: int, deferred: int, uniform: float) -> float:
        return -1.0 if uniform < self.rate else 1.0


class ConsultingPolicy(Policy):
    """A policy that sees what every author would write before it decides."""

    def consults(self, num_assistants: int) -> Sequence[int]:
        return range(1, num_assistants + 1)


@dataclass(frozen=True)
class OraclePolicy(ConsultingPolicy):
    """The base where its argmax is the reference token, else the first assistant that has it, else the base.

    The upper bound of choosing authors greedily, given the answer.

    Args:
        reference: token ids of the reference completion.
    """

    reference: tuple[int, ...]

    def author(self, step: StepView) -> int:
        if step.position >= len(self.reference):
            return BASE
        gold = self.reference[step.position]
        return next((author for author, token in step.top_tokens.items() if token == gold), BASE)


@dataclass(frozen=True)
class ConfidencePolicy(ConsultingPolicy):
    """author = argmax_z max_x P_z(x): whoever is surer of its token, the base on a tie; the head has no say.

    The largest softmax probability as confidence: arXiv 1610.02136.
    """

    def author(self, step: StepView) -> int:
        return max(step.top_probs, key=lambda author: step.top_probs[author])
