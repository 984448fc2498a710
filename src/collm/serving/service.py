"""Start, drain and stop the workers of a server."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

from collm.collaboration import CoLLM
from collm.serving.collaborations import Collaborations
from collm.serving.errors import APIError, not_now
from collm.serving.settings import Settings
from collm.serving.worker import settle

T = TypeVar("T")

MAX_THREADS = 8
"""Largest number of threads that encode prompts and compile grammars."""
STOP_S = 5.0
"""Time for the current step of a worker when the server stops."""
_LOOK_S = 0.05


class Service:
    """The workers of all collaborations. Methods must be called in the event loop's thread.

    Attributes:
        started: start time, seconds since 1970.
        requests: one future for each running HTTP request. The request ends with the error that is set.
        failure: the exception of a failed worker. `on_failure` is called then.
    """

    def __init__(self, models: Mapping[str, CoLLM], settings: Settings) -> None:
        self.settings = settings
        self.collaborations = Collaborations(models, settings)
        self.started = int(time.time())
        self.requests: set[asyncio.Future[APIError]] = set()
        self.failure: Exception | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self._workers = [one.worker for one in self.collaborations.served]
        self._free_threads = asyncio.Semaphore(MAX_THREADS)

    def start(self) -> None:
        """Load the models of each collaboration in its worker's thread."""
        for worker in self._workers:
            worker.start(self._failed)

    async def in_thread(self, function: Callable[[], T]) -> T:
        """Run a function in a thread, which does not keep the process alive.

        Raises:
            Exception: the exception of the function.
        """
        await self._free_threads.acquire()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def run() -> None:
            result: Any = None
            error: BaseException | None = None
            try:
                result = function()
            except BaseException as raised:
                error = raised
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._free_threads.release)
                loop.call_soon_threadsafe(settle, future, result, error)

        threading.Thread(target=run, name="collm request", daemon=True).start()
        return await future

    async def drain(self) -> None:
        """Reject new requests, and wait until running requests finish or the drain time is over."""
        for worker in self._workers:
            worker.accepting = False
        end = time.monotonic() + self.settings.drain_s
        while time.monotonic() < end and self.requests:
            await asyncio.sleep(_LOOK_S)
        self._end_all()

    async def stop(self) -> None:
        """Drain and stop all workers."""
        await self.drain()
        for worker in self._workers:
            await self.in_thread(partial(worker.stop, STOP_S))

    def _failed(self, error: Exception) -> None:
        self.failure = self.failure or error
        self._end_all()
        self.on_failure()

    def _end_all(self) -> None:
        for request in self.requests:
            if not request.done():
                request.set_result(not_now(503, "the server stopped before the request was finished", "stopping"))
