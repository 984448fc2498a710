"""Pseudo-labels: a guess of each target token's author from scores, with a report of their shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from collm.core.objective import PseudoLabelVariant, pseudo_labels
from collm.core.types import author_name
from collm.errors import ConfigError
from collm.training.scores import Scores

LOW_SHARE = 0.01
MOSTLY_BETTER = 0.75
"""Share of tokens at which an assistant is better, from which training needs a deferral cost."""


@dataclass(frozen=True)
class LabelReport:
    """Shares of target tokens that are labelled with each assistant.

    Attributes:
        num_tokens: number of target tokens.
        shares: shares labelled 1, 2, .. K.
        better: share of target tokens to which an assistant gives more probability than the base does.
    """

    num_tokens: int
    shares: tuple[float, ...]
    better: float

    @property
    def share(self) -> float:
        """Share of positives: target tokens labelled with any assistant."""
        return sum(self.shares)

    def __str__(self) -> str:
        parts = ", ".join(f"{share:.2%} to {author_name(k)}" for k, share in enumerate(self.shares, start=1))
        each = f" ({parts})" if len(self.shares) > 1 else ""
        given = f"pseudo-labels give {self.share:.2%} of {self.num_tokens} target tokens to an assistant{each}"
        return f"{given}: {self._meaning}"

    @property
    def _meaning(self) -> str:
        if self.share == 0:
            return (
                "no assistant predicts a token that the base does not, so deferring has no benefit; check that the "
                "assistant reads the same prompts and tokens, or choose another one"
            )
        if self.share < LOW_SHARE:
            return "the assistants rarely predict tokens that the base does not, so expect few deferrals"
        idle = [author_name(k) for k, share in enumerate(self.shares, start=1) if share == 0]
        if idle:
            return f"no token is labelled with {' and '.join(idle)}, so expect no deferrals to it"
        if self.better > MOSTLY_BETTER:
            return (
                f"an assistant gives {self.better:.0%} of the tokens more probability than the base does, so the head "
                "learns to defer nearly everywhere unless you set deferral_cost, for example to 1"
            )
        return "a few per cent is normal (users of the paper's code report 3 % on GSM8K)"


@dataclass(frozen=True)
class Labels:
    """Pseudo-labels of all target tokens, example by example.

    Attributes:
        values: 0 for the base, 1..K for the assistants, int64, shape (M,).
        offsets: example i has entries offsets[i] to offsets[i + 1], shape (N + 1,).
        num_assistants: K.
        better: whether an assistant gives the token more probability than the base does, bool, shape (M,).
    """

    values: Tensor
    offsets: Tensor
    num_assistants: int
    better: Tensor

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def of(self, index: int) -> Tensor:
        """Labels of one example's target tokens, in order, shape (n,)."""
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def report(self) -> LabelReport:
        counts = torch.bincount(self.values, minlength=self.num_assistants + 1).tolist()
        shares = tuple(count / len(self.values) for count in counts[1:])
        return LabelReport(len(self.values), shares, self.better.double().mean().item())


def label_tokens(base: Scores, assistants: Sequence[Scores], variant: PseudoLabelVariant = "a") -> Labels:
    """Compute pseudo-labels from the scores of the base and assistants 1..K (`core.objective.pseudo_labels`).

    Raises:
        ConfigError: there is no assistant, the scores are of different examples, or the variant is unknown.
    """
    if not assistants:
        raise ConfigError("pseudo-labels need the scores of at least one assistant, got none")
    for number, scores in enumerate(assistants, start=1):
        if scores.fingerprint != base.fingerprint:
            raise ConfigError(
                f"{author_name(number)} was scored on other examples ({scores.fingerprint[:12]}) than the base "
                f"({base.fingerprint[:12]}); score both on the same data"
            )
    corrects, logprobs = (
        torch.stack([getattr(scores, name) for scores in assistants], dim=-1) for name in ("corrects", "logprobs")
    )  # (M, K)
    values = pseudo_labels(base.corrects, corrects, logprobs, variant)
    return Labels(values, base.offsets, len(assistants), logprobs.amax(-1) > base.logprobs)
