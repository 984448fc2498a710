"""Analysis of scores before training: pseudo-labels, accuracy of each author, and the best choice of author."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from collm.core.objective import PseudoLabelVariant, pseudo_labels
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
        return (
            f"pseudo-labels give {self.share:.2%} of {self.num_tokens} target tokens to an assistant{each}: {meaning}"
        )


def label_tokens(
    base: Scores, assistants: Sequence[Scores], variant: PseudoLabelVariant = "a"
) -> tuple[Tensor, LabelReport]:
    """Pseudo-labels of all target tokens (`core.objective.pseudo_labels`) from scores of the base and assistants 1..K.

    They are in the order of the examples, 0 for the base, 1..K for the assistants, int64, shape (M,).
    """
    if not assistants:
        raise ConfigError("pseudo-labels need the scores of at least one assistant, got none")
    for number, scores in enumerate(assistants, start=1):
        if scores.fingerprint != base.fingerprint:
            raise ConfigError(
                f"{author_name(number)} was scored on other examples ({scores.fingerprint[:12]}) than the base "
                f"({base.fingerprint[:12]}); score both on the same data"
            )
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
    while (directory / author_name(len(names))).is_dir():
        names.append(author_name(len(names)))
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
    return Inspection(
        summaries=tuple(scores.summary() for scores in authors),
        agreements=tuple(agreements),
        labels=labels,
        best_nll_nats=-best.double().mean().item(),
        best_accuracy=correct.double().mean().item(),
    )
