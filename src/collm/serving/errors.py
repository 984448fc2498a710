"""API errors: an HTTP status and an OpenAI error object."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from collm.errors import CacheFull, CollmError, ConfigError, RequestError

_LOG = logging.getLogger(__name__)

DISCONNECTED = 499
"""Status in logs and metrics for a client that disconnected."""


class APIError(Exception):
    """An error response.

    Args:
        status: HTTP status.
        message: what is wrong, what was expected and what to do. The client sees it.
        param: the invalid parameter.
        code: a machine-readable code.
        headers: further headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def content(self) -> dict[str, Any]:
        """The body of the response, or of an `error` event."""
        kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 504: "timeout_error"}
        fallback = "invalid_request_error" if self.status < 500 else "server_error"
        content = {"message": self.message, "type": kind.get(self.status, fallback)}
        return {"error": {**content, "param": self.param, "code": self.code}}


def invalid(message: str, param: str | None = None, code: str | None = None) -> APIError:
    return APIError(400, message, param=param, code=code)


@contextmanager
def refused(param: str | None = None) -> Iterator[None]:
    """Turn a RequestError or ConfigError into an APIError about a parameter, by default the message's first word."""
    try:
        yield
    except (RequestError, ConfigError) as error:
        raise invalid(str(error), param or str(error).partition(" ")[0]) from error


def not_now(status: int, message: str, code: str, retry_after_s: int = 1) -> APIError:
    """An error because of the server's state, which the client can retry."""
    return APIError(status, message, code=code, headers={"Retry-After": str(retry_after_s)})


def of_failure(failure: CollmError, model: str) -> APIError:
    """The error response for a failure of a request to a model. Details of internal failures are logged, not sent."""
    if isinstance(failure, RequestError | ConfigError):
        return invalid(str(failure))
    if isinstance(failure, CacheFull):
        return not_now(503, str(failure), "cache_full")
    _LOG.error("a request to %s failed: %s", model, failure, exc_info=failure)
    return broken()


def broken() -> APIError:
    """An internal error. The log has details under the id of the X-Request-Id header."""
    return APIError(500, "the server failed on this request; its log says why", code="internal_error")
