"""A server's collaborations from start to stop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

from collm.collaboration import CoLLM
from collm.serving.collaborations import Collaborations
from collm.serving.errors import not_now
from collm.serving.settings import Settings

_LOOK_S = 0.05


class Service:
    """The workers of all collaborations. All methods are for the event loop's thread.

    Attributes:
        started: seconds since 1970.
        failure: what ended a worker, if something did; `on_failure` is called then.
    """

    def __init__(self, models: Mapping[str, CoLLM], settings: Settings) -> None:
        self.settings = settings
        self.collaborations = Collaborations(models, settings)
        self.started = int(time.time())
        self.failure: Exception | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self._workers = [one.worker for one in self.collaborations.served]

    def start(self) -> None:
        """Load the models, each collaboration's in its own thread."""
        for worker in self._workers:
            worker.start(self._failed)

    async def drain(self) -> None:
        """Take no new requests, and wait until those that run are finished, or are out of time."""
        for worker in self._workers:
            worker.accepting = False
        end = time.monotonic() + self.settings.drain_s
        while time.monotonic() < end and any(worker.outstanding for worker in self._workers):
            await asyncio.sleep(_LOOK_S)
        for worker in self._workers:
            for submission in list(worker.submissions):
                submission.fail(not_now(503, "the server stopped before the request was finished", "stopping"))

    async def stop(self) -> None:
        """Drain, and end the threads."""
        await self.drain()
        for worker in self._workers:
            await asyncio.to_thread(worker.stop)

    def _failed(self, error: Exception) -> None:
        self.failure = self.failure or error
        for worker in self._workers:
            for submission in list(worker.submissions):
                submission.fail(not_now(503, "the server stopped before the request was finished", "stopping"))
        self.on_failure()
