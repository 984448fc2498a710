"""The scores and costs of a system on a task, and a comparison of several in words."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any

from collm.collaboration import CoLLM
from collm.core.types import deferral_rate
from collm.evaluation.answers import Answer, AnswerFile
from collm.evaluation.intervals import Interval, paired_difference
from collm.evaluation.systems import COLLABORATION, System, short_names
from collm.evaluation.tasks.task import Task, TaskItem

DIFFERENCES_NOTE = "Each difference has its own 95 % interval. Of systems that do not differ, about 1 in 20 seems to."
PER_ITEM = ("tokens_read", "tokens_written", "forward_passes", "calls")


@dataclass(frozen=True)
class SystemResult:
    """The result of one system.

    Attributes:
        measures: the task's measures, each with its 95 % interval.
        difference: this system's main measure minus the collaboration's, paired by item; None for the collaboration.
        deferral_rate: share of the generated tokens that assistants wrote.
        models: for each model, per item: tokens read and written, forward passes, calls of a tool.
        flops: per item, estimated as 2 x parameters (without the input embedding) x tokens read, summed over models.
        tokens_per_s: generated tokens per second in batches of `max_batch`.
        seconds: mean time per item from the start of its batch to its last token.
        rejected: share of the generated tokens that a judge put in place of the base's.
    """

    name: str
    num_items: int
    measures: dict[str, Interval]
    difference: Interval | None
    deferral_rate: float
    models: dict[str, dict[str, float]]
    flops: float
    tokens_per_s: float
    seconds: float
    rejected: float = 0.0

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> SystemResult:
        """Read the output of `dataclasses.asdict`."""
        measures = {name: Interval(**found) for name, found in content["measures"].items()}
        difference = None if content["difference"] is None else Interval(**content["difference"])
        return cls(**{**content, "measures": measures, "difference": difference})

    @property
    def is_threshold(self) -> bool:
        """Whether the system is the collaboration at another threshold, which only a curve shows."""
        return self.name.startswith("threshold=")

    @property
    def is_author(self) -> bool:
        """Whether the system is the base or an assistant alone."""
        return self.name.partition("-")[0] in ("base", "assistant")

    def work(self) -> list[tuple[str, ...]]:
        """The name of each model, and its tokens read, tokens written and forward passes per item, as texts."""
        return [(model, *(f"{used[key]:,.1f}" for key in PER_ITEM[:3])) for model, used in self.models.items()]


def result_of(
    system: System,
    model: CoLLM,
    task: Task,
    items: Sequence[TaskItem],
    answers: Mapping[str, Sequence[Answer]],
    file: AnswerFile,
) -> SystemResult:
    """The result of a system, from the answers of all systems so far to these items, and its own with their costs."""
    mine, ours, measure = answers[system.name], answers[COLLABORATION], task.main_measure(items) or ""
    measured = {id_ for batch in file.batches for id_ in batch.ids}
    written = sum(len(answer.authors) for answer in mine if answer.id in measured)
    totals = defaultdict[str, Counter[str]](Counter)
    for name, used in (pair for batch in file.batches for pair in batch.usage.items()):
        totals[name].update(used)
    per_item = {
        name: {key: total[key] / len(measured) for key in PER_ITEM}
        for name, total in totals.items()
        if any(total.values())
    }
    weights = {one.name: model.backend.weights_per_token(author) for author, one in enumerate(model.runners)}
    both = [(one.scores, other.scores) for one, other in zip(mine, ours, strict=True)]
    pairs = [(one[measure], other[measure]) for one, other in both if measure in one and measure in other]
    is_other = system.name != COLLABORATION
    return SystemResult(
        name=system.name,
        num_items=len(items),
        measures=task.aggregate([(item, one.text, one.scores) for item, one in zip(items, mine, strict=True)]),
        difference=paired_difference(*map(list, zip(*pairs, strict=True))) if pairs and is_other else None,
        deferral_rate=deferral_rate([author for answer in mine for author in answer.authors]),
        models={system.called.get(name, name): used for name, used in per_item.items()},
        flops=sum(2.0 * weights[name] * used["tokens_read"] for name, used in per_item.items()),
        tokens_per_s=written / max(sum(batch.seconds for batch in file.batches), 1e-9),
        seconds=sum(answer.seconds for answer in mine) / len(mine),
        rejected=sum(answer.rejected for answer in mine) / max(sum(len(answer.authors) for answer in mine), 1),
    )


def verdict(task: str, measure: str | None, results: Sequence[SystemResult]) -> str:
    """Whether collaboration pays, or one model alone is the better choice, in sentences."""
    if measure is None:
        return f"Task {task} has no score of its own; outputs/ contains the answers of every system for a judge."
    own, *others = results
    score = own.measures[measure]
    parts = [
        f"The collaboration reaches {measure} {score.mean:.1%} ({score.low:.1%} to {score.high:.1%}) on "
        f"{own.num_items} items with {own.deferral_rate:.1%} of the tokens written by assistants."
    ]
    short = short_names([other.name for other in others])
    groups = defaultdict[str, list[str]](list)
    for other in others:
        if other.difference is None or other.is_threshold:
            continue
        is_worse, is_better = other.difference.low > 0, other.difference.high < 0
        how = "is worse than" if is_worse else "is better than" if is_better else "does not differ significantly from"
        if other.is_author:
            parts.append(f"The collaboration {how} {_alone(own, other, other.difference)}.")
        else:
            groups[how].append(short[other.name])
    if groups:
        parts.append(f"The collaboration {'; it '.join(f'{how} {_listed(names)}' for how, names in groups.items())}.")
    return " ".join(parts)


def _alone(own: SystemResult, other: SystemResult, difference: Interval) -> str:
    """An author alone, with the collaboration's lead over it in percentage points and its cost in comparison."""
    lead, low, high = (0.0 - 100 * end for end in (difference.mean, difference.high, difference.low))  # no -0.0
    cost, speed = own.flops / (other.flops or nan), own.tokens_per_s / (other.tokens_per_s or nan)
    is_better = difference.high >= 0 and not cost < 1
    return (
        f"the {other.name} alone (difference {lead:+.1f} points ({low:+.1f} to {high:+.1f})) and takes {cost:.2f} "
        f"times its FLOPs, {speed:.2f} times its tokens per second"
        f"{f': of the two the {other.name} alone is the better choice' if is_better else ''}"
    )


def _listed(names: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
