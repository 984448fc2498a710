"""Calling tools: built-in ones in this process, user functions in a separate process with a time limit."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from collm.errors import LoadError, ToolFailure
from collm.tools import worker
from collm.tools.calculator import calculator
from collm.tools.lookup import Lookup
from collm.tools.spec import HOW_TO_FIND, ToolFunction, ToolSpec

START_SECONDS = 60.0
"""Time limit for importing the module of a user function."""
_QUOTED_CHARS = 80  # characters of the prefix in error messages

Answer = str | ToolFailure | None
"""The text that follows, None if the tool abstains, or the failure of the call."""
Tool = Callable[[str, Sequence[int]], list[Answer]]
"""A text and ends -> the answer to text[:end] for each end. A failed call does not affect the others."""


def open_tool(spec: ToolSpec) -> Tool:
    """Create the tool of a spec. Raises a LoadError for a function, and a DataError for a table."""
    if spec.is_user_function:
        return IsolatedTool(spec).answers
    return in_process(Lookup(spec.table) if spec.table else partial(calculator, plain=spec.argument != "marks"))


def in_process(function: ToolFunction) -> Tool:
    """Call a function that takes bounded time for any text."""
    return lambda text, ends: [function(text[:end]) for end in ends]


class IsolatedTool:
    """A user function in a separate process, so that it cannot hang this process or use its pipes.

    The process ends with this object. One that is lost is replaced.

    Raises:
        LoadError: the function cannot be imported.
    """

    def __init__(self, spec: ToolSpec) -> None:
        self.spec = spec
        self._start()

    def answers(self, text: str, ends: Sequence[int]) -> list[Answer]:
        answers: list[Answer] = []
        while len(answers) < len(ends):
            left = ends[len(answers) :]
            self._send({"text": text, "ends": list(left)})
            for end in left:
                reply = self._receive(self.spec.seconds)
                if isinstance(reply, dict):
                    prefix = text[:end] if end <= _QUOTED_CHARS else "..." + text[end - _QUOTED_CHARS : end]
                    reply = ToolFailure(f"{self.spec} {reply['failed']}; the text so far ends with {prefix!r}")
                answers.append(reply)
                if not self._stop.alive:
                    self._start()
                    break
        return answers

    def close(self) -> None:
        self._stop()

    def _start(self) -> None:
        self._buffer = b""
        command = [sys.executable, "-I", worker.__file__, self.spec.name]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._stop = weakref.finalize(self, _stop, self._process)
        self._send(sys.path)
        if (reply := self._receive(START_SECONDS)) is not None:
            self.close()
            raise LoadError(f"could not load {self.spec}: it {reply['failed']}; {HOW_TO_FIND}")

    def _send(self, content: object) -> None:
        self._unsent = memoryview(json.dumps(content).encode() + b"\n")

    def _receive(self, seconds: float) -> Any:
        """Send the rest of the request, and read the next reply of `worker`. A process without one is stopped."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        requests, replies = self._process.stdin.fileno(), self._process.stdout.fileno()
        deadline = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            poll = select.poll()
            poll.register(replies, select.POLLIN)
            if self._unsent:
                poll.register(requests, select.POLLOUT)
            left = deadline - time.monotonic()
            ready = dict(poll.poll(left * 1000)) if left > 0 else {}
            if not ready:
                self.close()
                return {"failed": f"did not answer within {seconds:g} s"}
            if requests in ready:
                try:
                    self._unsent = self._unsent[os.write(requests, self._unsent[: select.PIPE_BUF]) :]
                except BrokenPipeError:
                    self._unsent = memoryview(b"")  # the end of the replies reports the failure
            if replies in ready:
                piece = os.read(replies, 1 << 16)
                if not piece:
                    with suppress(subprocess.TimeoutExpired):
                        status = self._process.wait(left)
                        self.close()
                        return {"failed": f"ended its process with status {status}"}
                self._buffer += piece
        line, self._buffer = self._buffer.split(b"\n", 1)
        return json.loads(line)


def _stop(process: subprocess.Popen[bytes]) -> None:
    with process:  # closes the pipes and waits
        process.kill()
