"""Settings of a server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from collm.core.types import check_threshold
from collm.errors import ConfigError


@dataclass(frozen=True)
class Settings:
    """Settings of a server. The metadata of the fields are for the command line (`cli.options`).

    Attributes:
        max_batch: maximum number of completions of a collaboration decoded at once.
        max_waiting: maximum number of waiting completions of a collaboration. Others get status 429.
        max_body_bytes: maximum size of a request body, in bytes.
        max_prompt_tokens: maximum number of tokens of a prompt, by default the models' context.
        max_connections: maximum number of open connections.
        max_tokens: maximum number of tokens of a completion.
        max_choices: maximum number of completions of a request: its prompts times n.
        time_limit_s: maximum time of a request, including its waiting time, in seconds.
        keep_alive_s: seconds that a connection stays open without a request.
        drain_s: seconds for running requests to finish when the server stops.
        api_key: API key that clients must send, by default none.
        log_prompts: write prompts to the log.
        root_path: path under which a proxy shows the server, such as /collm, by default none.
        allow_hosts: names of this server besides localhost, which are checked without an API key.
        allow_origins: web origins that may call the server.
        threshold: threshold of requests that have none, by default the calibrated one of each collaboration.
        price: the same in nats per token, for heads that were trained with the objective gain. Several assistants may
            have a price each, in their order.
        ignore_unknown: ignore unknown fields of requests.
    """

    max_batch: int = 16
    max_waiting: int = 256
    max_body_bytes: int = 4 << 20
    max_prompt_tokens: int | None = None
    max_connections: int = 1000
    max_tokens: int = 4096
    max_choices: int = 16
    time_limit_s: float = 300.0
    keep_alive_s: int = 75
    drain_s: float = 30.0
    api_key: str | None = field(default=None, repr=False, metadata={"envvar": "COLLM_API_KEY"})
    log_prompts: bool = False
    root_path: str = ""
    allow_hosts: Sequence[str] = field(default=(), metadata={"flag": "--allow-host"})
    allow_origins: Sequence[str] = field(default=(), metadata={"flag": "--allow-origin"})
    threshold: float | None = None
    price: Sequence[float] | None = None
    ignore_unknown: bool = False

    def __post_init__(self) -> None:
        least = dict.fromkeys(["max_waiting", "keep_alive_s", "drain_s"], 0)
        least |= dict.fromkeys(["max_batch", "max_body_bytes", "max_connections", "max_tokens", "max_choices"], 1)
        least |= {} if self.max_prompt_tokens is None else {"max_prompt_tokens": 1}
        for name, bound in least.items():
            if not getattr(self, name) >= bound:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected at least {bound}")
        if self.threshold is not None:
            check_threshold(self.threshold)
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise ConfigError(f"root_path is {self.root_path!r}, expected a path such as /collm, without / at its end")
        if not self.time_limit_s > 0:
            raise ConfigError(f"time_limit_s is {self.time_limit_s}, expected more than 0 seconds")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key):
            raise ConfigError(
                "the API key is empty or has characters that are invalid in an HTTP header; use printable ASCII"
            )
