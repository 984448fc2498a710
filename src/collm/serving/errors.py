"""API errors: an HTTP status and an OpenAI error object."""

from __future__ import annotations

import json
import logging
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from collm.errors import CacheFull, CollmError, ConfigError, RequestError
from collm.serving.schemas import WHY_NOT

_LOG = logging.getLogger(__name__)

DISCONNECTED = 499
"""Status in logs and metrics for a client that disconnected."""
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 504: "timeout_error"}


@dataclass(eq=False)
class APIError(Exception):
    """An error response. Its message is for the client: what is wrong, what was expected and what to do."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def content(self) -> dict[str, Any]:
        """The body of the response, or of an `error` event."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return Response(json.dumps(self.content), self.status, self.headers, "application/json")


def invalid(message: str, param: str | None = None, code: str | None = None) -> APIError:
    return APIError(400, message, param, code)


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
    return APIError(500, "the server failed on this request; its log has the reason", code="internal_error")


async def refuse(http: Request, error: Any) -> Response:
    """The response to an APIError, a RequestValidationError or an HTTPException."""
    refusal = error
    if isinstance(error, RequestValidationError):
        refusal = _of_validation(error.errors())
    elif isinstance(error, HTTPException):
        route = f"{http.method} {http.url.path}"[:80]
        message = f"{route}: {error.detail}; /openapi.json lists all routes"
        refusal = APIError(error.status_code, message, headers=error.headers or {})
    return refusal.response()  # type: ignore[no-any-return]


_NESTED = {"collm", "stream_options", "response_format", "structured_outputs", "text"}
_LISTS = {"messages", "tools", "input"}
_SHORT = reprlib.Repr()
_SHORT.maxstring = 100


def _of_validation(errors: Sequence[Mapping[str, Any]]) -> APIError:
    """The first invalid parameter with all its validation errors, one for each allowed type."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return invalid(f"the body is not JSON: {first['ctx']['error']}", code="invalid_json")
    if len(first["loc"]) < 2:
        return invalid("the body is not a JSON object; send one, with Content-Type: application/json")
    param = _param(first["loc"])
    if first["type"] == "extra_forbidden":
        return invalid(f"{param} is no parameter of this server; leave it out", param, "unknown_parameter")
    if first["type"] == "missing":
        return invalid(f"{param} is missing", param, "missing_parameter")
    expected = dict.fromkeys(one["msg"].removeprefix("Value error, ") for one in errors if _param(one["loc"]) == param)
    unsupported = param in WHY_NOT and (param != "prompt" or first["type"] == "none_required")  # or of /v1/completions
    why = f" ({WHY_NOT[param]})" if unsupported else ""
    shown = _SHORT.repr(first["input"]).encode("ascii", "backslashreplace").decode()
    shown = shown if len(shown) <= 60 else f"{shown[:60]}.."
    return invalid(f"{param} is {shown}: {'; or '.join(expected)}{why}", param)


def _param(loc: Sequence[str | int]) -> str:
    """The name of a parameter, with the field name for objects."""
    name = str(loc[1])
    if name in _NESTED and len(loc) > 2 and not str(loc[2]).startswith(("literal", "constrained")):
        return f"{name}.{loc[2]}"
    return f"{name}[{loc[2]}]" if name in _LISTS and len(loc) > 2 and isinstance(loc[2], int) else name
