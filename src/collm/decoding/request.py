"""A request: a prompt, how its tokens are drawn, and who writes them."""

from __future__ import annotations

from dataclasses import dataclass

from collm.core.policies import Policy
from collm.core.types import SamplingParams
from collm.errors import ConfigError


@dataclass(frozen=True)
class Request:
    """One prompt to continue.

    Raises:
        ConfigError: a seed where nothing is drawn.
    """

    prompt_ids: list[int]
    params: SamplingParams
    policy: Policy

    def __post_init__(self) -> None:
        if self.params.seed is not None and self.params.temperature == 0 and not self.policy.draws:
            raise ConfigError(
                f"seed={self.params.seed} has no effect: at temperature 0 nothing is drawn; "
                "set a temperature above 0 or leave the seed out"
            )
