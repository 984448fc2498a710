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
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=_run_loop, args=(self._loop,), name="collm-http", daemon=True)
        thread.start()
        self._finalizer = weakref.finalize(self, _close, self._loop, thread, clients)

    def __enter__(self) -> LoopThread:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


def _close(loop: asyncio.AbstractEventLoop, thread: threading.Thread, clients: Sequence[HttpClient]) -> None:
    """Stop the loop and wait for its thread, unless the thread itself dropped the last reference."""

    async def stop() -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        try:
            await asyncio.gather(*tasks, return_exceptions=True)
            for client in clients:
                await client.__aexit__()
            await loop.shutdown_asyncgens()
        finally:
            loop.stop()

    asyncio.run_coroutine_threadsafe(stop(), loop)
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
