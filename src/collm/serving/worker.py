"""The decoding loop of a collaboration in a thread of its own, controlled from an event loop."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

from collm.collaboration import CoLLM
from collm.core.types import TokenStep
from collm.engine.chunks import Chunks
from collm.engine.engine import DecodingLoop, RequestOutput
from collm.engine.request import Request
from collm.errors import CollmError, ModelFailure
from collm.serving.errors import APIError, not_now, of_failure
from collm.serving.settings import Settings

_LOG = logging.getLogger(__name__)

T = TypeVar("T")


class Worker:
    """Runs the requests of one collaboration. Its models are loaded in the worker's thread.

    Attributes:
        ready: whether the models are loaded.
        accepting: False when the server is stopping.
        outstanding: number of unfinished requests and jobs.
        commands: functions to run in the worker's thread before the next step; None ends the thread.
        waiting, running: requests, as a submission and an index in it; running ones by their number in the engine.
    """

    def __init__(self, name: str, model: CoLLM, settings: Settings) -> None:
        self.name = name
        self.model = model
        self.ready = False
        self.accepting = True
        self.outstanding = 0
        self.commands: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self.waiting: deque[tuple[Submission, int]] = deque()
        self.running: dict[int, tuple[Submission, int]] = {}
        self._max_batch = settings.max_batch
        self._max_outstanding = settings.max_batch + settings.max_waiting
        self._loop: asyncio.AbstractEventLoop
        self._on_failure: Callable[[Exception], None]
        self._thread = threading.Thread(target=self._run, name=f"collm {name}", daemon=True)
        self._engine: DecodingLoop
        self._jobs: deque[tuple[Chunks[Any], list[Any], Future[Any]]] = deque()

    # For the event loop's thread

    def start(self, on_failure: Callable[[Exception], None]) -> None:
        """Load the models and accept requests. `on_failure` is called in this event loop if the thread fails."""
        self._loop, self._on_failure = asyncio.get_running_loop(), on_failure
        self._thread.start()

    def check_open(self) -> None:
        """Raise an APIError if the models are not loaded yet or the server is stopping."""
        if not self.accepting:
            raise not_now(503, "the server is stopping; send the request to another server", "stopping")
        if not self.ready:
            raise not_now(503, f"the models of {self.name} are still being loaded; try again soon", "loading", 5)

    def submit(self, requests: Sequence[Request]) -> Submission:
        """Queue requests. An APIError says that the queue is full, or why the worker is not open."""
        self._admit(len(requests))
        submission = Submission(requests, self)
        self.commands.put(lambda: self.waiting.extend((submission, index) for index in range(len(requests))))
        return submission

    async def collect(self, chunks: Chunks[T]) -> list[T]:
        """Compute all items of a generator of chunks, a chunk after each decoding step. Errors are as for `submit`."""
        self._admit(1)
        future: Future[list[T]] = Future()
        self.commands.put(lambda: self._jobs.append((chunks, [], future)))
        try:
            return await asyncio.wrap_future(future)
        except CollmError as error:
            raise of_failure(error, self.name) from error
        finally:
            self.outstanding -= 1

    def stop(self, seconds: float) -> None:
        """Stop the thread after its current step, and wait for it for some time. It does not keep the process alive."""
        self.commands.put(None)
        self._thread.join(seconds)

    def _admit(self, count: int) -> None:
        self.check_open()
        if self.outstanding + count > self._max_outstanding:
            message = f"the queue is full: {self.outstanding} requests are running or waiting; try again later"
            raise not_now(429, message, "queue_full")
        self.outstanding += count

    # In the worker's thread

    def cancel(self, submission: Submission) -> None:
        for waiting in [one for one in self.waiting if one[0] is submission]:
            self.waiting.remove(waiting)
        for number in [number for number, one in self.running.items() if one[0] is submission]:
            self._engine.cancel(number)
            del self.running[number]

    def _run(self) -> None:
        try:
            self._engine = self.model.engine(self._max_batch)
            self.model.tokenizer(" ")  # the first call initializes it; later calls are concurrent
            self.ready = True
            while self._run_commands():
                self._fill()
                if self.running:
                    self._step()
                self._work()
            self._engine.close()
        except Exception as error:
            self.ready = False
            _LOG.exception("the worker of %s ended", self.name)
            self._call(self._on_failure, error)

    def _run_commands(self) -> bool:
        """Run the commands of the event loop. Wait for one if there is no other work. False to end."""
        while not self.commands.empty() or not (self.running or self.waiting or self._jobs):
            command = self.commands.get()
            if command is None:
                return False
            command()
        return True

    def _fill(self) -> None:
        while self.waiting and len(self.running) < self._max_batch:
            submission, index = self.waiting.popleft()
            try:
                number = self._engine.add(submission.requests[index])
            except CollmError as error:
                self._call(submission.receive, index, RequestOutput(-1, failure=error))
            else:
                self.running[number] = submission, index

    def _step(self) -> None:
        try:
            outputs = self._engine.step()
        except BaseException:  # a panic of native code is no Exception
            _LOG.exception("the decoding loop of %s broke down; its %d requests fail", self.name, len(self.running))
            failure = ModelFailure("the decoding loop broke down")
            outputs = [RequestOutput(number, failure=failure) for number in self.running]
            self._engine.close()
            self._engine = self.model.engine(self._max_batch)
        delivered = [(*self.running[output.number], output) for output in outputs if output.number in self.running]
        for output in outputs:
            if output.completion is not None or output.failure is not None:
                self.running.pop(output.number, None)
        if delivered:
            self._call(_deliver, delivered)

    def _work(self) -> None:
        """Compute a chunk of the next job whose client still waits."""
        while self._jobs:
            chunks, items, future = job = self._jobs.popleft()
            if future.cancelled():
                continue
            try:
                items += next(chunks)
                self._jobs.append(job)
            except StopIteration:
                if future.set_running_or_notify_cancel():
                    future.set_result(items)
            except BaseException as error:
                if future.set_running_or_notify_cancel():
                    future.set_exception(without_panic(error))
            return

    def _call(self, callback: Callable[..., None], *arguments: object) -> None:
        """Call a function in the event loop, unless the loop has ended."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback, *arguments)


def _deliver(delivered: Sequence[tuple[Submission, int, RequestOutput]]) -> None:
    """Deliver all outputs of a step, so that the event loop wakes once."""
    for submission, index, output in delivered:
        submission.receive(index, output)


def without_panic(error: BaseException) -> Exception:
    """The exception itself, or one that describes a panic of native code, which is no Exception."""
    return error if isinstance(error, Exception) else RuntimeError(f"{type(error).__name__}: {error}")


@dataclass
class Part:
    """Tokens of a completion: all, or those of a chunk. With the last token there is OpenAI's finish reason."""

    index: int
    steps: list[TokenStep] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def text(self) -> str:
        return "".join(step.text for step in self.steps)


class Submission:
    """Requests that begin and end together, or whose completions end without a token if nothing `generates`.

    Methods must be called in the event loop's thread.

    Attributes:
        unfinished: number of running and waiting requests.
        authors: the authors of all tokens so far.
        first_at, last_at: `time.perf_counter()` of the first and the latest token.
    """

    def __init__(self, requests: Sequence[Request], worker: Worker, *, generates: bool = True) -> None:
        self.requests = requests
        self.unfinished = len(requests) if generates else 0
        self.authors: list[int] = []
        self.first_at: float | None = None
        self.last_at = 0.0
        self._worker = worker
        self._parts = {} if generates else {n: Part(n, finish_reason="length") for n in range(len(requests))}
        self._failure: APIError | None = None
        self._arrived = asyncio.Event()

    @property
    def ended(self) -> bool:
        """Whether all requests are finished and their tokens taken."""
        return not (self.unfinished or self._parts or self._failure)

    async def wait(self, seconds: float | None = None) -> None:
        """Wait for new tokens or the end, for at most `seconds`. Raise the APIError of a failed request."""
        if self.unfinished and not self._failure:
            timer = seconds and asyncio.get_running_loop().call_later(seconds, self._arrived.set)
            await self._arrived.wait()
            if timer:
                timer.cancel()
        self._arrived.clear()
        if self._failure is not None:
            raise self._failure

    def take(self) -> list[Part]:
        """The tokens since the last call, by completion."""
        parts, self._parts = self._parts, {}
        return [parts[index] for index in sorted(parts)]

    def receive(self, index: int, output: RequestOutput) -> None:
        """Handle an output of the engine. A failure ends all requests."""
        if not self.unfinished:
            return
        self._arrived.set()
        if output.failure is not None:
            self._failure = of_failure(output.failure, self._worker.name)
            self.close()
            return
        assert output.step is not None
        part = self._parts.setdefault(index, Part(index))
        part.steps.append(output.step)
        self.authors.append(output.step.author)
        self.last_at = time.perf_counter()
        self.first_at = self.first_at or self.last_at
        if output.completion is not None:
            ended = output.completion.finish_reason
            part.finish_reason = "stop" if ended == "eos" else ended
            self._release(1)

    def close(self) -> None:
        """Drop the unfinished requests. Their slots are free before the next step."""
        if self.unfinished:
            self._release(self.unfinished)
            self._worker.commands.put(partial(self._worker.cancel, self))

    def _release(self, count: int) -> None:
        self.unfinished -= count
        self._worker.outstanding -= count
