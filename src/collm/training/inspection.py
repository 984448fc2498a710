"""What scores promise before any training: how often who is right, and what the best choice of author would reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from collm.errors import ArtefactError, ConfigError
from collm.training.labels import LabelReport, label_tokens
from collm.training.scores import Scores, ScoreSummary
from collm.training.store import ScoreStore


@dataclass(frozen=True)
class Agreement:
    """How often base and one assistant have a target token right, as shares of all; they sum to 1."""

    both: float
    base_only: float
    assistant_only: float
    neither: float


@dataclass(frozen=True)
class Inspection:
    """Scores of base and assistants 1..K side by side.

    Attributes:
        summaries: of the base and of each assistant.
        agreements: of the base with each assistant.
        labels: share of positives (variant "a").
        best_nll_nats, best_accuracy: if the author who gives each gold token most probability wrote it: what no
            deferral rule exceeds.
    """

    summaries: tuple[ScoreSummary, ...]
    agreements: tuple[Agreement, ...]
    labels: LabelReport
    best_nll_nats: float
    best_accuracy: float


def inspect_scores(directory: Path) -> Inspection:
    """Read the scores in `base`, `assistant-1`, .. of a directory and compare them.

    Raises:
        ArtefactError: the base's or all assistants' are missing, or some are incomplete or damaged.
        ConfigError: they are of different examples.
    """
    names = ["base"]
    while (directory / f"assistant-{len(names)}").is_dir():
        names.append(f"assistant-{len(names)}")
    if len(names) == 1:
        raise ArtefactError(f"{directory} holds no assistant-1; expected the scores of a run: base, assistant-1, ..")
    base, *assistants = (ScoreStore.opened(directory / name).collect() for name in names)
    return inspect(base, assistants)


def inspect(base: Scores, assistants: Sequence[Scores]) -> Inspection:
    """Compare scores of the same examples.

    Raises:
        ConfigError: no assistant, or scores of different examples.
    """
    if not assistants:
        raise ConfigError("an inspection needs the scores of at least one assistant, none came")
    labels = label_tokens(base, assistants).report()  # refuses scores of different examples
    authors = [base, *assistants]
    best = torch.stack([scores.logprobs for scores in authors]).amax(0)
    right = torch.stack([scores.corrects for scores in authors]).any(0)
    return Inspection(
        summaries=tuple(scores.summary() for scores in authors),
        agreements=tuple(_agreement(base, assistant) for assistant in assistants),
        labels=labels,
        best_nll_nats=-best.double().mean().item(),
        best_accuracy=right.double().mean().item(),
    )


def _agreement(base: Scores, assistant: Scores) -> Agreement:
    mine, theirs = base.corrects, assistant.corrects
    cases = (mine & theirs, mine & ~theirs, ~mine & theirs, ~mine & ~theirs)
    return Agreement(*(case.double().mean().item() for case in cases))
