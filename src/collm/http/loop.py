"""An event loop in a thread, for callers that are not coroutines."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from collm.errors import ConfigError
from collm.http.client import HttpClient

T = TypeVar("T")


class LoopThread:
    """An event loop in a thread of its own. When closed or garbage-collected, it closes the clients and ends."""

    def __init__(self, clients: Sequence[HttpClient] = ()) -> None:
        ready: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()
        thread = threading.Thread(target=asyncio.run, args=(_run(ready, clients),), name="collm-http", daemon=True)
        thread.start()
        self._loop, stopped = ready.result()
        self._finalizer = weakref.finalize(self, _close, self._loop, stopped, thread)

    def close(self) -> None:
        """Cancel running coroutines and end the thread. Further calls of this method do nothing."""
        self._finalizer()

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine in the loop. Raises a ConfigError if the loop was closed."""
        if not self._finalizer.alive:
            coroutine.close()
            raise ConfigError("the connections to the servers were closed; load the collaboration again")
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine as `start` does, and wait for its result. An interrupt cancels it."""
        future = self.start(coroutine)
        try:
            return future.result()
        finally:
            future.cancel()


async def _run(ready: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]], clients: Sequence[HttpClient]) -> None:
    stopped = asyncio.Event()
    ready.set_result((asyncio.get_running_loop(), stopped))
    await stopped.wait()
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for client in clients:
        await client.aclose()


def _close(loop: asyncio.AbstractEventLoop, stopped: asyncio.Event, thread: threading.Thread) -> None:
    """Stop the loop and wait for its thread, unless the thread itself dropped the last reference."""
    loop.call_soon_threadsafe(stopped.set)
    if threading.current_thread() is not thread:
        thread.join()


async def gather(coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Await all coroutines. The first exception cancels the others."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
