"""Scores of one model in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from safetensors import safe_open
from torch import Tensor


@dataclass(frozen=True)
class ScoreSummary:
    """How well a model predicts the target tokens.

    Attributes:
        mean_nll_nats: mean negative log-likelihood per target token.
        accuracy: share of target tokens that are the model's argmax.
        num_targets: number of target tokens.
    """

    mean_nll_nats: float
    accuracy: float
    num_targets: int


@dataclass(frozen=True)
class HiddenStates:
    """Last hidden states of a frozen model at target tokens, read from disk on demand.

    Attributes:
        places: example -> its file, with the start and end of its rows.
    """

    places: Mapping[int, tuple[Path, int, int]]

    def of(self, index: int) -> Tensor:
        """Hidden states of one example's target tokens, in order, shape (n, H), in their original dtype."""
        path, start, end = self.places[index]
        with safe_open(path, framework="pt") as file:
            return cast(Tensor, file.get_slice("hidden")[start:end])


@dataclass(frozen=True)
class Scores:
    """Scores of one frozen model for the M target tokens of N examples.

    Attributes:
        logprobs: log-probabilities of the gold tokens, nats, fp32, shape (M,).
        corrects: whether the model's argmax is the gold token, bool, shape (M,).
        offsets: example i has entries offsets[i] to offsets[i + 1], int64, shape (N + 1,).
        fingerprint: fingerprint of the examples.
        hidden: the model's last hidden states at the target tokens, if they were stored.
        model: the model's `identity`, if they were stored.
        abstained: whether a tool has no answer, bool, shape (M,); None if the model never abstains.
    """

    logprobs: Tensor
    corrects: Tensor
    offsets: Tensor
    fingerprint: str
    hidden: HiddenStates | None = None
    model: Mapping[str, Any] = field(default_factory=dict)
    abstained: Tensor | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def logprob(self, index: int) -> Tensor:
        """Log-probabilities of one example's target tokens, in order, shape (n,)."""
        return self.logprobs[self.offsets[index] : self.offsets[index + 1]]

    def correct(self, index: int) -> Tensor:
        """Whether each target token of one example is the model's argmax, shape (n,)."""
        return self.corrects[self.offsets[index] : self.offsets[index + 1]]

    def summary(self) -> ScoreSummary:
        mean = -self.logprobs.double().mean().item()
        return ScoreSummary(mean, self.corrects.double().mean().item(), len(self.logprobs))
