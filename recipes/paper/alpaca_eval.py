"""AlpacaEval: answers for an external judge."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from collm.evaluation.tasks.task import Task, TaskItem
from collm.training.data import load_records
from collm.training.formats import text_field


class AlpacaEval(Task):
    """AlpacaEval (the instructions of alpaca_eval.json: `instruction`, `output`, `generator`, `dataset`).

    The task has no measures. `outputs` is the input of the external judge.
    """

    name = "alpaca_eval"
    measure = None
    max_tokens = 2048
    split = "eval"
    format = None

    def read(self, source: str | Path, split: str | None) -> list[TaskItem]:
        records = load_records(source, split=split)
        return [
            TaskItem(str(n), text_field(where, record, "instruction"), {"dataset": record.get("dataset")}, where)
            for n, (where, record) in enumerate(records, 1)
        ]

    def score(self, item: TaskItem, text: str) -> dict[str, float]:
        return {}

    def outputs(self, items: Sequence[TaskItem], texts: Sequence[str], system: str) -> list[dict[str, Any]]:
        """A system's outputs in AlpacaEval's format. `system` is its name in the judge's table."""
        return [
            {"instruction": item.prompt, "output": text, "generator": system, **item.reference}
            for item, text in zip(items, texts, strict=True)
        ]
