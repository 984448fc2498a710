"""The scores and costs of a system on a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from collm.collaboration import CoLLM
from collm.core.types import ModelUsage, deferral_rate
from collm.evaluation.answers import Answer, Answers
from collm.evaluation.intervals import Interval, paired_difference
from collm.evaluation.systems import COLLABORATION, System
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


def result_of(
    system: System,
    model: CoLLM,
    task: Task,
    items: Sequence[TaskItem],
    answers: Mapping[str, Sequence[Answer]],
    found: Answers,
) -> SystemResult:
    """The result of a system.

    Args:
        model: the collaboration that the system decoded with.
        items: the answered items.
        answers: the answers of each system in the order of the items, including this system and the collaboration.
        found: this system's answers with their costs.
    """
    mine = answers[system.name]
    measured = sum(len(batch.ids) for batch in found.batches)
    tokens = {
        name: {key: getattr(used, key) / max(measured, 1) for key in PER_ITEM} for name, used in _usage(found).items()
    }
    by_batch = {id_ for batch in found.batches for id_ in batch.ids}
    written = sum(len(answer.authors) for answer in mine if answer.id in by_batch)
    return SystemResult(
        name=system.name,
        num_items=len(items),
        measures=task.aggregate([(item, one.text, one.scores) for item, one in zip(items, mine, strict=True)]),
        difference=None
        if system.name == COLLABORATION
        else _difference(task.main_measure(items), mine, answers[COLLABORATION]),
        deferral_rate=deferral_rate([author for answer in mine for author in answer.authors]),
        models={system.called.get(name, name): used for name, used in tokens.items()},
        flops=sum(_flops(model, name) * used["tokens_read"] for name, used in tokens.items()),
        tokens_per_s=written / max(sum(batch.seconds for batch in found.batches), 1e-9),
        seconds=sum(answer.seconds for answer in mine) / len(mine),
    )


def _usage(found: Answers) -> dict[str, ModelUsage]:
    """The usage of each model over all batches. Models without usage are left out."""
    total: dict[str, ModelUsage] = {}
    for batch in found.batches:
        for name, used in batch.usage.items():
            before = total.get(name, ModelUsage())
            total[name] = ModelUsage(*(getattr(before, key) + value for key, value in asdict(used).items()))
    return {name: used for name, used in total.items() if any(asdict(used).values())}


def _flops(model: CoLLM, name: str) -> float:
    """FLOPs per token read: two for each weight outside the input embedding."""
    author = [runner.name for runner in model.runners].index(name)
    return 2.0 * model.backend.weights_per_token(author)


def _difference(measure: str | None, mine: Sequence[Answer], theirs: Sequence[Answer]) -> Interval | None:
    """The paired difference over the items that have the main measure."""
    pairs = [
        (one.scores[measure], other.scores[measure])
        for one, other in zip(mine, theirs, strict=True)
        if measure is not None and measure in one.scores and measure in other.scores
    ]
    return paired_difference(*map(list, zip(*pairs, strict=True))) if pairs else None
