"""What is done for each HTTP request: who may ask, its limits, the end of its work, its log line and metrics."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import logging
import time
import uuid
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from collm.core.types import BASE, deferral_rate
from collm.serving.errors import DISCONNECTED, APIError, broken, invalid
from collm.serving.service import Service, Target
from collm.serving.worker import Submission

_LOG = logging.getLogger(__name__)
REQUEST_LOG = logging.getLogger("collm.serving.requests")

OPEN_PATHS = {"/", "/health", "/ready"}
"""Paths that anybody may ask, under any name of this server."""
UNRECORDED = {"/health", "/ready", "/metrics"}
"""Probes and metrics, which are neither logged nor counted."""
BYTES_PER_VALUE = 32
"""A body has at most one list, object or key for so many bytes of its maximum size. More take seconds to parse."""
_READING_S = 1.0
"""Time for the client to read the end of a stream."""
_HISTOGRAMS = {
    "collm_deferral_rate": ("Share of a request's tokens that assistants wrote.", [i / 10 for i in range(11)]),
    "collm_time_to_first_token_seconds": (
        "Time from a request's arrival to its first token.",
        [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120],
    ),
    "collm_time_per_token_seconds": (
        "Time from a request's first token to its last, per token.",
        [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5],
    ),
}


@dataclass
class Record:
    """One HTTP request.

    Attributes:
        id: the value of the header X-Request-Id.
        route: path of the route, "other" for unknown paths.
        status: HTTP status; for an interrupted stream that of its error, 0 before the response begins.
        prompt: the prompt; only if prompts are logged.
        last_event: writes the last event of an interrupted stream; None before a stream begins.
    """

    id: str
    route: str
    target: Target | None = None
    status: int = 0
    prompt: Any = None
    submission: Submission | None = None
    answered: bool = False
    last_event: Callable[[APIError], bytes] | None = None
    started: float = field(default_factory=time.perf_counter)

    @property
    def model(self) -> str:
        """The model name; empty until the model is found."""
        return self.target.name if self.target else ""

    def log(self) -> None:
        authors = self.submission.authors if self.submission else []
        line = {
            "id": self.id,
            "route": self.route,
            "model": self.model,
            "status": self.status,
            "tokens": len(authors),
            "deferral_rate": round(deferral_rate(authors), 4),
            "seconds": round(time.perf_counter() - self.started, 4),
        }
        REQUEST_LOG.info(json.dumps(line if self.prompt is None else {**line, "prompt": self.prompt}))


class Metrics:
    """The metrics of the server, in a registry of their own."""

    def __init__(self, collaborations: Sequence[Target]) -> None:
        self.registry = own = CollectorRegistry()
        self._requests = Counter("collm_requests", "Requests.", ["route", "model", "status"], registry=own)
        self._tokens = Counter("collm_tokens", "Generated tokens.", ["model", "author"], registry=own)
        self._histograms = [
            Histogram(name, text, ["model"], buckets=buckets, registry=own)
            for name, (text, buckets) in _HISTOGRAMS.items()
        ]
        waiting = Gauge("collm_queue_length", "Waiting completions.", ["model"], registry=own)
        running = Gauge("collm_running", "Running completions.", ["model"], registry=own)
        for one in collaborations:
            waiting.labels(one.name).set_function(partial(len, one.worker.waiting))
            running.labels(one.name).set_function(partial(len, one.worker.running))

    def count(self, record: Record) -> None:
        self._requests.labels(record.route, record.model, str(record.status)).inc()
        written = record.submission
        if written is None or written.first_at is None or record.target is None:
            return
        for author, name in enumerate(record.target.model.author_names, start=BASE):
            self._tokens.labels(record.model, name).inc(written.authors.count(author))
        values = [deferral_rate(written.authors), written.first_at - record.started]
        if len(written.authors) > 1:
            values.append((written.last_at - written.first_at) / (len(written.authors) - 1))
        for histogram, value in zip(self._histograms, values, strict=False):
            histogram.labels(record.model).observe(value)


class RequestMiddleware:
    """It owns the work of each request, which ends at the time limit, when the client leaves or the service stops."""

    def __init__(self, app: ASGIApp, service: Service, metrics: Metrics, routes: Collection[str]) -> None:
        self.app = app
        self.service = service
        self.settings = service.settings
        self.metrics = metrics
        self.routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope["root_path"] = self.settings.root_path
        path = _route_of(scope)
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

        async def replayed() -> Message:
            return bodies.pop() if bodies else await receive()

        deadline = asyncio.get_running_loop().time() + self.settings.time_limit_s
        try:
            self._check_headers(scope)
            bodies: list[Message] = [{"type": "http.request", "body": await self._body(receive), "more_body": False}]
            working = asyncio.ensure_future(self.app(scope, replayed, noting))
            await self._finish(working, receive, record, deadline)
        except APIError as error:
            await _end(error, scope, receive, noting)
        except RecursionError:  # parsing allows some hundred levels more than what is done with the result
            await _end(invalid("the request body is nested too deeply; use fewer levels"), scope, receive, noting)
        except Exception:
            _LOG.exception("request %s failed", record.id)
            if record.status:
                raise
            await _end(broken(), scope, receive, noting)

    def _check_headers(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        if b"content-length" in headers and b"transfer-encoding" in headers:
            raise invalid("the request has Content-Length and Transfer-Encoding; send one of them")
        if _route_of(scope) in OPEN_PATHS:
            return
        key = self.settings.api_key
        if key is None:
            self._check_host(headers.get(b"host", b"").decode("latin-1"))
            return
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() != b"bearer" or not hmac.compare_digest(given.strip(), key.encode()):
            fault = "the request has another one" if kind else "the request has none"
            message = f"this server needs its API key as 'Authorization: Bearer KEY', and {fault}"
            raise APIError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def _check_host(self, host: str) -> None:
        """Refuse names that a web page could have pointed at this server. Addresses have no such owner."""
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        with suppress(ValueError):
            ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
            return
        if name.lower() not in {"localhost", *self.settings.allow_hosts}:
            message = f"the request is for the host {ascii(name)[:80]}, which this server does not have"
            raise APIError(421, f"{message}; start it with --allow-host or an API key", code="unknown_host")

    async def _body(self, receive: Receive) -> bytes:
        """The whole body. Raise an APIError if it is too long or late, or if the client disconnects."""
        seconds, most, body = self.settings.time_limit_s, self.settings.max_body_bytes, bytearray()

        async def read() -> None:
            async for chunk in Request({"type": "http"}, receive).stream():
                body.extend(chunk)
                if len(body) > most:
                    message = f"the request body is longer than {most} bytes; send less"
                    raise APIError(413, message, code="body_too_large")

        try:
            await asyncio.wait_for(read(), seconds)
        except ClientDisconnect as error:
            raise APIError(DISCONNECTED, "the client disconnected") from error
        except asyncio.TimeoutError as error:
            message = f"the request body was not received within {seconds:g} s; send it again"
            raise APIError(408, message, code="body_timeout") from error
        values, allowed = sum(map(body.count, (b"[", b"{", b'":'))), most // BYTES_PER_VALUE
        if values > allowed:
            message = f"the request body has {values} lists, objects and keys, expected at most {allowed}; send less"
            raise APIError(413, message, code="body_too_large")
        return bytes(body)

    async def _finish(self, working: asyncio.Future[None], receive: Receive, record: Record, deadline: float) -> None:
        """Wait for the work. Stop it with an APIError if the client leaves, the time is over or the service ends it."""
        leaving = asyncio.ensure_future(_disconnected(receive))
        ended: asyncio.Future[APIError] = asyncio.get_running_loop().create_future()
        self.service.requests.add(ended)
        try:
            left = deadline - asyncio.get_running_loop().time()
            anything: set[asyncio.Future[Any]] = {working, leaving, ended}
            await asyncio.wait(anything, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if working.done() or record.answered:
                await working
                return
        finally:
            self.service.requests.discard(ended)
            leaving.cancel()
            working.cancel()
        with suppress(asyncio.CancelledError):
            await working
        if leaving.done() and not leaving.cancelled():
            raise APIError(DISCONNECTED, "the client disconnected")
        if ended.done():
            raise ended.result()
        limit = f"{self.settings.time_limit_s:g} s"
        message = f"the request did not finish within {limit}; request fewer tokens, or retry when the load is lower"
        raise APIError(504, message, code="time_limit")


def _route_of(scope: Scope) -> str:
    """The path below the root path, which a proxy may have removed."""
    return str(scope["path"]).removeprefix(scope["root_path"]) or "/"


async def _end(error: APIError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request whose work was stopped. A client that does not read the end of its stream loses it."""
    record: Record = scope["collm.record"]
    begun, record.status = record.status, error.status
    if error.status == DISCONNECTED:
        return
    if not begun:
        await error.response()(scope, receive, send)
    elif record.last_event is not None:
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(send({"type": "http.response.body", "body": record.last_event(error)}), _READING_S)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
