"""Calling tools: built-in ones in this process, user functions in a separate process with a time limit."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

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


class Tool(Protocol):
    """A tool that can be called."""

    def answers(self, text: str, ends: Sequence[int]) -> list[Answer]:
        """The answer to text[:end] for each end. A failed call does not affect the others."""
        ...

    def close(self) -> None: ...


def open_tool(spec: ToolSpec) -> Tool:
    """Create the tool of a spec.

    Raises:
        LoadError: its function cannot be imported.
        DataError: its table cannot be read.
    """
    if spec.foreign:
        return IsolatedTool(spec)
    if spec.table is not None:
        return BuiltInTool(Lookup(spec.table))
    return BuiltInTool(partial(calculator, plain=spec.argument != "marks"))


class BuiltInTool:
    """A built-in function, which takes bounded time for any text."""

    def __init__(self, function: ToolFunction) -> None:
        self._function = function

    def answers(self, text: str, ends: Sequence[int]) -> list[Answer]:
        return [self._function(text[:end]) for end in ends]

    def close(self) -> None:
        """Do nothing, because there are no resources to release."""


class IsolatedTool:
    """A user function in a separate process, so that it cannot hang this process or use its pipes.

    Args:
        spec: the spec of the function.

    Raises:
        LoadError: the function cannot be imported.
    """

    def __init__(self, spec: ToolSpec) -> None:
        self.spec = spec
        self._buffer = b""
        self._start()

    def answers(self, text: str, ends: Sequence[int]) -> list[Answer]:
        answers: list[Answer] = []
        while len(answers) < len(ends):
            self._send({"text": text, "ends": list(ends[len(answers) :])})
            while len(answers) < len(ends):
                prefix = text[: ends[len(answers)]]
                reply = self._receive(self.spec.seconds)
                if isinstance(reply, _Lost):
                    self.close()
                    self._start()
                    answers.append(self._failure(reply.why, prefix))
                    break
                answers.append(self._failure(reply["failed"], prefix) if isinstance(reply, dict) else reply)
        return answers

    def close(self) -> None:
        self._stop()

    def _failure(self, why: str, prefix: str) -> ToolFailure:
        quoted = prefix if len(prefix) <= _QUOTED_CHARS else "..." + prefix[-_QUOTED_CHARS:]
        return ToolFailure(f"{self.spec} {why}; the text so far ends with {quoted!r}")

    def _start(self) -> None:
        self._buffer = b""
        command = [sys.executable, "-I", worker.__file__, self.spec.name]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._stop = weakref.finalize(self, _stop, self._process)
        self._send(sys.path)
        reply = self._receive(START_SECONDS)
        if reply is not None:
            self.close()
            why = reply.why if isinstance(reply, _Lost) else reply["failed"]
            raise LoadError(f"could not load {self.spec}: it {why}; {HOW_TO_FIND}")

    def _send(self, content: object) -> None:
        self._unsent = memoryview(json.dumps(content).encode() + b"\n")

    def _receive(self, seconds: float) -> Any:
        """Send the rest of the request and read the next reply, or return `_Lost` with the reason why there is none."""
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
                return _Lost(f"did not answer within {seconds:g} s")
            if requests in ready:
                try:
                    self._unsent = self._unsent[os.write(requests, self._unsent[: select.PIPE_BUF]) :]
                except BrokenPipeError:
                    self._unsent = memoryview(b"")  # the end of the replies reports the failure
            if replies in ready:
                piece = os.read(replies, 1 << 16)
                if not piece:
                    with suppress(subprocess.TimeoutExpired):
                        return _Lost(f"ended its process with status {self._process.wait(left)}")
                self._buffer += piece
        line, self._buffer = self._buffer.split(b"\n", 1)
        return json.loads(line)


class _Lost:
    """A missing reply."""

    def __init__(self, why: str) -> None:
        self.why = why


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        pipe.close()
