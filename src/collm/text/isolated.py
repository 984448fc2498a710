"""Processes for untrusted programs (chat templates and grammars), with limits of time and memory.

A thread cannot interrupt them: one multiplication may run for hours in C code, and native code may crash.
"""

from __future__ import annotations

import atexit
import json
import os
import queue
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from typing import Any

from collm.text import isolated_worker

_PROCESSES = 4
"""Processes per task. One is started when the others are busy, and kept."""

_Worker = subprocess.Popen[bytes]


def run(task: str, *, seconds: float, memory_bytes: int, **arguments: Any) -> Any:
    """Run a task of `isolated_worker` and return its result. The memory limit is not enforced on macOS.

    Raises:
        ValueError: the task fails, ends its process or exceeds a limit.
        TypeError: an argument is not JSON.
    """
    request = json.dumps({"seconds": seconds, "arguments": arguments}, default=_as_json)
    workers = _workers(task, memory_bytes, os.getpid())
    worker, reply = workers.get(), b""
    try:
        worker = worker or _start(task, memory_bytes)
        assert worker.stdin is not None
        assert worker.stdout is not None
        with suppress(BrokenPipeError):
            worker.stdin.write(request.encode() + b"\n")
            worker.stdin.flush()
        reply = worker.stdout.readline()  # comes in time, as the process ends itself at the time limit
    finally:
        answered = reply.endswith(b"\n")
        if worker is not None and not answered:
            _end(worker)
        workers.put(worker if answered else None)
    if answered:
        outcome = json.loads(reply)
        if "failed" in outcome:
            raise ValueError(outcome["failed"])
        return outcome["result"]
    if worker.returncode == -signal.SIGALRM:
        raise ValueError(f"it took longer than {seconds:g} s")
    if worker.returncode == isolated_worker.OUT_OF_MEMORY:
        raise ValueError(f"it needs more than {memory_bytes >> 20} MB of memory")
    raise ValueError(f"it ended its process with status {worker.returncode}")


@cache
def _workers(task: str, memory_bytes: int, pid: int) -> queue.LifoQueue[_Worker | None]:
    """The idle processes of this process, None for those that are not started. A forked process has its own."""
    workers: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
    for _ in range(_PROCESSES):
        workers.put(None)
    atexit.register(_end_all, workers, pid)
    return workers


def _end_all(workers: queue.LifoQueue[_Worker | None], pid: int) -> None:
    if pid == os.getpid():  # not a fork of their process
        for worker in [workers.get_nowait() for _ in range(workers.qsize())]:
            if worker is not None:
                _end(worker)


def _end(worker: _Worker) -> None:
    with suppress(BrokenPipeError), worker:
        worker.kill()


def _start(task: str, memory_bytes: int) -> _Worker:
    path = [entry for entry in sys.path if os.path.isabs(entry)]  # the working directory may be a stranger's
    command = [sys.executable, "-I", isolated_worker.__file__, task, str(memory_bytes), json.dumps(path)]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,  # it ends with its input
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},  # the arenas of threads would count as its memory
        start_new_session=True,  # so that Ctrl-C does not reach it
    )


def _as_json(value: Any) -> Any:
    """What a template sees of a value that is not JSON: its content, or the name of its type, as in transformers."""
    if isinstance(value, Mapping):
        return dict(value)
    if callable(getattr(value, "model_dump", None)):
        return value.model_dump()
    return f"<{type(value).__name__}>"
