"""The scores and costs of a system on a task, and a comparison of several in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from collm.collaboration import CoLLM
from collm.core.types import deferral_rate
from collm.evaluation.answers import Answer, AnswerFile
from collm.evaluation.intervals import Interval, paired_difference
from collm.evaluation.systems import COLLABORATION, System, short_names
from collm.evaluation.tasks.task import Task, TaskItem

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
    mine = answers[system.name]
    measured = {id_ for batch in file.batches for id_ in batch.ids}
    written = sum(len(answer.authors) for answer in mine if answer.id in measured)
    per_item = _usage_per_item(file)
    weights = {one.name: model.backend.weights_per_token(author) for author, one in enumerate(model.runners)}
    measure = None if system.name == COLLABORATION else task.main_measure(items)
    return SystemResult(
        name=system.name,
        num_items=len(items),
        measures=task.aggregate([(item, one.text, one.scores) for item, one in zip(items, mine, strict=True)]),
        difference=_difference(measure, mine, answers[COLLABORATION]),
        deferral_rate=deferral_rate([author for answer in mine for author in answer.authors]),
        models={system.called.get(name, name): used for name, used in per_item.items()},
        flops=sum(2.0 * weights[name] * used["tokens_read"] for name, used in per_item.items()),
        tokens_per_s=written / max(sum(batch.seconds for batch in file.batches), 1e-9),
        seconds=sum(answer.seconds for answer in mine) / len(mine),
    )


def _usage_per_item(file: AnswerFile) -> dict[str, dict[str, float]]:
    """The mean usage of each model. Models without usage are left out."""
    found = [(name, used) for batch in file.batches for name, used in batch.usage.items() if any(vars(used).values())]
    items = sum(len(batch.ids) for batch in file.batches)
    return {
        name: {key: sum(getattr(used, key) for other, used in found if other == name) / items for key in PER_ITEM}
        for name in dict.fromkeys(name for name, _ in found)
    }


def _difference(measure: str | None, mine: Sequence[Answer], theirs: Sequence[Answer]) -> Interval | None:
    name = measure or ""
    both = [(one.scores, other.scores) for one, other in zip(mine, theirs, strict=True)]
    pairs = [(one[name], other[name]) for one, other in both if name in one and name in other]
    return paired_difference(*map(list, zip(*pairs, strict=True))) if pairs else None


def verdict(task: str, measure: str | None, results: Sequence[SystemResult]) -> str:
    """Whether collaboration pays, or one model alone is the better choice, in sentences."""
    by_name = {result.name: result for result in results}
    own = by_name[COLLABORATION]
    if measure is None:
        return f"Task {task} gives no score by itself; outputs/ holds the answers of every system for its judge."
    score = own.measures[measure]
    parts = [
        f"The collaboration reaches {measure} {score.mean:.1%} ({score.low:.1%} to {score.high:.1%}) on "
        f"{own.num_items} items with {own.deferral_rate:.1%} of the tokens written by assistants."
    ]
    if "base" in by_name:
        parts.append(_against_base(by_name["base"]))
    assistants = [result for result in results if result.name.startswith("assistant")]
    parts += [_against_assistant(own, result) for result in assistants]
    short, seen = short_names(list(by_name)), {COLLABORATION, "base", *(result.name for result in assistants)}
    others = {short[name]: result for name, result in by_name.items() if name not in seen and not result.is_threshold}
    return " ".join([*parts, *_against_others(others)])


def _against_base(base: SystemResult) -> str:
    assert base.difference is not None
    if base.difference.high < 0:
        return f"It is better than the base alone by {_points(base.difference, -1)}."
    if base.difference.low > 0:
        return f"The base alone is better, by {_points(base.difference, 1)}, and cheaper: use it alone."
    return (
        f"The base alone cannot be told from it (difference {_points(base.difference, -1)}) and is cheaper: of the "
        "two, on this evidence, the base alone is the better choice."
    )


def _against_assistant(own: SystemResult, other: SystemResult) -> str:
    assert other.difference is not None
    cost = own.flops / other.flops if other.flops else float("nan")
    speed = own.tokens_per_s / other.tokens_per_s if other.tokens_per_s else float("nan")
    costs = f"{cost:.2f} times its FLOPs, {speed:.2f} times its tokens per second"
    if other.difference.low > 0:
        found = f"The {other.name} alone is better by {_points(other.difference, 1)}; the collaboration takes {costs}"
    else:
        known = "is better than" if other.difference.high < 0 else "cannot be told from"
        points = _points(other.difference, -1)
        found = f"The collaboration {known} the {other.name} alone (difference {points}) and takes {costs}"
    is_worse = not cost < 1 if other.difference.low > 0 else other.difference.high >= 0 and cost >= 1
    return f"{found}{f': of the two the {other.name} alone is the better choice' if is_worse else ''}."


def _against_others(others: Mapping[str, SystemResult]) -> list[str]:
    found = {name: result.difference for name, result in others.items() if result.difference is not None}
    groups = {
        "is better than": [name for name, one in found.items() if one.high < 0],
        "cannot be told from": [name for name, one in found.items() if one.low <= 0 <= one.high],
        "is worse than": [name for name, one in found.items() if one.low > 0],
    }
    parts = [f"{how} {_listed(names)}" for how, names in groups.items() if names]
    return [f"The collaboration {'; it '.join(parts)}."] if parts else []


def _listed(names: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _points(difference: Interval, sign: int) -> str:
    """A difference in percentage points with its interval; `sign` -1 reverses it."""
    mean, low, high = (100 * sign * end + 0.0 for end in (difference.mean, difference.low, difference.high))  # no -0.0
    return f"{mean:+.1f} points ({min(low, high):+.1f} to {max(low, high):+.1f})"
