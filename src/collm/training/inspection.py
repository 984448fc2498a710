"""Analysis of scores: pseudo-labels, and measures of a head's choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from collm.core.head import author_logprobs, defer_probs
from collm.core.objective import (
    WEAK_POSITIVE_WEIGHT,
    Objective,
    PseudoLabelVariant,
    deferral_cost,
    label_nll,
    pseudo_labels,
    token_nll,
)
from collm.core.types import author_name
from collm.errors import ArtefactError, ConfigError
from collm.training.config import MOSTLY_BETTER
from collm.training.scores import Scores, load_scores

LOW_SHARE = 0.01


@dataclass(frozen=True)
class LabelReport:
    """Shares of target tokens that are labelled with each assistant.

    Attributes:
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
        named = {author_name(k): share for k, share in enumerate(self.shares, start=1)}
        parts = ", ".join(f"{share:.2%} to {name}" for name, share in named.items())
        each = f" ({parts})" if len(named) > 1 else ""
        idle = [name for name, share in named.items() if share == 0]
        meaning = "a few per cent is normal (users of the paper's code report 3 % on GSM8K)"
        if self.share == 0:
            meaning = (
                "no assistant predicts a token that the base does not, so deferring has no benefit; check that the "
                "assistant reads the same prompts and tokens, or choose another one"
            )
        elif self.share < LOW_SHARE:
            meaning = "the assistants rarely predict tokens that the base does not, so expect few deferrals"
        elif idle:
            meaning = f"no token is labelled with {' and '.join(idle)}, so expect no deferrals to it"
        elif self.better > MOSTLY_BETTER:
            meaning = (
                f"an assistant gives {self.better:.0%} of the tokens more probability than the base does, so by "
                "default training has a deferral cost of 1, and a tuned base learns by objective 'separate'"
            )
        given = f"{self.share:.2%} of {self.num_tokens} target tokens"
        return f"pseudo-labels give {given} to an assistant{each}: {meaning}"


def label_tokens(
    base: Scores, assistants: Sequence[Scores], variant: PseudoLabelVariant = "a"
) -> tuple[Tensor, LabelReport]:
    """Pseudo-labels of all target tokens, 0 for the base, 1..K for assistants, int64, shape (M,), and their shares."""
    if not assistants:
        raise ConfigError("pseudo-labels need the scores of at least one assistant, got none")
    for number, scores in enumerate(assistants, start=1):
        if scores.fingerprint != base.fingerprint:
            prints = f"({scores.fingerprint[:12]}) than the base ({base.fingerprint[:12]})"
            what = f"{author_name(number)} was scored on other examples {prints}"
            raise ConfigError(f"{what}; score both on the same data")
    corrects = torch.stack([scores.corrects for scores in assistants], dim=-1)  # (M, K)
    logprobs = torch.stack([scores.logprobs for scores in assistants], dim=-1)
    labels = pseudo_labels(base.corrects, corrects, logprobs, variant)
    _, *counts = torch.bincount(labels, minlength=len(assistants) + 1).tolist()
    better = (logprobs.amax(-1) > base.logprobs).double().mean().item()
    return labels, LabelReport(len(labels), tuple(count / len(labels) for count in counts), better)


def stored_scores(directory: Path) -> list[Scores]:
    """The scores of a run: those in the subdirectories `base`, `assistant`, `assistant-2`, .. of a directory."""
    names = ["base"]
    while (directory / (name := author_name(len(names)))).is_dir():
        names.append(name)
    if len(names) == 1:
        raise ArtefactError(f"{directory} has no assistant; expected the scores of a run: base, assistant, ..")
    return [load_scores(directory / name) for name in names]


def auc(scores: Tensor, positive: Tensor) -> float:
    """Area under the ROC curve, with ties counting half. NaN without positives or negatives."""
    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    if num_positive == 0 or num_negative == 0:
        return float("nan")
    _, place, counts = torch.unique(scores, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2).double()[place]
    above: float = ranks[positive].sum().item() - num_positive * (num_positive + 1) / 2
    return above / (num_positive * num_negative)


def head_measures(defer_logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Share of tokens whose most probable author is the label, and AUC of the defer prob for labels of assistants."""
    agreement = (author_logprobs(defer_logits).argmax(-1) == labels).float().mean().item()
    return agreement, auc(defer_probs(defer_logits), labels != 0)


@dataclass(frozen=True)
class TokenViews:
    """Predictions of all authors for N gold tokens.

    Attributes:
        base_logprob: log-probability of the gold token, nats, shape (N,).
        base_correct: whether the base's argmax is the gold token, bool, shape (N,).
        assistant_logprobs, assistant_correct, defer_logits: the same for each assistant, and u, shape (N, K).
        assistant_abstained: whether each assistant has no answer, bool, shape (N, K); None if none ever abstains.
    """

    base_logprob: Tensor
    base_correct: Tensor
    assistant_logprobs: Tensor
    assistant_correct: Tensor
    defer_logits: Tensor
    assistant_abstained: Tensor | None = None

    def split(self, sizes: Sequence[int]) -> list[TokenViews]:
        """Split into consecutive parts of these sizes."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        parts = {name: torch.split(values, list(sizes)) for name, values in found.items() if values is not None}
        return [TokenViews(**dict(zip(parts, one, strict=True))) for one in zip(*parts.values(), strict=True)]

    def measures(self, deferral_costs: Sequence[float] = (), objective: Objective = "marginal") -> dict[str, float]:
        """Means over the tokens. The costs, in nats per decision for each assistant, are part of the loss.

        Returns:
            loss: `token_nll` in nats, for "weak" with `label_nll` of the current base's labels, plus the deferral
            costs. base_nll and assistant_nll (assistant_1_nll, ..): NLL of each model alone. defer_prob. deferral_rate:
            share of tokens deferred at threshold 0.5. pseudo_label_share: share of tokens that an assistant's argmax
            predicts and the current base's does not. pseudo_label_agreement, head_auc: as in `head_measures`, for these
            labels. Without assistants only loss, and base_accuracy: share of tokens that are the base's argmax.
        """
        nll = token_nll(self.base_logprob, self.assistant_logprobs, self.defer_logits, objective)
        if not self.defer_logits.shape[-1]:
            return {"loss": nll.mean().item(), "base_accuracy": self.base_correct.float().mean().item()}
        labels = pseudo_labels(self.base_correct, self.assistant_correct, self.assistant_logprobs)
        if objective == "weak":
            nll = nll + label_nll(self.defer_logits, labels, WEAK_POSITIVE_WEIGHT) / 3
        deferring, (agreement, head_auc) = defer_probs(self.defer_logits), head_measures(self.defer_logits, labels)
        cost = deferral_cost(self.defer_logits, deferral_costs).item() if any(deferral_costs) else 0.0
        nlls = -self.assistant_logprobs.mean(0)
        names = ["assistant_nll"] if len(nlls) == 1 else [f"assistant_{k}_nll" for k in range(1, len(nlls) + 1)]
        return {
            "loss": nll.mean().item() + cost / len(nll),
            "base_nll": -self.base_logprob.mean().item(),
            **dict(zip(names, nlls.tolist(), strict=True)),
            "defer_prob": deferring.mean().item(),
            "deferral_rate": (deferring > 0.5).float().mean().item(),
            "pseudo_label_share": (labels != 0).float().mean().item(),
            "pseudo_label_agreement": agreement,
            "head_auc": head_auc,
        }
