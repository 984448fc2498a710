"""Tasks by name."""

from __future__ import annotations

import inspect
from typing import Any

from collm.errors import ConfigError
from collm.evaluation.tasks.alpaca_eval import AlpacaEval
from collm.evaluation.tasks.bioasq import Bioasq
from collm.evaluation.tasks.gsm8k import Gsm8k
from collm.evaluation.tasks.math import HendrycksMath
from collm.evaluation.tasks.multiple_choice import MultipleChoice
from collm.evaluation.tasks.rows import RowsTask
from collm.evaluation.tasks.task import Task

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Gsm8k, HendrycksMath, Bioasq, AlpacaEval, MultipleChoice, RowsTask)
}


def task_named(name: str, **options: Any) -> Task:
    """Create a task of TASKS with its options.

    Raises:
        ConfigError: an unknown task, an unknown option, or an invalid value.
        MissingExtra: a library that the task needs is not installed.
    """
    if name not in TASKS:
        raise ConfigError(f"task is {name!r}, expected one of {', '.join(TASKS)}")
    known = list(inspect.signature(TASKS[name]).parameters)
    for option in options:
        if option not in known:
            raise ConfigError(f"task {name!r} has no option {option!r}, expected {', '.join(known) or 'none'}")
    return TASKS[name](**options)
