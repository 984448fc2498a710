"""Evaluation tasks, a file each: what is asked, when an answer ends, and how it is scored."""

from __future__ import annotations

import inspect
from typing import Any

from collm.core.named import imported
from collm.errors import ConfigError
from collm.evaluation.tasks.gsm8k import Gsm8k
from collm.evaluation.tasks.rows import RowsTask
from collm.evaluation.tasks.task import Task

TASKS: dict[str, type[Task]] = {task.name: task for task in (Gsm8k, RowsTask)}


def task_named(name: str, **options: Any) -> Task:
    """Create a task of TASKS, or your own subclass of `Task` as "package.module:Class", with its options."""
    if name not in TASKS and ":" not in name:
        raise ConfigError(f"task is {name!r}, expected one of {', '.join(TASKS)}, or package.module:Class")
    kind = TASKS.get(name) or imported(name, "task")
    if not (isinstance(kind, type) and issubclass(kind, Task)):
        raise ConfigError(f"task {name!r} is {kind!r:.60}, expected a subclass of collm.evaluation.tasks.task.Task")
    known = list(inspect.signature(kind).parameters)
    if unknown := [option for option in options if option not in known]:
        raise ConfigError(f"task {name!r} has no option {unknown[0]!r}, expected {', '.join(known) or 'none'}")
    return kind(**options)
