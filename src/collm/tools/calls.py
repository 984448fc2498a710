"""Calling a tool: built-in ones here, a user's function in a process of its own that a time limit can end."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

from collm.errors import LoadError, ToolFailure
from collm.tools import worker
from collm.tools.calculator import calculator
from collm.tools.date import date
from collm.tools.lookup import Lookup
from collm.tools.spec import HOW_TO_FIND, ToolFunction, ToolSpec

START_SECONDS = 60.0
"""Time limit for importing a user's module."""
_SHOWN = 80  # characters of the prefix that a failure quotes

Answer = str | ToolFailure | None
"""What follows; None where the tool does not know; or why it could not say."""


class Tool(Protocol):
    """A tool that can be called."""

    def answers(self, text: str, ends: Sequence[int]) -> list[Answer]:
        """Its answer to text[:end] for each end; a call that fails leaves the others alone."""
        ...

    def close(self) -> None: ...


def open_tool(spec: ToolSpec) -> Tool:
    """The tool, ready to be called.

    Raises:
        LoadError: a function that cannot be imported.
        DataError: a table that cannot be read.
    """
    if spec.foreign:
        return IsolatedTool(spec)
    if spec.table is not None:
        return BuiltInTool(Lookup(spec.table))
    if spec.name == "date":
        return BuiltInTool(date)
    return BuiltInTool(partial(calculator, plain=spec.argument != "marks"))


class BuiltInTool:
    """A function of ours, which is bounded in time whatever the text."""

    def __init__(self, function: ToolFunction) -> None:
        self._function = function

    def answers(self, text: str, ends: Sequence[int]) -> list[Answer]:
        return [self._function(text[:end]) for end in ends]

    def close(self) -> None:
        """Nothing to give back."""


class IsolatedTool:
    """A user's function in another process: it cannot hang this one, nor write to its files.

    Args:
        spec: names the function.

    Raises:
        LoadError: it cannot be imported.
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
        shown = prefix if len(prefix) <= _SHOWN else "..." + prefix[-_SHOWN:]
        return ToolFailure(f"{self.spec} {why}; the text so far ends with {shown!r}")

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
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(content).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # reading the reply tells

    def _receive(self, seconds: float) -> Any:
        """The next reply, or what became of it."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                return _Lost(f"gave no answer within {seconds:g} s")
            piece = os.read(self._process.stdout.fileno(), 1 << 16)
            if not piece:
                return _Lost(f"ended its process with status {self._process.wait()}")
            self._buffer += piece
        line, self._buffer = self._buffer.split(b"\n", 1)
        return json.loads(line)


class _Lost:
    """A reply that never came."""

    def __init__(self, why: str) -> None:
        self.why = why


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        pipe.close()
