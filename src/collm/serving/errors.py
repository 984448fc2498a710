"""Errors as clients see them: a status, and OpenAI's error object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from collm.errors import CollmError, ConfigError, RequestError

DISCONNECTED = 499
"""Status in logs and metrics of a request whose client went away."""


class APIError(Exception):
    """A request that gets an error for an answer.

    Args:
        status: of HTTP.
        message: what came, what was expected, what to do; shown to the client.
        param: the parameter at fault.
        code: for programs.
        headers: to send with it.
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
        """The body of the answer, and of an `error` event."""
        kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 504: "timeout_error"}
        fallback = "invalid_request_error" if self.status < 500 else "server_error"
        content = {"message": self.message, "type": kind.get(self.status, fallback)}
        return {"error": {**content, "param": self.param, "code": self.code}}


def invalid(message: str, param: str | None = None, code: str | None = None) -> APIError:
    return APIError(400, message, param=param, code=code)


def not_now(status: int, message: str, code: str, retry_after_s: int = 1) -> APIError:
    """Refused for the server's state, not for what the request says."""
    return APIError(status, message, code=code, headers={"Retry-After": str(retry_after_s)})


def of_failure(failure: CollmError) -> APIError:
    """What a client hears of a failure of its request: its own mistakes in full, ours without the details."""
    if isinstance(failure, RequestError | ConfigError):
        return invalid(str(failure))
    return broken()


def broken() -> APIError:
    """Something on our side; the log has the rest, under the id in the answer's X-Request-Id."""
    return APIError(500, "the server failed on this request; its log says why", code="internal_error")
