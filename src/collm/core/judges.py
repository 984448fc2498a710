"""Judges of the tokens that the base wrote where it was not to defer: which stand once an assistant has read them.

A threshold rule decides when an assistant is asked. By itself it keeps every other token of the base. With a judge
these tokens are a draft: the assistant, which reads them anyway, says which of them stand. The first that does not is
replaced, and what follows it is written again. So judges lie between the threshold rule and lossless speculative
decoding (arXiv 2211.17192).

Shapes: n positions, V vocabulary, K assistants. An option outside its range raises a `ConfigError`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from collm.core.combinations import MixturePolicy
from collm.core.policies import Policy, StepView, ThresholdRule, check_share
from collm.core.types import BASE
from collm.errors import ConfigError


@dataclass(frozen=True)
class Judge:
    """The distribution `combine` in place of the base's. A token x of the base stands with min(1, P(x) / P_0(x))."""

    name: ClassVar[str]

    def needs(self, author: int, num_assistants: int) -> Sequence[int]:
        """The assistants that it reads at a position whose most probable assistant is `author`."""
        return (author,)

    def combine(self, logprobs: Mapping[int, Tensor], author_logprobs: Tensor) -> Tensor:
        """Next-token logits, shape (n, V). Arguments as for `CombiningPolicy.combine`, of the assistants it needs."""
        raise NotImplementedError


@dataclass(frozen=True)
class ExactJudge(Judge):
    """The assistant's own distribution: what is written is distributed as if the assistant wrote everything."""

    name = "exact"

    def combine(self, logprobs: Mapping[int, Tensor], author_logprobs: Tensor) -> Tensor:
        return logprobs[max(logprobs)]


@dataclass(frozen=True)
class BlendJudge(Judge):
    """weight P_k + (1 - weight) P_0, whatever the head says. Weight 1 is `exact`, 0 keeps everything."""

    name = "blend"
    weight: float = 0.5

    def __post_init__(self) -> None:
        check_share("weight", self.weight)

    def combine(self, logprobs: Mapping[int, Tensor], author_logprobs: Tensor) -> Tensor:
        shares = {BASE: 1 - self.weight, max(logprobs): self.weight}
        parts = [logprobs[author] + math.log(share) for author, share in shares.items() if share]
        return torch.logsumexp(torch.stack(parts), dim=0)


@dataclass(frozen=True)
class JointJudge(Judge):
    """sum_z P(Z = z) P_z: the head's own weights, as in `MixturePolicy`. It reads all assistants."""

    name = "joint"

    def needs(self, author: int, num_assistants: int) -> Sequence[int]:
        return range(1, num_assistants + 1)

    def combine(self, logprobs: Mapping[int, Tensor], author_logprobs: Tensor) -> Tensor:
        return MixturePolicy().combine(logprobs, author_logprobs)


@dataclass(frozen=True)
class RegretJudge(Judge):
    """A token x of the base stands unless the assistant loses more than `nats` by it: log max P_k - log P_k(x).

    The assistant writes in place of a token that does not stand.

    Args:
        nats: the largest regret of a token, 0 or more.
        budget: the largest sum of the regrets of a completion's tokens that stand.
    """

    name = "regret"
    nats: float = 2.0
    budget: float = math.inf

    def __post_init__(self) -> None:
        for name, value in (("nats", self.nats), ("budget", self.budget)):
            if not value >= 0:  # also false for NaN
                raise ConfigError(f"{name} of judge 'regret' is {value}, expected a number of nats, 0 or more")

    def combine(self, logprobs: Mapping[int, Tensor], author_logprobs: Tensor) -> Tensor:
        return logprobs[max(logprobs)]


@dataclass(frozen=True)
class JudgedPolicy(Policy):
    """A threshold rule whose judge reads the tokens of the base before they are final.

    The tokens of a budget's assistants include those that replace a token of the base.

    Args:
        rule: says where the assistant writes.
        every: largest number of tokens of the base that wait for the judge, at least 1. Text lags by as many.
    """

    rule: ThresholdRule
    judge: Judge = field(default_factory=ExactJudge)
    every: int = 8

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ConfigError(f"every is {self.every}, expected at least 1 token between two calls of the judge")

    @property
    def draws(self) -> bool:  # type: ignore[override]
        return self.rule.draws

    def author(self, step: StepView) -> int:
        return self.rule.author(step)

    def allows(self, position: int, deferred: int, tokens: int) -> bool:
        return self.rule.allows(position, deferred, tokens)


JUDGES: dict[str, Any] = {kind.name: kind for kind in (ExactJudge, BlendJudge, JointJudge, RegretJudge)}
"""Judges by name."""
