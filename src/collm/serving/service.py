"""Start, drain and stop the workers of a server."""

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
    """The workers of all collaborations. Methods must be called in the event loop's thread.

    Attributes:
        started: start time, seconds since 1970.
        failure: the exception of a failed worker. `on_failure` is called then.
    """

    def __init__(self, models: Mapping[str, CoLLM], settings: Settings) -> None:
        self.settings = settings
        self.collaborations = Collaborations(models, settings)
        self.started = int(time.time())
        self.failure: Exception | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self._workers = [one.worker for one in self.collaborations.served]

    def start(self) -> None:
        """Load the models of each collaboration in its worker's thread."""
        for worker in self._workers:
            worker.start(self._failed)

    async def drain(self) -> None:
        """Reject new requests, and wait until running requests finish or the drain time is over."""
        for worker in self._workers:
            worker.accepting = False
        end = time.monotonic() + self.settings.drain_s
        while time.monotonic() < end and any(worker.outstanding for worker in self._workers):
            await asyncio.sleep(_LOOK_S)
        self._fail_all()

    async def stop(self) -> None:
        """Drain and stop all workers."""
        await self.drain()
        for worker in self._workers:
            await asyncio.to_thread(worker.stop)

    def _failed(self, error: Exception) -> None:
        self.failure = self.failure or error
        self._fail_all()
        self.on_failure()

    def _fail_all(self) -> None:
        for worker in self._workers:
            for submission in list(worker.submissions):
                submission.fail(not_now(503, "the server stopped before the request was finished", "stopping"))
