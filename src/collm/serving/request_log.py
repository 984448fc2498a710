"""The log line and the metrics of each request."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from collm.core.types import BASE, deferral_rate
from collm.serving.collaborations import Served
from collm.serving.errors import APIError
from collm.serving.worker import Submission

LOG = logging.getLogger("collm.serving.requests")
_FIRST_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


@dataclass
class Record:
    """One request.

    Attributes:
        id: the value of the header X-Request-Id.
        route: path of the route, "other" for unknown paths.
        model: the requested model; empty until it is found.
        status: HTTP status. For an interrupted stream, the status of its error.
        authors: the authors of the generated tokens.
        first_s, last_s: time of the first and the latest token since the start.
        prompt: the prompt; only if prompts are logged.
        submission: what the request asked of a worker.
        answered: whether the response is complete.
        last_event: writes the last event of an interrupted stream; None before a stream begins.
        started: `time.perf_counter()`.
    """

    id: str
    route: str
    model: str = ""
    status: int = 0
    authors: list[int] = field(default_factory=list)
    author_names: Sequence[str] = ()
    first_s: float | None = None
    last_s: float = 0.0
    prompt: Any = None
    submission: Submission | None = None
    answered: bool = False
    last_event: Callable[[APIError], bytes] | None = None
    started: float = field(default_factory=time.perf_counter)

    def wrote(self, authors: Sequence[int]) -> None:
        """Add generated tokens."""
        self.last_s = time.perf_counter() - self.started
        if self.first_s is None:
            self.first_s = self.last_s
        self.authors += authors

    def log(self) -> None:
        """Write the log line."""
        seconds = round(time.perf_counter() - self.started, 4)
        line = {"id": self.id, "route": self.route, "model": self.model, "status": self.status}
        line |= {
            "tokens": len(self.authors),
            "deferral_rate": round(deferral_rate(self.authors), 4),
            "seconds": seconds,
        }
        LOG.info(json.dumps(line if self.prompt is None else {**line, "prompt": self.prompt}))


class Metrics:
    """The metrics of the server, in a registry of their own."""

    def __init__(self, collaborations: Sequence[Served]) -> None:
        self.registry = CollectorRegistry()
        self._requests = self._made(Counter, "collm_requests", "Requests.", ["route", "model", "status"])
        self._tokens = self._made(Counter, "collm_tokens", "Generated tokens.", ["model", "author"])
        self._deferred = self._histogram(
            "collm_deferral_rate", "Share of a request's tokens that assistants wrote.", [i / 10 for i in range(11)]
        )
        self._first = self._histogram(
            "collm_time_to_first_token_seconds", "Time from a request's arrival to its first token.", _FIRST_S
        )
        self._per_token = self._histogram(
            "collm_time_per_token_seconds", "Time from a request's first token to its last, per token.", _TOKEN_S
        )
        waiting = self._made(Gauge, "collm_queue_length", "Waiting completions.", ["model"])
        running = self._made(Gauge, "collm_running", "Running completions.", ["model"])
        for one in collaborations:
            waiting.labels(one.name).set_function(_of(one, "waiting"))
            running.labels(one.name).set_function(_of(one, "running"))

    def _histogram(self, name: str, what: str, buckets: Sequence[float]) -> Any:
        return self._made(Histogram, name, what, ["model"], buckets=buckets)

    def _made(self, kind: Any, *arguments: Any, **options: Any) -> Any:
        return kind(*arguments, registry=self.registry, **options)

    def count(self, record: Record) -> None:
        """Add a finished request."""
        self._requests.labels(record.route, record.model, str(record.status)).inc()
        if record.first_s is None:
            return
        for author, name in enumerate(record.author_names, start=BASE):
            self._tokens.labels(record.model, name).inc(record.authors.count(author))
        self._deferred.labels(record.model).observe(deferral_rate(record.authors))
        self._first.labels(record.model).observe(record.first_s)
        if len(record.authors) > 1:
            self._per_token.labels(record.model).observe((record.last_s - record.first_s) / (len(record.authors) - 1))


def _of(served: Served, what: str) -> Callable[[], float]:
    return lambda: float(getattr(served.worker, what))
