"""Options that several commands share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from collm.vllm.servers import Servers

CollaborationArgument = Annotated[
    str, typer.Argument(metavar="DIR", help="The collaboration: a directory or a Hub repository.")
]

# Which threshold

ThresholdOption = Annotated[
    float | None,
    typer.Option(
        help="The base keeps a token while its defer prob is at most this. Default: the calibrated threshold."
    ),
]
BudgetOption = Annotated[
    float | None, typer.Option(help="Use the best threshold within this deferral rate, instead of --threshold.")
]

# How models are loaded

DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1 or auto; or a device for each model: cuda:0,cuda:1.")
]
DtypeOption = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: as saved.")]
EagerOption = Annotated[bool, typer.Option("--eager", help="Do not use CUDA graphs.")]
CacheMemoryOption = Annotated[
    str | None,
    typer.Option(
        help="KV cache memory on each device: a size such as 4GiB, or a share of the free memory such as 50%."
    ),
]
TrustCodeOption = Annotated[
    bool, typer.Option("--trust-code", help="Run the functions that files name as tools, metrics or formats.")
]
EngineOption = Annotated[
    Literal["local", "vllm"] | None,
    typer.Option("--engine", help="local: models in this process. vllm: servers. Default: vllm if --servers is given."),
]
ServersOption = Annotated[
    str | None,
    typer.Option(
        "--servers",
        metavar="URL,.. | FILE",
        help="Addresses of the vLLM servers, such as http://localhost:8001/v1, the base's first. Or a YAML file with "
        "urls, on_failure (fail or base), timeout_s, retries, wait_s, api_key_env.",
    ),
]
MaxBatchOption = Annotated[int, typer.Option(help="Maximum number of prompts decoded at once.")]

# Rows

SplitOption = Annotated[str | None, typer.Option(help="Split of the data set.")]
PromptFieldOption = Annotated[str, typer.Option(help="Name of the prompt field.")]
CompletionFieldOption = Annotated[str, typer.Option(help="Name of the completion field.")]
FormatOption = Annotated[
    str,
    typer.Option(
        "--format", help="rows, the published format of a data set (tulu, gsm8k, gsm8k-plain), or module:NAME."
    ),
]
BadRowsOption = Annotated[str, typer.Option(help="stop: fail at an invalid row. skip: skip and count invalid rows.")]
StopOption = Annotated[list[str] | None, typer.Option(help="Text that ends a completion. Can be given several times.")]


def servers_named(given: str | None) -> Servers | None:
    """The servers of --servers."""
    from collm.vllm.servers import Servers

    return None if given is None else Servers.named(given)
