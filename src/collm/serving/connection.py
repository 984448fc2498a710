"""Connections of the server: how many there are, and how long a client may take to send a request and to read."""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import resource
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from collm.errors import ConfigError

HEAD_S = 20.0
"""Time for the head of a request after its first byte, and for the first byte of a connection, in seconds."""
UNREAD_S = 60.0
"""Time for a client to read what fills the buffer of its connection, in seconds."""
OTHER_DESCRIPTORS = 256
"""Descriptors for everything but connections: files, libraries, tools, model servers."""
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_LOG_AGAIN_S = 60.0
_LOG = logging.getLogger(__name__)


class Connection(H11Protocol):
    """A connection. It is closed if there are too many, or if its client does not send or read in time."""

    def __init__(self, *, max_connections: int, **options: Any) -> None:
        super().__init__(**options)
        self._max_connections = max_connections
        self._late: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._max_connections:
            transport.abort()
        else:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_awaiting()
        if self._unread is not None:
            self._unread.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_awaiting()
        elif self._late is None:
            self._await_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(UNREAD_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()

    def _await_head(self) -> None:
        self._late = self.loop.call_later(HEAD_S, self.transport.abort)

    def _stop_awaiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


def allow_connections(count: int) -> None:
    """Raise the process's limit of descriptors, so that `count` connections leave some for everything else.

    Raises:
        ConfigError: the system does not allow so many.
    """
    needed = count + OTHER_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ConfigError(
            f"max_connections is {count}, but the system allows {hard} open files, expected at least {needed}; lower "
            "it, or raise the limit (ulimit -n)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def quiet_accept_errors() -> Callable[[asyncio.AbstractEventLoop, dict[str, Any]], None]:
    """An exception handler of an event loop that logs once a minute that connections cannot be accepted."""
    logged = -math.inf

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal logged
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in _NO_ROOM:
            loop.default_exception_handler(context)
        elif loop.time() - logged > _LOG_AGAIN_S:
            logged = loop.time()
            _LOG.error("connections cannot be accepted: %s", error.strerror)

    return handle
