"""Where the authors of a collaboration are served, and how patiently they are asked."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from collm.errors import ConfigError

OnFailure = Literal["fail", "base"]
_URL = re.compile(r"https?://[^\s/@?#]+(/[^\s@?#]*)?")


@dataclass(frozen=True)
class Servers:
    """Addresses of vLLM servers; of an assistant any OpenAI-compatible server that takes and returns token ids.

    Attributes:
        urls: what stands before "/completions", with vLLM ending in "/v1": of the base, then of the assistants 1..K.
        on_failure: what becomes of a token whose assistant cannot be asked: "fail" ends the request with an error,
            "base" lets the base write it, marked as such.
        timeout_s: longest wait for an answer, and for the next token of one.
        retries: further attempts after a connection error, a timeout and status 429 or 5xx.
        wait_s: longest wait for all servers to be up at the start.
        api_key_env: the environment variable that holds the key; without it no key is sent.

    Raises:
        ConfigError: a value out of range, or an address that is none.
    """

    urls: Sequence[str]
    on_failure: OnFailure = "fail"
    timeout_s: float = 60.0
    retries: int = 3
    wait_s: float = 0.0
    api_key_env: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "urls", tuple(url.rstrip("/") for url in self.urls))
        if not all(_URL.fullmatch(url) for url in self.urls):  # not shown, as it may hold a key
            raise ConfigError("a server's address is no URL like http://localhost:8001/v1 (no key or user in it)")
        if self.on_failure not in get_args(OnFailure):
            raise ConfigError(f"on_failure is {self.on_failure!r}, expected 'fail' or 'base'")
        if not 0 < self.timeout_s < math.inf or not 0 <= self.wait_s < math.inf or self.retries < 0:
            raise ConfigError(
                f"timeout_s, wait_s and retries are {self.timeout_s}, {self.wait_s} and {self.retries}, expected "
                "seconds above 0, seconds, and a number of attempts"
            )

    def check_count(self, num_assistants: int) -> None:
        """Raise a ConfigError unless there is one server for each author."""
        if len(self.urls) != 1 + num_assistants:
            raise ConfigError(
                f"{len(self.urls)} servers came for a base and {num_assistants} assistants; give one for each, the "
                "base's first"
            )

    @property
    def headers(self) -> dict[str, str]:
        """That carry the key.

        Raises:
            ConfigError: the environment variable holds none.
        """
        if self.api_key_env is None:
            return {}
        key = os.environ.get(self.api_key_env, "").strip()
        if not (key and key.isascii() and key.isprintable()):
            raise ConfigError(f"the environment variable {self.api_key_env} holds no key (printable ASCII); set it")
        return {"Authorization": f"Bearer {key}"}
