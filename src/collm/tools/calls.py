"""Calling tools: built-in ones in this process, user functions in a separate process with a time limit."""

from __future__ import annotations

import json
import socket
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

    The process ends with this object. One that is lost is replaced. A LoadError if the function cannot be imported.
    """

    def __init__(self, spec: ToolSpec) -> None:
        self.spec = spec
        self._start()

    def answers(self, text: str, ends: Sequence[int]) -> list[Answer]:
        answers: list[Answer] = []
        while len(answers) < len(ends):
            left = ends[len(answers) :]
            request: object = {"text": text, "ends": list(left)}
            for end in left:
                reply, request = self._reply(self.spec.seconds, request), None
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
        self._socket, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-I", worker.__file__, self.spec.name]
            process = self._process = subprocess.Popen(command, stdin=theirs.fileno(), stdout=theirs.fileno())
        self._stop = weakref.finalize(self, _stop, process, self._socket)
        if (reply := self._reply(START_SECONDS, sys.path)) is not None:
            self.close()
            raise LoadError(f"could not load {self.spec}: it {reply['failed']}; {HOW_TO_FIND}")

    def _reply(self, seconds: float, request: object = None) -> Any:
        """Send a request, if given, and read the next reply of `worker`. A process without one is stopped."""
        deadline = time.monotonic() + seconds
        try:
            self._socket.settimeout(seconds)
            with suppress(ConnectionError):  # the end of the replies reports the failure
                self._socket.sendall(b"" if request is None else json.dumps(request).encode() + b"\n")
            while b"\n" not in self._buffer:
                self._socket.settimeout(max(deadline - time.monotonic(), 1e-3))
                piece = b""
                with suppress(ConnectionResetError):
                    piece = self._socket.recv(1 << 16)
                if not piece:
                    status = self._process.wait(max(deadline - time.monotonic(), 0))
                    self.close()
                    return {"failed": f"ended its process with status {status}"}
                self._buffer += piece
        except (TimeoutError, subprocess.TimeoutExpired):
            self.close()
            return {"failed": f"did not answer within {seconds:g} s"}
        line, self._buffer = self._buffer.split(b"\n", 1)
        return json.loads(line)


def _stop(process: subprocess.Popen[bytes], connection: socket.socket) -> None:
    connection.close()
    process.kill()
    process.wait()
