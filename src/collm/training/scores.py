"""The scores of one model in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from safetensors import safe_open
from torch import Tensor


@dataclass(frozen=True)
class ScoreSummary:
    """How well a model predicts the target tokens.

    Attributes:
        mean_nll_nats: per target token.
        accuracy: share of target tokens that are the model's argmax.
        num_targets: how many target tokens.
    """

    mean_nll_nats: float
    accuracy: float
    num_targets: int


@dataclass(frozen=True)
class HiddenStates:
    """Last hidden states of a frozen model at target tokens, left on disk and read as they are asked for.

    Attributes:
        places: by example, the file it lies in, and its first row there and the one behind its last.
    """

    places: Mapping[int, tuple[Path, int, int]]

    def of(self, index: int) -> Tensor:
        """Of one example's target tokens, in order, shape (n, H), in the dtype they were computed in."""
        path, start, end = self.places[index]
        with safe_open(path, framework="pt") as file:
            return cast(Tensor, file.get_slice("hidden")[start:end])


@dataclass(frozen=True)
class Scores:
    """What one frozen model says about every target token, example by example.

    Attributes:
        logprobs: of the gold tokens, nats, fp32, shape (M,), M being the target tokens of all examples.
        corrects: the model's argmax is the gold token, bool, shape (M,).
        offsets: example i owns M-entries offsets[i] to offsets[i + 1], int64, shape (N + 1,).
        fingerprint: of the examples.
        hidden: the model's last hidden states at the target tokens, where they were kept.
    """

    logprobs: Tensor
    corrects: Tensor
    offsets: Tensor
    fingerprint: str
    hidden: HiddenStates | None = None

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
