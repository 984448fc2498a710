"""Addresses of a collaboration's servers, and settings for calls to them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, get_args

import yaml

from collm.atomic import atomic_file
from collm.errors import ConfigError
from collm.http.client import CallSettings, check_url
from collm.untrusted import read_yaml

OnFailure = Literal["fail", "base"]


@dataclass(frozen=True)
class Servers:
    """Addresses of servers, and settings for calls to them.

    The base needs a vLLM server. An assistant needs an OpenAI-compatible server that takes and returns token ids.

    Attributes:
        urls: base URLs, to which "/completions" is appended. Those of vLLM end in "/v1". The base's comes first, then
            those of the assistants 1..K. A single URL is that of an engine with base and assistant. The host
            `%2Ftmp%2Fbase.sock` is the Unix socket /tmp/base.sock. "#MODEL" at the end names one of several models that
            a server has, such as the adapters of one model.
        on_failure: what happens if an assistant cannot be asked for a token. "fail" ends the request with an error.
            "base" lets the base write the token, which is marked.
        timeout_s: longest wait for an answer, and for the next token of a stream.
        retries: number of further attempts after a connection error, a timeout, and status 429 or 5xx.
        wait_s: longest wait for all servers to be up at the start.
        api_key_env: environment variable that holds the API key. If None, no key is sent.

    Raises:
        ConfigError: a value is out of range, or an address is not a URL.
    """

    urls: Sequence[str]
    on_failure: OnFailure = "fail"
    timeout_s: float = 60.0
    retries: int = 3
    wait_s: float = 0.0
    api_key_env: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.urls, list | tuple) or not all(isinstance(url, str) for url in self.urls):
            raise ConfigError("urls is not a list of addresses, the base's first; write one")  # which may hold a key
        object.__setattr__(self, "urls", tuple(url.strip().rstrip("/") for url in self.urls))
        for url in self.urls:
            check_url("a server's address", url.partition("#")[0])
        if self.api_key_env is not None and not str(self.api_key_env).isidentifier():
            raise ConfigError("api_key_env is not the name of an environment variable; put the key into one")
        if self.on_failure not in get_args(OnFailure):
            raise ConfigError(f"on_failure is {self.on_failure!r}, expected 'fail' or 'base'")
        CallSettings(self.timeout_s, self.retries)
        if not 0 <= self.wait_s < math.inf:
            raise ConfigError(f"wait_s is {self.wait_s}, expected a finite number of seconds of at least 0")

    @classmethod
    def named(cls, text: str) -> Servers:
        """Parse addresses that are separated by commas, the base's first, or read a YAML file with these fields. Raises
        a ConfigError if the file does not exist, or a field is missing, unknown or of the wrong type.
        """
        if "://" in text:
            return cls(text.split(","))
        path = Path(text)
        try:
            content = read_yaml(path)
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(
                f"could not read servers from {text!r}: {type(error).__name__}; expected addresses like "
                "http://localhost:8001/v1 separated by commas, or a YAML file with a list 'urls'"
            ) from error
        known = {field.name for field in fields(cls)}
        if not isinstance(content, dict) or "urls" not in content or content.keys() - known:
            found = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
            raise ConfigError(f"{path} has {found:.200}, expected 'urls' and any of {', '.join(sorted(known))}")
        try:
            return cls(**content)
        except TypeError as error:
            raise ConfigError(f"{path}: {error}; expected a list of urls, seconds and numbers") from error

    def write(self, path: Path) -> None:
        """Write a file that `named` can read."""
        with atomic_file(path) as temporary:
            temporary.write_text(yaml.safe_dump({**asdict(self), "urls": list(self.urls)}), encoding="utf-8")

    def are_one(self, num_assistants: int) -> bool:
        """Whether base and assistant are in one engine."""
        return len(self.urls) == num_assistants == 1

    def check_count(self, num_assistants: int) -> None:
        """Raise a ConfigError if there is not one server for each author."""
        if len(self.urls) != 1 + num_assistants:
            raise ConfigError(
                f"got {len(self.urls)} servers for a base and {num_assistants} assistants; give one for each, the "
                "base's first"
            )
