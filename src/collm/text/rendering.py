"""Rendering chat templates, which are untrusted programs, in processes with limits of time and memory.

A thread cannot interrupt them: one multiplication may run for hours in C code.
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

from collm.text import render_worker

LONGEST_RENDERING_S = 10.0
"""Time limit of a rendering in seconds."""
MOST_MEMORY_BYTES = 1 << 30
"""Memory limit of a rendering. It is not enforced on macOS."""
_PROCESSES = 4
"""Renderings at a time. A process is started when the others are busy, and kept."""

_Worker = subprocess.Popen[bytes]


def render(**arguments: Any) -> str:
    """Render one chat with the arguments of transformers' `render_jinja_template`, `conversations` being a list of one.

    Raises:
        ValueError: the template is invalid or rejects the chat, or a limit is exceeded.
        TypeError: an argument is not JSON.
    """
    request = json.dumps({"seconds": LONGEST_RENDERING_S, "arguments": arguments}, default=_as_json)
    workers = _workers(os.getpid())
    worker, reply = workers.get(), b""
    try:
        worker = worker or _start()
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
    if not answered:
        raise ValueError(_why(worker.returncode))
    outcome = json.loads(reply)
    if "failed" in outcome:
        raise ValueError(outcome["failed"])
    return str(outcome["text"])


@cache
def _workers(pid: int) -> queue.LifoQueue[_Worker | None]:
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


def _start() -> _Worker:
    path = [entry for entry in sys.path if os.path.isabs(entry)]  # the working directory may be a stranger's
    command = [sys.executable, "-I", render_worker.__file__, str(MOST_MEMORY_BYTES), json.dumps(path)]
    # A session of its own, so that Ctrl-C does not reach it. It ends with its input.
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)


def _why(status: int) -> str:
    if status == -signal.SIGALRM:
        return f"it took longer than {LONGEST_RENDERING_S:g} s"
    if status == render_worker.OUT_OF_MEMORY:
        return f"it needs more than {MOST_MEMORY_BYTES >> 20} MB of memory"
    return f"it ended its process with status {status}"


def _as_json(value: Any) -> Any:
    """What a template sees of a value that is not JSON: its content, or the name of its type, as in transformers."""
    if isinstance(value, Mapping):
        return dict(value)
    if callable(getattr(value, "model_dump", None)):
        return value.model_dump()
    return f"<{type(value).__name__}>"
