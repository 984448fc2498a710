"""Who writes the next token, by which equation. A policy sees one sequence's step and names an author."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from collm.core.types import BASE, check_threshold
from collm.errors import ConfigError


@dataclass(frozen=True)
class StepView:
    """What a policy may look at before the next token of one sequence.

    Attributes:
        position: how many tokens have been generated so far.
        author_probs: P(Z = 0..K), K + 1 numbers.
        defer_prob: 1 - P(Z = 0).
        temperature: of the request; 0 asks for a deterministic choice.
        rng: the request's own random numbers.
        top_tokens: each author's argmax, K + 1 ids; empty unless the policy consults the assistants.
    """

    position: int
    author_probs: Sequence[float]
    defer_prob: float
    temperature: float
    rng: random.Random
    top_tokens: Sequence[int] = ()


class Policy(Protocol):
    """Names the author of the next token.

    Attributes:
        consults_assistants: every assistant reads the text before the decision, chosen or not.
        draws: the choice itself is random, so a seed matters even at temperature 0.
    """

    @property
    def consults_assistants(self) -> bool: ...

    @property
    def draws(self) -> bool: ...

    def author(self, step: StepView) -> int: ...


def likeliest_assistant(author_probs: Sequence[float]) -> int:
    """argmax over k >= 1 of P(Z = k), which is argmax_k u_k; the lowest k on a tie."""
    return max(range(1, len(author_probs)), key=lambda author: author_probs[author])


@dataclass(frozen=True)
class ThresholdPolicy:
    """author = 0 if 1 - P(Z = 0) <= threshold else argmax_k u_k (arXiv 2403.03870).

    Raises:
        ConfigError: the threshold is outside [-1, 1].
    """

    threshold: float
    consults_assistants = False
    draws = False

    def __post_init__(self) -> None:
        check_threshold(self.threshold)

    def author(self, step: StepView) -> int:
        return BASE if step.defer_prob <= self.threshold else likeliest_assistant(step.author_probs)


@dataclass(frozen=True)
class SingleAuthorPolicy:
    """One author writes everything: 0 the base alone, k assistant k alone."""

    writer: int
    consults_assistants = False
    draws = False

    def author(self, step: StepView) -> int:
        return self.writer


@dataclass(frozen=True)
class JointPolicy:
    """Z ~ P(Z)^(1/temperature), normalised: at temperature 1 exact samples of the trained joint model.

    At temperature 0 the likeliest author, 0 on a tie.
    """

    consults_assistants = False
    draws = False

    def author(self, step: StepView) -> int:
        authors = range(len(step.author_probs))
        if step.temperature == 0:
            return max(authors, key=lambda author: step.author_probs[author])
        largest = max(step.author_probs)  # dividing by it keeps low temperatures from underflowing to all zeros
        weights = [(prob / largest) ** (1 / step.temperature) for prob in step.author_probs]
        return step.rng.choices(authors, weights)[0]


@dataclass(frozen=True)
class RandomPolicy:
    """Defers with probability `rate`, whatever the text; among assistants, argmax_k u_k. A baseline.

    Raises:
        ConfigError: the rate is outside [0, 1].
    """

    rate: float
    consults_assistants = False
    draws = True

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise ConfigError(f"rate is {self.rate}, expected a number from 0 to 1")

    def author(self, step: StepView) -> int:
        return likeliest_assistant(step.author_probs) if step.rng.random() < self.rate else BASE


@dataclass(frozen=True)
class OraclePolicy:
    """The base where its argmax is the reference token, else the first assistant that has it, else the base.

    The upper bound of choosing authors greedily, given the answer.

    Args:
        reference: token ids of the reference completion.
    """

    reference: tuple[int, ...]
    consults_assistants = True
    draws = False

    def author(self, step: StepView) -> int:
        if step.position >= len(self.reference):
            return BASE
        gold = self.reference[step.position]
        return next((author for author, token in enumerate(step.top_tokens) if token == gold), BASE)
