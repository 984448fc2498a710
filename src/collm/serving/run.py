"""Run a server until it is stopped. Its connections are limited in number, and in the time that a client may take."""

from __future__ import annotations

import asyncio
import atexit
import errno
import gc
import json
import logging
import math
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from types import FrameType
from typing import Any

import h11
import uvicorn
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # so named in all its versions
from uvicorn.protocols.http.h11_impl import H11Protocol

from collm.collaboration import CoLLM
from collm.errors import ConfigError, ToolFailure
from collm.serving.app import create_app
from collm.serving.middleware import REQUEST_LOG
from collm.serving.settings import Settings

LOOPBACK = {"127.0.0.1", "::1", "localhost"}
HEAD_S = 20.0
"""Time for the head of a request after its first byte, and for the first byte of a connection, in seconds."""
UNREAD_S = 60.0
"""Time for a client to read what fills the buffer of its connection, in seconds."""
OTHER_DESCRIPTORS = 256
"""Descriptors for everything but connections: files, libraries, tools, model servers."""
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_LOG_AGAIN_S = 60.0
_LOG = logging.getLogger(__name__)


class APIServer(uvicorn.Server):
    """A uvicorn server that finishes running requests after the first signal. New requests get status 503."""

    def __init__(self, models: Mapping[str, CoLLM], settings: Settings, *, host: str, port: int) -> None:
        app = create_app(models, settings)
        self.service = app.state.service
        self.service.on_failure = self._stop_now
        self._draining: Future[None] | None = None
        self._loop: asyncio.AbstractEventLoop
        config = uvicorn.Config(
            app,
            http=partial(Connection, max_connections=settings.max_connections),  # type: ignore[arg-type]
            ws="none",
            timeout_keep_alive=settings.keep_alive_s,
            host=host,
            port=port,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="on",
            timeout_graceful_shutdown=5,
        )
        super().__init__(config)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(quiet_accept_errors())
        try:
            await super().startup(sockets)
        except SystemExit as end:  # uvicorn's way to say that it cannot listen
            why = getattr(end.__context__, "strerror", None) or "uvicorn did not start"
            where = f"{self.config.host}:{self.config.port}"
            raise ConfigError(f"cannot listen on {where}: {why}; give another --host or --port") from end

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        for connection in list(self.server_state.connections):  # accepted while uvicorn closed the others
            connection.transport.abort()
        await asyncio.sleep(0.01)  # the event loop closes them

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._draining is None and self.started:
            self._draining = asyncio.run_coroutine_threadsafe(self._drain(), self._loop)
        else:
            super().handle_exit(sig, frame)

    async def _drain(self) -> None:
        await self.service.drain()
        self._stop_now()

    def _stop_now(self) -> None:
        self.should_exit = True


def run(
    models: Mapping[str, CoLLM], settings: Settings, *, host: str = "127.0.0.1", port: int = 8000, no_auth: bool = False
) -> None:
    """Serve until a signal. The address is as in `check_address`. Raises the CollmError of models that do not load."""
    check_address(host, settings, no_auth=no_auth)
    allow_connections(settings.max_connections)
    log_as_json(log_prompts=settings.log_prompts)
    server = APIServer(models, settings, host=host, port=port)
    gc.freeze()  # collections that a large body causes do not look at the libraries' objects
    try:
        server.run()
    finally:
        gc.unfreeze()
    if server.service.failure is not None:
        raise server.service.failure
    if any(thread.name.startswith("collm ") for thread in threading.enumerate()):
        atexit.register(os._exit, 0)  # Python's own end would wait for the native code that a thread still runs


def check_address(host: str, settings: Settings, *, no_auth: bool) -> None:
    """Raise a ConfigError for a public address without an API key, unless `no_auth` allows it."""
    if host not in LOOPBACK and settings.api_key is None and not no_auth:
        raise ConfigError(
            f"host is {host}, which others can reach, and there is no API key; give --api-key or COLLM_API_KEY, "
            "or --no-auth to allow requests without a key"
        )


class Connection(H11Protocol):
    """A connection. It is closed if there are too many, or if its client does not send or read in time."""

    def __init__(self, *, max_connections: int, **options: Any) -> None:
        super().__init__(**options)
        self._max_connections = max_connections
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._max_connections:
            transport.abort()
        else:
            self._expect("head", HEAD_S)

    def connection_lost(self, exc: Exception | None) -> None:
        self._came("head")
        self._came("reading")
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._came("head")
        elif "head" not in self._timers:
            self._expect("head", HEAD_S)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect("reading", UNREAD_S)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._came("reading")

    def _expect(self, what: str, seconds: float) -> None:
        self._timers[what] = self.loop.call_later(seconds, self.transport.abort)

    def _came(self, what: str) -> None:
        if timer := self._timers.pop(what, None):
            timer.cancel()


def allow_connections(count: int) -> None:
    """Raise the process's limit of descriptors, so that `count` connections leave some for everything else."""
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


def log_as_json(*, log_prompts: bool = False) -> None:
    """Log JSON lines to stderr. `log_prompts` includes the error messages of tools, which can quote prompts."""
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonLines(log_prompts))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger(httpx.__name__).setLevel(logging.WARNING)  # it says every request to a model's server


class _JsonLines(logging.Formatter):
    def __init__(self, log_prompts: bool) -> None:
        super().__init__()
        self._log_prompts = log_prompts

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)), "level": record.levelname}
        message = record.getMessage()
        if record.name == REQUEST_LOG.name:
            return json.dumps({**line, **json.loads(message)})
        if not self._log_prompts and any(isinstance(one, ToolFailure) for one in record.args or ()):
            tool = message.partition(" ")[0]
            message = f"{tool} failed; use --log-prompts for the error message, which can quote the prompt"
        line |= {"logger": record.name, "message": message}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)
