"""AlpacaEval: answers for a judge of the user's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from collm.atomic import atomic_file
from collm.errors import DataError
from collm.evaluation.tasks.task import Task, TaskItem
from collm.training.data import load_records
from collm.training.formats import text_field


class AlpacaEval(Task):
    """AlpacaEval (the instructions of alpaca_eval.json: `instruction`, `output`, `generator`, `dataset`).

    It has no measures: `write_outputs` makes the file that its judge reads, and the judge is the user's to run.
    """

    name = "alpaca_eval"
    measure = None
    max_new_tokens = 2048
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


def write_outputs(path: Path, items: Sequence[TaskItem], texts: Sequence[str], generator: str) -> None:
    """Write the texts generated for the items as AlpacaEval reads a model's outputs.

    Args:
        generator: what the judge's table calls the model.

    Raises:
        DataError: not one text per item.
        WriteError: the disk refused; what was there is untouched.
    """
    if len(items) != len(texts):
        raise DataError(f"{len(texts)} texts for {len(items)} items, expected one for each, in one order")
    outputs = [
        {"instruction": item.prompt, "output": text, "generator": generator, **item.reference}
        for item, text in zip(items, texts, strict=True)
    ]
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(outputs, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
