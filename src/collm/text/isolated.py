"""Processes for untrusted programs (chat templates and grammars), with limits of time and memory.

A thread cannot interrupt them: one multiplication may run for hours in C code, and native code may crash. Each process
runs this file as a script, so it imports nothing from collm.
"""

from __future__ import annotations

import atexit
import json
import os
import queue
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

_OUT_OF_MEMORY = 3
"""Exit status if a task exceeds the memory limit."""
STACK_BYTES = 2 << 20
"""Stack for the compiler. A thread of the server has more, so that what compiles here compiles there."""
_PROCESSES = 4
"""Processes per task. One is started when the others are busy, and kept."""

_Worker = subprocess.Popen[bytes]


def run(task: str, arguments: Mapping[str, Any], *, seconds: float, memory_bytes: int) -> Any:
    """Run "render" or "compile" and return its result. The memory limit is not enforced on macOS.

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
    if worker.returncode == _OUT_OF_MEMORY:
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
    while pid == os.getpid() and not workers.empty():  # not a fork of their process
        if worker := workers.get_nowait():
            _end(worker)


def _end(worker: _Worker) -> None:
    with suppress(BrokenPipeError), worker:
        worker.kill()


def _start(task: str, memory_bytes: int) -> _Worker:
    path = [entry for entry in sys.path if os.path.isabs(entry)]  # the working directory may be a stranger's
    command = [sys.executable, "-I", __file__, task, str(memory_bytes), json.dumps(path)]
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


def _renderer() -> Callable[..., Any]:
    """Render one chat, given the arguments of transformers' `render_jinja_template`."""
    from transformers.utils.chat_template_utils import render_jinja_template

    return lambda **arguments: render_jinja_template(**arguments)[0][0]


def _compiler() -> Callable[..., Any]:
    """Compile a grammar. The compiler in the server reports an invalid one."""
    from llguidance import LLMatcher, LLTokenizer

    def compile_grammar(source: str, tokenizer: str, vocab_size: int) -> None:
        matcher = LLMatcher(LLTokenizer(tokenizer, n_vocab=vocab_size, eos_token=0), source, log_level=0)
        if not matcher.is_error():
            matcher.compute_logit_bias()

    threading.stack_size(STACK_BYTES)
    thread = ThreadPoolExecutor(1)
    return lambda **arguments: thread.submit(compile_grammar, **arguments).result()


def _main() -> None:
    """The process: run the task for each request on stdin, as a JSON line, and reply on stdout.

    The kernel enforces both limits, because C code does not return to Python. At its limit, the process ends with
    SIGALRM or `_OUT_OF_MEMORY`.
    """
    sys.path[:] = json.loads(sys.argv[3])
    run = {"render": _renderer, "compile": _compiler}[sys.argv[1]]()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        most = used_bytes + int(sys.argv[2])
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    for line in sys.stdin:
        try:
            request = json.loads(line)
            signal.setitimer(signal.ITIMER_REAL, request["seconds"])
            reply = json.dumps({"result": run(**request["arguments"])})
        except MemoryError:
            os._exit(_OUT_OF_MEMORY)
        except Exception as error:
            reply = json.dumps({"failed": f"{error!s:.2000}"})
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(reply, flush=True)


if __name__ == "__main__":
    _main()
