"""What whoever runs a server decides about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from collm.core.types import check_threshold
from collm.errors import ConfigError


@dataclass(frozen=True)
class Settings:
    """Limits and manners of a server.

    Attributes:
        max_batch: most sequences of a collaboration decoded at once.
        max_waiting: most sequences of a collaboration that wait for that; more are refused.
        max_body_bytes: longest request body.
        max_prompt_tokens: longest prompt; None for what the models read.
        max_tokens: most tokens of one completion.
        max_choices: most completions of one request: its prompts times n.
        time_limit_s: longest time for a request, its waiting included.
        drain_s: how long requests may go on once the server is told to stop.
        api_key: what clients must send; None lets everybody in.
        log_prompts: write prompts into the log.
        allow_origins: web origins whose pages may call the server.
        threshold: for requests that say nothing of it; None for the calibrated one of each collaboration.
        ignore_unknown: take fields that nobody knows as if they had not come.

    Raises:
        ConfigError: a limit out of range, or an API key that no header can carry.
    """

    max_batch: int = 16
    max_waiting: int = 256
    max_body_bytes: int = 4 << 20
    max_prompt_tokens: int | None = None
    max_tokens: int = 4096
    max_choices: int = 16
    time_limit_s: float = 300.0
    drain_s: float = 30.0
    api_key: str | None = field(default=None, repr=False)
    log_prompts: bool = False
    allow_origins: Sequence[str] = ()
    threshold: float | None = None
    ignore_unknown: bool = False

    def __post_init__(self) -> None:
        least = {"max_batch": 1, "max_body_bytes": 1, "max_tokens": 1, "max_choices": 1, "max_waiting": 0, "drain_s": 0}
        for name, bound in least.items():
            if not getattr(self, name) >= bound:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected at least {bound}")
        if self.threshold is not None:
            check_threshold(self.threshold)
        if self.max_prompt_tokens is not None and self.max_prompt_tokens < 1:
            raise ConfigError(f"max_prompt_tokens is {self.max_prompt_tokens}, expected at least 1")
        if not self.time_limit_s > 0:
            raise ConfigError(f"time_limit_s is {self.time_limit_s}, expected more than 0 seconds")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key):
            raise ConfigError("the API key is empty or has characters that no HTTP header carries; use ASCII")
