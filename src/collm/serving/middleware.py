"""ASGI middleware: who may ask, the limits of a request, and the end of everything that is done for it."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import logging
import uuid
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from contextlib import suppress
from typing import Any

from collm.serving.errors import DISCONNECTED, APIError, broken, invalid
from collm.serving.request_log import Metrics, Record
from collm.serving.service import Service

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_LOG = logging.getLogger(__name__)

OPEN_PATHS = {"/", "/health", "/ready"}
"""Paths that anybody may ask, under any name of this server."""
UNRECORDED = {"/health", "/ready", "/metrics"}
"""Probes and metrics, which are neither logged nor counted."""
BYTES_PER_VALUE = 32
"""A body has at most one list, object or key for so many bytes of its maximum size. More take seconds to parse."""
_READING_S = 1.0
"""Time for the client to read the end of a stream."""


class RequestMiddleware:
    """ASGI middleware. It owns the work of each request, which ends at the time limit or when the client leaves.

    Args:
        app: the next ASGI app.
        service: its settings limit requests. It can end all of them.
        metrics: counts the requests.
        routes: paths with metrics of their own.
    """

    def __init__(self, app: App, service: Service, metrics: Metrics, routes: Collection[str]) -> None:
        self.app = app
        self.service = service
        self.settings = service.settings
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
            if record.submission is not None:
                record.submission.close()
            if path not in UNRECORDED:
                self.metrics.count(record)
                record.log()

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send, record: Record) -> None:
        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = record.status or message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", record.id.encode())]
            await send(message)
            record.answered = message["type"] == "http.response.body" and not message.get("more_body")

        deadline = asyncio.get_running_loop().time() + self.settings.time_limit_s
        try:
            self._check_headers(scope)
            body = await self._body(receive)
            if body is None:
                record.status = DISCONNECTED
                return
            working = asyncio.ensure_future(self.app(scope, _replayed(body, receive), noting))
            if error := await self._interruption(working, receive, record, deadline):
                await _end(error, noting, record)
        except APIError as error:
            await send_error(error, noting)
        except RecursionError:  # parsing allows some hundred levels more than what is done with the result
            await send_error(invalid("the request body is nested too deeply; use fewer levels"), noting)
        except Exception:
            _LOG.exception("request %s failed", record.id)
            if record.status:
                raise
            await send_error(broken(), noting)

    async def _interruption(
        self, working: asyncio.Future[None], receive: Receive, record: Record, deadline: float
    ) -> APIError | None:
        """Wait for the work. Stop it, and say why, if the client leaves, the time is over or the service ends it."""
        leaving = asyncio.ensure_future(_disconnected(receive))
        ended: asyncio.Future[APIError] = asyncio.get_running_loop().create_future()
        self.service.requests.add(ended)
        try:
            left = deadline - asyncio.get_running_loop().time()
            anything: set[asyncio.Future[Any]] = {working, leaving, ended}
            await asyncio.wait(anything, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if working.done() or record.answered:
                await working
                return None
        finally:
            self.service.requests.discard(ended)
            leaving.cancel()
            working.cancel()
        with suppress(asyncio.CancelledError):
            await working
        if leaving.done() and not leaving.cancelled():
            return APIError(DISCONNECTED, "the client disconnected")
        return ended.result() if ended.done() else self._too_late()

    def _too_late(self) -> APIError:
        limit = self.settings.time_limit_s
        message = (
            f"the request did not finish within {limit:g} s; request fewer tokens, or retry when the load is lower"
        )
        return APIError(504, message, code="time_limit")

    async def _body(self, receive: Receive) -> bytes | None:
        """The whole body; None if the client disconnected."""
        seconds, most = self.settings.time_limit_s, self.settings.max_body_bytes
        try:
            body = await asyncio.wait_for(_whole(receive, most), seconds)
        except asyncio.TimeoutError as error:
            message = f"the request body was not received within {seconds:g} s; send it again"
            raise APIError(408, message, code="body_timeout") from error
        values, allowed = sum(map((body or b"").count, (b"[", b"{", b'":'))), most // BYTES_PER_VALUE
        if values > allowed:
            message = f"the request body has {values} lists, objects and keys, expected at most {allowed}; send less"
            raise APIError(413, message, code="body_too_large")
        return body

    def _check_headers(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        if b"content-length" in headers and b"transfer-encoding" in headers:
            raise invalid("the request has Content-Length and Transfer-Encoding; send one of them")
        if scope["path"] in OPEN_PATHS:
            return
        key = self.settings.api_key
        if key is None:
            self._check_host(headers.get(b"host", b"").decode("latin-1"))
        else:
            kind, _, given = headers.get(b"authorization", b"").partition(b" ")
            if kind.lower() != b"bearer" or not hmac.compare_digest(given.strip(), key.encode()):
                fault = "the request has another one" if kind else "the request has none"
                raise APIError(
                    401,
                    f"this server needs its API key as 'Authorization: Bearer KEY', and {fault}",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )

    def _check_host(self, host: str) -> None:
        """Refuse names that a web page could have pointed at this server. Addresses have no such owner."""
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        with suppress(ValueError):
            ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
            return
        if name.lower() not in {"localhost", *self.settings.allow_hosts}:
            raise APIError(
                421,
                f"the request is for the host {ascii(name)[:80]}, which this server does not have; start it with "
                "--allow-host or an API key",
                code="unknown_host",
            )


async def send_error(error: APIError, send: Send) -> None:
    """Send an error response."""
    content = json.dumps(error.content).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(content)), **error.headers}
    listed = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": listed})
    await send({"type": "http.response.body", "body": content})


async def _end(error: APIError, send: Send, record: Record) -> None:
    """Answer a request whose work was stopped. A client that does not read the end of its stream loses it."""
    begun, record.status = record.status, error.status
    if error.status == DISCONNECTED:
        return
    if not begun:
        await send_error(error, send)
    elif record.last_event is not None:
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(send({"type": "http.response.body", "body": record.last_event(error)}), _READING_S)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


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
