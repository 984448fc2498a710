"""Secrets stay out of files, control characters out of terminals."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

REDACTED = "<redacted>"

_SECRET = re.compile(r"(^|[-_])(token|key|password|secret)$", re.IGNORECASE)
_SECRET_OPTION = re.compile(r"--(.*[-_])?(token|key|password|secret)", re.IGNORECASE | re.DOTALL)
_USER_IN_URL = re.compile(r"(?<=://)[^/\s@]+@")
_SECRET_IN_URL = re.compile(r"([?&][\w-]*(?:token|key|password|secret|signature|sig)=)[^&\s#]+", re.IGNORECASE)

# C0 and C1 controls but tab and newline, and what reorders or hides text.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """The text with each control character as its code point, `<1b>` for ESC: a terminal obeys nothing in it."""
    return _CONTROL.sub(lambda found: f"<{ord(found[0]):02x}>", text.replace("\r\n", "\n"))


def redacted_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options by name, without the values of those that are secrets (`hub_token`, `api_key`), in lists of them too."""
    return {name: None if _SECRET.search(str(name)) else _redacted(value) for name, value in options.items()}


def redacted_command(arguments: Sequence[str]) -> list[str]:
    """A command line, without the values of `--hub_token VALUE`, `--api-key=VALUE`, and users and keys in URLs."""
    kept: list[str] = []
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if kept and _SECRET_OPTION.fullmatch(kept[-1]):
            kept.append(REDACTED)
        elif equals and _SECRET_OPTION.fullmatch(name):
            kept.append(f"{name}={REDACTED}")
        else:
            kept.append(_redacted(argument))
    return kept


def _redacted(value: Any) -> Any:
    if isinstance(value, str):
        return _SECRET_IN_URL.sub(rf"\1{REDACTED}", _USER_IN_URL.sub(f"{REDACTED}@", value))
    if isinstance(value, Mapping):
        return redacted_options(value)
    return [_redacted(one) for one in value] if isinstance(value, list | tuple) else value
