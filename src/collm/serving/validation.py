"""Turn validation errors and HTTP errors into API errors."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from collm.serving.errors import APIError, invalid
from collm.serving.schemas import WHY_NOT

_NESTED = {"collm", "stream_options", "response_format", "structured_outputs", "text"}
_LISTS = {"messages", "tools", "input"}
_SHORT = reprlib.Repr()
_SHORT.maxstring = 100


def refusal_of(error: APIError | RequestValidationError | HTTPException, asked: str) -> APIError:
    """The API error for an exception. `asked` is the method and path of the request."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, RequestValidationError):
        return _of_validation(error.errors())
    return APIError(
        error.status_code, f"{asked[:80]}: {error.detail}; /openapi.json lists all routes", headers=error.headers
    )


def unknown(params: Sequence[str]) -> APIError:
    """An unknown field."""
    message = f"{params[0][:80]} is no parameter of this server; leave it out, or start it with --ignore-unknown"
    return invalid(message, params[0], "unknown_parameter")


def _of_validation(errors: Sequence[Mapping[str, Any]]) -> APIError:
    """The first invalid parameter with all its validation errors, one for each allowed type."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return invalid(f"the body is no JSON: {first['ctx']['error']}", code="invalid_json")
    if len(first["loc"]) < 2:
        return invalid("the body is no JSON object; send one, with Content-Type: application/json")
    param = _param(first["loc"])
    if first["type"] == "extra_forbidden":
        return invalid(f"{param} is no parameter of this server; leave it out", param, "unknown_parameter")
    if first["type"] == "missing":
        return invalid(f"{param} is missing", param, "missing_parameter")
    expected = dict.fromkeys(one["msg"].removeprefix("Value error, ") for one in errors if _param(one["loc"]) == param)
    reasons = "; or ".join(expected)
    why = f" ({WHY_NOT[param]})" if param in WHY_NOT else ""
    return invalid(f"{param} is {_shown(first['input'])}: {reasons}{why}", param)


def _param(loc: Sequence[str | int]) -> str:
    """The name of a parameter, with the field name for objects."""
    name = str(loc[1])
    if name in _NESTED and len(loc) > 2 and not str(loc[2]).startswith(("literal", "constrained")):
        return f"{name}.{loc[2]}"
    return f"{name}[{loc[2]}]" if name in _LISTS and len(loc) > 2 and isinstance(loc[2], int) else name


def _shown(value: object) -> str:
    shown = _SHORT.repr(value).encode("ascii", "backslashreplace").decode()
    return shown if len(shown) <= 60 else f"{shown[:60]}.."
