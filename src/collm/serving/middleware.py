"""ASGI middleware: request record, API key, size limit of the body, and handling of unexpected errors."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import uuid
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

from collm.serving.errors import DISCONNECTED, APIError, broken
from collm.serving.request_log import Metrics, Record
from collm.serving.settings import Settings

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_LOG = logging.getLogger(__name__)

OPEN_PATHS = {"/", "/health", "/ready"}
"""Paths without authentication."""
UNRECORDED = {"/health", "/ready", "/metrics"}
"""Probes and metrics, which are neither logged nor counted."""


class RequestMiddleware:
    """ASGI middleware.

    Args:
        app: the next ASGI app.
        settings: API key, time limit and size limit.
        metrics: counts the requests.
        routes: paths with metrics of their own.
    """

    def __init__(self, app: App, settings: Settings, metrics: Metrics, routes: Collection[str]) -> None:
        self.app = app
        self.settings = settings
        self.metrics = metrics
        self.routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"]
        record = Record(uuid.uuid4().hex, path if path in self.routes else "other")
        scope["collm.record"] = record
        try:
            await self._pass_on(scope, receive, send, record)
        finally:
            if path not in UNRECORDED:
                self.metrics.count(record)
                record.log()

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send, record: Record) -> None:
        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = record.status or message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", record.id.encode())]
            await send(message)

        try:
            self._check_key(scope)
            body = await self._body(receive)
            if body is None:
                record.status = DISCONNECTED
                return
            await self.app(scope, _replayed(body, receive), noting)
        except APIError as error:
            await send_error(error, noting)
        except Exception:
            _LOG.exception("request %s failed", record.id)
            if record.status:
                raise
            await send_error(broken(), noting)

    async def _body(self, receive: Receive) -> bytes | None:
        """The whole body; None if the client disconnected."""
        seconds = self.settings.time_limit_s
        try:
            return await asyncio.wait_for(_whole(receive, self.settings.max_body_bytes), seconds)
        except asyncio.TimeoutError as error:
            message = f"the request body was not received within {seconds:g} s; send it again"
            raise APIError(408, message, code="body_timeout") from error

    def _check_key(self, scope: Scope) -> None:
        key = self.settings.api_key
        if key is None or scope["path"] in OPEN_PATHS:
            return
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        if not hmac.compare_digest(given, b"Bearer " + key.encode()):
            fault = "the request has another one" if given else "the request has none"
            raise APIError(
                401,
                f"this server needs its API key as 'Authorization: Bearer KEY', and {fault}",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


async def send_error(error: APIError, send: Send) -> None:
    """Send an error response."""
    content = json.dumps(error.content).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(content)), **error.headers}
    listed = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": listed})
    await send({"type": "http.response.body", "body": content})


async def _whole(receive: Receive, most: int) -> bytes | None:
    """The whole body; None if the client disconnected.

    Raises:
        APIError: the body is longer than `most` bytes.
    """
    parts, length = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        length += len(parts[-1])
        if length > most:
            raise APIError(413, f"the request body is longer than {most} bytes; send less", code="body_too_large")
        if not message.get("more_body"):
            return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that first gives the body that was already read."""
    rest = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return rest.pop() if rest else await receive()

    return again
