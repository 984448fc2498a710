"""Rows with prompts and completions, scored by a metric."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from collm.evaluation.metrics import metric_named, try_metric
from collm.evaluation.tasks.task import Task, TaskItem
from collm.training.data import Row, load_rows


@dataclass(frozen=True)
class RowsTask(Task):
    """Prompts with completions, or chats that end with an assistant turn.

    Measures: the metric of the generated text and the row's completion.

    Attributes:
        metric: a name from `metrics.METRICS`, or a Python function "package.module:function".
        prompt_field, completion_field: names of the two fields.
        max_tokens, stop: the end of an answer, as in `collm train` and `collm calibrate`.
    """

    metric: str = "exact_match"
    prompt_field: str = "prompt"
    completion_field: str = "completion"
    max_tokens: int = 256
    stop: tuple[str, ...] = ()

    name = "rows"
    format = "rows"

    def __post_init__(self) -> None:
        metric_named(self.metric)

    @property
    def measure(self) -> str:
        return self.metric

    def rows(self, source: str | Path, split: str | None) -> list[Row]:
        rows = load_rows(source, split=split, prompt_field=self.prompt_field, completion_field=self.completion_field)
        try_metric(self.metric, rows[0].completion)
        return rows

    def score(self, item: TaskItem, text: str) -> dict[str, float]:
        return {self.metric: metric_named(self.metric)(text, item.reference)}
