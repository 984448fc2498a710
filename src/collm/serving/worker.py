"""The decoding loop of a collaboration in a thread of its own, controlled from an event loop, and what it is asked."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from collm.collaboration import CoLLM
from collm.core.types import TokenStep
from collm.engine.chunks import Chunks
from collm.engine.engine import DecodingLoop, RequestOutput
from collm.engine.request import Request
from collm.errors import CollmError, ModelFailure
from collm.serving.errors import APIError, not_now, of_failure

_LOG = logging.getLogger(__name__)

T = TypeVar("T")


class Worker:
    """Runs the requests of one collaboration.

    Args:
        name: name of the collaboration.
        model: the collaboration. Its models are loaded in the worker's thread.
        max_batch: maximum number of requests decoded at once.
        max_waiting: maximum number of waiting requests.

    Attributes:
        ready: the models are loaded.
        accepting: False when the server is stopping.
        outstanding: number of unfinished requests and jobs.
    """

    def __init__(self, name: str, model: CoLLM, *, max_batch: int, max_waiting: int) -> None:
        self.name = name
        self.model = model
        self.max_batch = max_batch
        self.max_waiting = max_waiting
        self.ready = False
        self.accepting = True
        self.outstanding = 0
        self._loop: asyncio.AbstractEventLoop
        self._on_failure: Callable[[Exception], None]
        self._thread = threading.Thread(target=self._run, name=f"collm {name}", daemon=True)
        self._changed = threading.Condition()
        self._commands: list[Callable[[], None]] = []
        self._stopped = False
        self._engine: DecodingLoop
        self._waiting: deque[tuple[Submission, int]] = deque()
        self._running: dict[int, tuple[Submission, int]] = {}
        self._jobs: deque[_Job[Any]] = deque()

    @property
    def waiting(self) -> int:
        """Number of waiting requests."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Number of running requests."""
        return len(self._running)

    # For the event loop's thread

    def start(self, on_failure: Callable[[Exception], None]) -> None:
        """Load the models and accept requests. `on_failure` is called in this event loop if the thread fails."""
        self._loop, self._on_failure = asyncio.get_running_loop(), on_failure
        self._thread.start()

    def submit(self, requests: Sequence[Request]) -> Submission:
        """Queue requests.

        Raises:
            APIError: the queue is full, the models are not loaded yet, or the server is stopping.
        """
        self._admit(len(requests))
        submission = Submission(requests, self)
        self._do(lambda: self._waiting.extend((submission, index) for index in range(len(requests))))
        return submission

    def drop(self, submission: Submission) -> None:
        """Drop the unfinished requests of a submission."""
        self.outstanding -= submission.unfinished
        submission.unfinished = 0
        self._do(lambda: self._cancel(submission))

    def finish(self, submission: Submission) -> None:
        """Count a finished request of a submission."""
        self.outstanding -= 1
        submission.unfinished -= 1

    async def collect(self, chunks: Chunks[T]) -> list[T]:
        """Compute all items of a generator of chunks, a chunk after each decoding step.

        Raises:
            APIError: as for `submit`, or a failure of the generator.
        """
        self._admit(1)
        job = _Job(chunks, self._loop.create_future())
        self._do(lambda: self._jobs.append(job))
        try:
            return await job.future
        except CollmError as error:
            raise of_failure(error, self.name) from error
        finally:
            self.outstanding -= 1

    def stop(self, seconds: float) -> None:
        """Stop the thread after its current step, and wait for it for some time. It does not keep the process alive."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join(seconds)

    def check_open(self) -> None:
        """Raise an APIError if the models are not loaded yet or the server is stopping."""
        if not self.accepting:
            raise not_now(503, "the server is stopping; send the request to another server", "stopping")
        if not self.ready:
            raise not_now(503, f"the models of {self.name} are still being loaded; try again soon", "loading", 5)

    def _admit(self, count: int) -> None:
        self.check_open()
        if self.outstanding + count > self.max_batch + self.max_waiting:
            raise not_now(
                429,
                f"the queue is full: {self.outstanding} requests are running or waiting; try again later",
                "queue_full",
            )
        self.outstanding += count

    def _do(self, command: Callable[[], None]) -> None:
        with self._changed:
            self._commands.append(command)
            self._changed.notify()

    # In the worker's thread

    def _run(self) -> None:
        try:
            self._engine = self.model.engine(self.max_batch)
            self.model.tokenizer(" ")  # the first call initializes it; later calls are concurrent
            self.ready = True
            while self._obey():
                self._fill()
                if self._running:
                    self._step()
                self._work()
            self._engine.close()
        except Exception as error:
            self.ready = False
            _LOG.exception("the worker of %s ended", self.name)
            self._call(self._on_failure, error)

    def _obey(self) -> bool:
        """Run the commands of the event loop. Wait for them if there is no other work. False to end."""
        with self._changed:
            while not (self._commands or self._running or self._waiting or self._jobs or self._stopped):
                self._changed.wait()
            commands, self._commands = self._commands, []
        for command in commands:
            command()
        return not self._stopped

    def _fill(self) -> None:
        while self._waiting and len(self._running) < self.max_batch:
            submission, index = self._waiting.popleft()
            try:
                number = self._engine.add(submission.requests[index])
            except CollmError as error:
                self._call(submission.receive, index, RequestOutput(-1, failure=error))
            else:
                self._running[number] = submission, index

    def _step(self) -> None:
        try:
            outputs = self._engine.step()
        except BaseException:  # a panic of native code is no Exception
            _LOG.exception("the decoding loop of %s broke down; its %d requests fail", self.name, len(self._running))
            failure = ModelFailure("the decoding loop broke down")
            outputs = [RequestOutput(number, failure=failure) for number in self._running]
            self._engine.close()
            self._engine = self.model.engine(self.max_batch)
        delivered = [(*self._running[output.number], output) for output in outputs if output.number in self._running]
        for output in outputs:
            if output.completion is not None or output.failure is not None:
                self._running.pop(output.number, None)
        if delivered:
            self._call(_deliver, delivered)

    def _cancel(self, submission: Submission) -> None:
        self._waiting = deque(one for one in self._waiting if one[0] is not submission)
        for number in [number for number, one in self._running.items() if one[0] is submission]:
            self._engine.cancel(number)
            del self._running[number]

    def _work(self) -> None:
        """Compute a chunk of the next job whose client still waits."""
        while self._jobs:
            job = self._jobs.popleft()
            if job.future.done():
                continue
            try:
                job.items += next(job.chunks)
            except StopIteration:
                self._call(settle, job.future, job.items, None)
            except BaseException as error:
                self._call(settle, job.future, None, error)
            else:
                self._jobs.append(job)
            return

    def _call(self, callback: Callable[..., None], *arguments: object) -> None:
        """Call a function in the event loop, unless the loop has ended."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback, *arguments)


class _Job(Generic[T]):
    """A generator of chunks, the items so far, and the future of all items."""

    def __init__(self, chunks: Chunks[T], future: asyncio.Future[list[T]]) -> None:
        self.chunks = chunks
        self.future = future
        self.items: list[T] = []


def _deliver(delivered: Sequence[tuple[Submission, int, RequestOutput]]) -> None:
    """Deliver all outputs of a step, so that the event loop wakes once."""
    for submission, index, output in delivered:
        submission.receive(index, output)


def settle(future: asyncio.Future[T], result: T, error: BaseException | None) -> None:
    """Set the result or the exception of a future, unless it was cancelled. A panic of native code is no Exception."""
    if future.done():
        return
    if error is not None:
        future.set_exception(
            error if isinstance(error, Exception) else RuntimeError(f"{type(error).__name__}: {error}")
        )
    else:
        future.set_result(result)


@dataclass(frozen=True)
class TokenOutput:
    """A token of request number `index` of a submission. The last token has a `finish_reason`."""

    index: int
    step: TokenStep
    finish_reason: str | None


class Submission:
    """Requests that begin and end together. Methods must be called in the event loop's thread.

    Attributes:
        requests: the requests by index.
        unfinished: number of running and waiting requests.
    """

    def __init__(self, requests: Sequence[Request], owner: Worker) -> None:
        self.requests = requests
        self.unfinished = len(requests)
        self._owner = owner
        self._outputs: list[TokenOutput] = []
        self._failure: APIError | None = None
        self._arrived = asyncio.Event()

    async def outputs(self, seconds: float | None = None) -> list[TokenOutput] | None:
        """Wait for new tokens.

        Returns:
            All tokens since the last call, none if all requests are finished; None if nothing came within `seconds`.

        Raises:
            APIError: the submission failed.
        """
        if self.unfinished or self._failure:
            timer = seconds and asyncio.get_running_loop().call_later(seconds, self._arrived.set)
            await self._arrived.wait()
            if timer:
                timer.cancel()
        self._arrived.clear()
        outputs, self._outputs = self._outputs, []
        if self._failure is not None:
            raise self._failure
        return outputs if outputs or not self.unfinished else None

    def fail(self, error: APIError) -> None:
        """End the requests with an error. Their slots are free before the next step."""
        if self.unfinished:
            self._failure = error
            self._arrived.set()
            self.close()

    def close(self) -> None:
        """Drop the unfinished requests."""
        if self.unfinished:
            self._owner.drop(self)

    def receive(self, index: int, output: RequestOutput) -> None:
        """Handle an output of the engine."""
        if not self.unfinished:
            return
        if output.failure is not None:
            self.fail(of_failure(output.failure, self._owner.name))
            return
        assert output.step is not None
        finish_reason = output.completion.finish_reason if output.completion else None
        self._outputs.append(TokenOutput(index, output.step, finish_reason))
        self._arrived.set()
        if finish_reason is not None:
            self._owner.finish(self)
