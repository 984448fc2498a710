"""Analysis of scores before training: accuracy of each author, their agreement, and the best choice of author."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from collm.core.types import author_name
from collm.errors import ArtefactError, ConfigError
from collm.training.labels import LabelReport, label_tokens
from collm.training.scores import Scores, ScoreSummary
from collm.training.store import ScoreStore


@dataclass(frozen=True)
class Agreement:
    """Shares of target tokens that base and an assistant predict correctly; they sum to 1."""

    both: float
    base_only: float
    assistant_only: float
    neither: float


@dataclass(frozen=True)
class Inspection:
    """Comparison of the scores of base and assistants 1..K.

    Attributes:
        summaries: summary of the base and of each assistant.
        agreements: agreement of the base with each assistant.
        labels: share of positive pseudo-labels (variant "a").
        best_nll_nats, best_accuracy: upper bound of any deferral rule, reached if the author that gives each gold
            token the most probability writes it.
    """

    summaries: tuple[ScoreSummary, ...]
    agreements: tuple[Agreement, ...]
    labels: LabelReport
    best_nll_nats: float
    best_accuracy: float


def inspect_scores(directory: Path) -> Inspection:
    """Compare the scores in the subdirectories `base`, `assistant`, `assistant-2`, .. of a directory.

    Raises:
        ArtefactError: scores are missing, incomplete or damaged.
        ConfigError: the scores are of different examples.
    """
    names = ["base"]
    while (directory / author_name(len(names))).is_dir():
        names.append(author_name(len(names)))
    if len(names) == 1:
        raise ArtefactError(f"{directory} has no assistant; expected the scores of a run: base, assistant, ..")
    base, *assistants = (ScoreStore.opened(directory / name).collect() for name in names)
    return inspect(base, assistants)


def inspect(base: Scores, assistants: Sequence[Scores]) -> Inspection:
    """Compare scores of the same examples.

    Raises:
        ConfigError: there is no assistant, or the scores are of different examples.
    """
    if not assistants:
        raise ConfigError("an inspection needs the scores of at least one assistant, got none")
    labels = label_tokens(base, assistants).report()  # raises if the scores are of different examples
    authors = [base, *assistants]
    best = torch.stack([scores.logprobs for scores in authors]).amax(0)
    correct = torch.stack([scores.corrects for scores in authors]).any(0)
    agreements = []
    for ours, theirs in ((base.corrects, assistant.corrects) for assistant in assistants):
        cases = (ours & theirs, ours & ~theirs, ~ours & theirs, ~ours & ~theirs)
        agreements.append(Agreement(*(case.double().mean().item() for case in cases)))
    return Inspection(
        summaries=tuple(scores.summary() for scores in authors),
        agreements=tuple(agreements),
        labels=labels,
        best_nll_nats=-best.double().mean().item(),
        best_accuracy=correct.double().mean().item(),
    )
