"""Where a command decodes: with models in memory, or across servers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from collm.vllm.servers import Servers

EngineOption = Annotated[
    Literal["local", "vllm"] | None,
    typer.Option("--engine", help="local: models in this process; vllm: servers. Default: by --servers."),
]
ServersOption = Annotated[
    str | None,
    typer.Option(
        "--servers",
        metavar="URL,.. | FILE",
        help="Addresses of vLLM servers, as http://localhost:8001/v1, the base's first; or a YAML file with urls, "
        "on_failure (fail or base), timeout_s, retries, wait_s, api_key_env.",
    ),
]


def servers_named(given: str | None) -> Servers | None:
    """What --servers says."""
    from collm.vllm.servers import Servers

    return None if given is None else Servers.named(given)
