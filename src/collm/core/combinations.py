"""Policies that draw tokens from a combination of several authors' distributions.

Shapes: n sequences, V vocabulary, K assistants. A combination runs the base and every author it consults for each
token. An option outside its range raises a `ConfigError`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from collm.core.head import defer_probs
from collm.core.policies import Policy, check_share
from collm.core.types import BASE, check_threshold
from collm.errors import ConfigError


class CombiningPolicy(Policy):
    """Base class of policies that draw the token from `combine` and credit it to an author with `credit`."""

    def consults(self, num_assistants: int) -> Sequence[int]:
        return range(1, num_assistants + 1)

    def combine(self, logprobs: Mapping[int, Tensor], author_logprobs: Tensor) -> Tensor:
        """Next-token logits, shape (n, V).

        Args:
            logprobs: author -> log P_z, shape (n, V), nats, fp32, finite, for the base and the consulted assistants.
            author_logprobs: log P(Z), shape (n, K + 1).
        """
        raise NotImplementedError

    def credit(self, token_logprobs: Mapping[int, Tensor], author_logprobs: Tensor) -> Tensor:
        """The author credited with each drawn token, shape (n,): by default the one that gave it the most probability.

        A tie goes to the lowest author number. The arguments are as in `combine`, for the drawn tokens only.
        """
        authors = sorted(token_logprobs)
        best = torch.stack([token_logprobs[author] for author in authors]).argmax(0)
        return torch.tensor(authors, device=best.device)[best]


@dataclass(frozen=True)
class MixturePolicy(CombiningPolicy):
    """P(x) = sum_z P(Z = z) P_z(x): the joint model with its latent author marginalised out (arXiv 2403.03870).

    The token is credited to the author with the largest posterior P(Z = z) P_z(x). Where the defer prob is at most the
    threshold, in [-1, 1], the base writes alone. By default that is nowhere.
    """

    name = "mixture"
    threshold: float = -1.0

    def __post_init__(self) -> None:
        check_threshold(self.threshold)

    def combine(self, logprobs: Mapping[int, Tensor], author_logprobs: Tensor) -> Tensor:
        joint = [author_logprobs[:, author, None] + logprobs[author] for author in sorted(logprobs)]
        mixed = torch.logsumexp(torch.stack(joint), dim=0)
        return torch.where(self._mixes(author_logprobs).unsqueeze(-1), mixed, logprobs[BASE])

    def credit(self, token_logprobs: Mapping[int, Tensor], author_logprobs: Tensor) -> Tensor:
        posterior = {author: author_logprobs[:, author] + each for author, each in token_logprobs.items()}
        best = super().credit(posterior, author_logprobs)
        return best.where(self._mixes(author_logprobs), BASE)

    def _mixes(self, author_logprobs: Tensor) -> Tensor:
        if self.threshold < 0:
            return torch.ones_like(author_logprobs[:, 0], dtype=torch.bool)
        return defer_probs(author_logprobs[:, 1:] - author_logprobs[:, :1]) > self.threshold


@dataclass(frozen=True)
class ProductPolicy(CombiningPolicy):
    """P(x) proportional to P_0(x)^weight * prod_k P_k(x)^((1 - weight) / K): a product of experts.

    Weight 1 gives the base; weight 0 with one assistant gives the assistant (Hinton, "Training products of experts by
    minimizing contrastive divergence", 2002).
    """

    name = "product"
    weight: float = 0.5

    def __post_init__(self) -> None:
        check_share("weight", self.weight)

    def combine(self, logprobs: Mapping[int, Tensor], author_logprobs: Tensor) -> Tensor:
        share = (1 - self.weight) / (len(logprobs) - 1)
        return sum((share * each for author, each in logprobs.items() if author != BASE), self.weight * logprobs[BASE])


@dataclass(frozen=True)
class ContrastivePolicy(CombiningPolicy):
    """Logits (1 + beta) log P_expert - beta log P_amateur over tokens with P_expert(x) >= alpha * max P_expert.

    This is contrastive decoding (arXiv 2210.15097) in the form of arXiv 2309.09117. With beta 0 it is the expert,
    truncated if alpha > 0. Tokens are credited to the expert.

    Args:
        alpha: plausibility threshold, from 0 (all tokens) to 1 (the expert's argmax only).
        beta: strength of the contrast, 0 to 1000.
        expert, amateur: author numbers, which differ.
    """

    name = "contrastive"
    alpha: float = 0.1
    beta: float = 0.5
    expert: int = 1
    amateur: int = BASE

    def __post_init__(self) -> None:
        check_share("alpha", self.alpha)
        if not 0 <= self.beta <= 1000:  # differences of log-probabilities overflow from about 1e37
            raise ConfigError(f"beta is {self.beta}, expected a number from 0 to 1000")
        if self.expert == self.amateur:
            raise ConfigError(f"expert and amateur are both author {self.expert}; name two different authors")

    def consults(self, num_assistants: int) -> Sequence[int]:
        return sorted({self.expert, self.amateur} - {BASE})

    def combine(self, logprobs: Mapping[int, Tensor], author_logprobs: Tensor) -> Tensor:
        expert = logprobs[self.expert]
        scores = (1 + self.beta) * expert - self.beta * logprobs[self.amateur] if self.beta else expert
        if self.alpha == 0:
            return scores
        cutoff = expert.amax(-1, keepdim=True) + math.log(self.alpha)
        return scores.masked_fill(expert < cutoff, -torch.inf)

    def credit(self, token_logprobs: Mapping[int, Tensor], author_logprobs: Tensor) -> Tensor:
        return torch.full_like(token_logprobs[self.expert], self.expert, dtype=torch.long)


@dataclass(frozen=True)
class ProxyTuningPolicy(CombiningPolicy):
    """P(x) proportional to P_M(x) * P_M+(x) / P_M-(x): proxy tuning (arXiv 2401.08565).

    Steers a model M by the effect that tuning had on a smaller one. Tokens are credited to M.

    Args:
        model: author number of M.
        tuned: author number of M+, the small tuned model.
        untuned: author number of M-, the small model before tuning.
    """

    name = "proxy"
    model: int = 1
    tuned: int = BASE
    untuned: int = 2

    def __post_init__(self) -> None:
        if self.model in (self.tuned, self.untuned):
            raise ConfigError(f"author {self.model} is both the model and its proxy; name another author as the proxy")

    def consults(self, num_assistants: int) -> Sequence[int]:
        return sorted({self.model, self.tuned, self.untuned} - {BASE})

    def combine(self, logprobs: Mapping[int, Tensor], author_logprobs: Tensor) -> Tensor:
        return logprobs[self.model] + (logprobs[self.tuned] - logprobs[self.untuned])

    def credit(self, token_logprobs: Mapping[int, Tensor], author_logprobs: Tensor) -> Tensor:
        return torch.full_like(token_logprobs[self.model], self.model, dtype=torch.long)
