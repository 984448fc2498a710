"""Run a server until it is stopped."""

from __future__ import annotations

import asyncio
import atexit
import gc
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Mapping
from functools import partial
from types import FrameType

import uvicorn
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # so named in all its versions

from collm.collaboration import CoLLM
from collm.errors import ConfigError, ToolFailure
from collm.serving.app import create_app
from collm.serving.connection import Connection, allow_connections, quiet_accept_errors
from collm.serving.settings import Settings

LOOPBACK = {"127.0.0.1", "::1", "localhost"}
_GRACE_S = 5


class Server(uvicorn.Server):
    """A uvicorn server that finishes running requests after the first signal. New requests get status 503.

    Args:
        models: the collaborations by model name.
        settings: settings of the app.
        host, port: the address to listen on; port 0 for a free one.
    """

    def __init__(self, models: Mapping[str, CoLLM], settings: Settings, *, host: str, port: int) -> None:
        app = create_app(models, settings)
        self.service = app.state.service
        self.service.on_failure = self._stop_now
        self._draining: asyncio.Task[None] | None = None
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
            timeout_graceful_shutdown=_GRACE_S,
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
            self._loop.call_soon_threadsafe(self.drain)
        else:
            super().handle_exit(sig, frame)

    def drain(self) -> None:
        """Begin to stop. Must be called in the event loop's thread."""
        self._draining = asyncio.ensure_future(self.service.drain())
        self._draining.add_done_callback(lambda _: self._stop_now())

    def _stop_now(self) -> None:
        self.should_exit = True


def run(
    models: Mapping[str, CoLLM], settings: Settings, *, host: str = "127.0.0.1", port: int = 8000, no_auth: bool = False
) -> None:
    """Serve until a signal.

    Args:
        no_auth: allow requests without an API key on addresses that other machines can reach.

    Raises:
        ConfigError: such an address without an API key.
        CollmError: the models cannot be loaded, or do not fit together.
    """
    check_address(host, settings, no_auth=no_auth)
    allow_connections(settings.max_connections)
    log_as_json(log_prompts=settings.log_prompts)
    server = Server(models, settings, host=host, port=port)
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


def log_as_json(*, log_prompts: bool = False) -> None:
    """Log JSON lines to stderr.

    Args:
        log_prompts: also log error messages of tools, which can quote prompts.
    """
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
        if record.name == "collm.serving.requests":
            return json.dumps({**line, **json.loads(record.getMessage())})
        line |= {"logger": record.name, "message": self._message(record)}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)

    def _message(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if self._log_prompts or not any(isinstance(one, ToolFailure) for one in record.args or ()):
            return message
        return (
            f"{message.partition(' ')[0]} failed; use --log-prompts for the error message, which can quote the prompt"
        )
