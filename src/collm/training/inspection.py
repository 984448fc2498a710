"""Analysis of scores: pseudo-labels and the best choice of author before training, and measures of a head's choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from collm.core.head import author_logprobs, defer_probs
from collm.core.objective import PseudoLabelVariant, deferral_cost, marginal_logprobs, pseudo_labels
from collm.core.types import author_name
from collm.errors import ArtefactError, ConfigError
from collm.training.scores import Scores, ScoreSummary, load_scores

LOW_SHARE = 0.01
MOSTLY_BETTER = 0.75  # share of tokens at which an assistant is better, from which training needs a deferral cost


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
                f"an assistant gives {self.better:.0%} of the tokens more probability than the base does, so the head "
                "learns to defer nearly everywhere unless you set deferral_cost, for example to 1"
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


@dataclass(frozen=True)
class Inspection:
    """Comparison of the scores of base and assistants 1..K, with shares of their pseudo-labels (variant "a").

    Attributes:
        agreements: for each assistant, the shares of target tokens that both predict correctly, only the base, only the
            assistant, and neither; they sum to 1.
        best_nll_nats, best_accuracy: upper bound of any deferral rule, reached if the author that gives each gold
            token the most probability writes it.
    """

    summaries: tuple[ScoreSummary, ...]
    agreements: tuple[tuple[float, ...], ...]
    labels: LabelReport
    best_nll_nats: float
    best_accuracy: float


def inspect_scores(directory: Path) -> Inspection:
    """Compare the scores in the subdirectories `base`, `assistant`, `assistant-2`, .. of a directory."""
    names = ["base"]
    while (directory / (name := author_name(len(names)))).is_dir():
        names.append(name)
    if len(names) == 1:
        raise ArtefactError(f"{directory} has no assistant; expected the scores of a run: base, assistant, ..")
    base, *assistants = authors = [load_scores(directory / name) for name in names]
    _, labels = label_tokens(base, assistants)
    best = torch.stack([scores.logprobs for scores in authors]).amax(0)
    correct = torch.stack([scores.corrects for scores in authors]).any(0)
    ours, agreements = base.corrects, []
    for theirs in (assistant.corrects for assistant in assistants):
        cases = (ours & theirs, ours & ~theirs, ~ours & theirs, ~ours & ~theirs)
        agreements.append(tuple(case.double().mean().item() for case in cases))
    summaries = tuple(scores.summary() for scores in authors)
    bound = -best.double().mean().item(), correct.double().mean().item()
    return Inspection(summaries, tuple(agreements), labels, *bound)


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

    def measures(self, deferral_costs: Sequence[float] = ()) -> dict[str, float]:
        """Means over the tokens. The costs, in nats per token of each assistant, are part of the loss.

        Returns:
            loss: marginal NLL in nats, plus the deferral costs. base_nll and assistant_nll (assistant_1_nll, ..): NLL
            of each model alone. defer_prob. deferral_rate: share of tokens deferred at threshold 0.5.
            pseudo_label_share: share of tokens that an assistant's argmax predicts and the current base's does not.
            pseudo_label_agreement, head_auc: as in `head_measures`, for these labels.
        """
        marginal = marginal_logprobs(self.base_logprob, self.assistant_logprobs, self.defer_logits)
        labels = pseudo_labels(self.base_correct, self.assistant_correct, self.assistant_logprobs)
        deferring, (agreement, head_auc) = defer_probs(self.defer_logits), head_measures(self.defer_logits, labels)
        cost = deferral_cost(self.defer_logits, deferral_costs).item() if any(deferral_costs) else 0.0
        nlls = -self.assistant_logprobs.mean(0)
        names = ["assistant_nll"] if len(nlls) == 1 else [f"assistant_{k}_nll" for k in range(1, len(nlls) + 1)]
        return {
            "loss": -marginal.mean().item() + cost / len(marginal),
            "base_nll": -self.base_logprob.mean().item(),
            **dict(zip(names, nlls.tolist(), strict=True)),
            "defer_prob": deferring.mean().item(),
            "deferral_rate": (deferring > 0.5).float().mean().item(),
            "pseudo_label_share": (labels != 0).float().mean().item(),
            "pseudo_label_agreement": agreement,
            "head_auc": head_auc,
        }
