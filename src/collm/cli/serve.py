"""`collm serve`: an OpenAI-compatible server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from collm.cli.servers import EngineOption, servers_named
from collm.errors import ConfigError, MissingExtra

if TYPE_CHECKING:
    from collm.serving.settings import Settings
    from collm.vllm.servers import Servers


def serve(
    context: typer.Context,
    collaborations: Annotated[
        list[str],
        typer.Argument(
            metavar="DIR...", help="Collaborations, each called by its directory's name, or by NAME in NAME=DIR."
        ),
    ],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.", min=0, max=65535)] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="COLLM_API_KEY", help="What clients must send as their API key.")
    ] = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Let everybody in, whatever the host.")] = False,
    max_batch: Annotated[int, typer.Option(help="Most completions of a collaboration decoded at once.")] = 16,
    max_waiting: Annotated[int, typer.Option(help="Most completions that wait for that; more get a 429.")] = 256,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of a completion.")] = 4096,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(help="Longest prompt. Default: what the models read.")
    ] = None,
    max_choices: Annotated[int, typer.Option(help="Most completions of one request: its prompts times n.")] = 16,
    max_body_bytes: Annotated[int, typer.Option("--max-body", help="Longest request body, bytes.")] = 4 << 20,
    time_limit_s: Annotated[
        float, typer.Option("--time-limit", help="Longest time for a request, seconds, waiting included.")
    ] = 300.0,
    drain_s: Annotated[
        float, typer.Option("--drain", help="Seconds that requests may go on once the server is to stop.")
    ] = 30.0,
    allow_origins: Annotated[
        list[str], typer.Option("--allow-origin", help="Web origin whose pages may call the server; may be repeated.")
    ] = [],  # noqa: B006
    threshold: Annotated[
        float | None,
        typer.Option(help="For requests that name none. Default: as calibrated; without a calibration they must."),
    ] = None,
    ignore_unknown: Annotated[
        bool, typer.Option("--ignore-unknown", help="Take unknown fields of requests as if they had not come.")
    ] = False,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts into the log.")] = False,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, auto; or one for each model: cuda:0,cuda:1.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16; default as saved.")] = None,
    engine: EngineOption = None,
    servers: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL,.. | FILE", help="As of 'collm generate'; one for each DIR, in their order, repeated."
        ),
    ] = None,
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="Run functions that files name: of tools and metrics.")
    ] = False,
    eager: Annotated[bool, typer.Option("--eager", help="Run models on a GPU without CUDA graphs.")] = False,
    cache_memory: Annotated[
        str | None,
        typer.Option(help="Memory for keys and values on each device, such as 4GiB, or a share of what is free: 50%."),
    ] = None,
) -> None:
    """Serve collaborations to OpenAI clients, until Ctrl-C or SIGTERM; then running requests are finished first."""
    check_extra()
    from collm.serving.run import run

    settings = settings_of(context.params)
    if servers and len(servers) != len(collaborations):
        raise ConfigError(
            f"--servers came {len(servers)} times for {len(collaborations)} collaborations; give one for each, in the "
            "same order"
        )
    options: dict[str, Any] = {"device": device, "dtype": dtype, "trust_code": trust_code, "eager": eager}
    options |= {"engine": engine, "cache_memory": cache_memory}
    where = [servers_named(one) for one in servers] if servers else [None] * len(collaborations)
    with _engine_of(collaborations, max_batch) if engine == "vllm" and not servers else nullcontext() as started:
        models = _models(collaborations, where if started is None else [started], options)
        run(models, settings, host=host, port=port, no_auth=no_auth)


@contextmanager
def _engine_of(collaborations: list[str], max_batch: int) -> Iterator[Servers]:
    """An engine of vLLM with the collaboration, in a process of its own.

    Raises:
        ConfigError: there are several.
    """
    from collm.vllm.placement import one_engine

    if len(collaborations) > 1:
        raise ConfigError("one engine holds one collaboration; give --servers to serve several")
    path = collaborations[0].rpartition("=")[2]
    logs = Path(f"{Path(path).resolve().name}-vllm") / "logs"
    with one_engine(path, logs, max_batch=max_batch) as servers:
        yield servers


def settings_of(options: Mapping[str, Any]) -> Settings:
    """Those of the command's options that are settings.

    Raises:
        ConfigError: one is out of range, or the address needs an API key.
    """
    from collm.serving.run import check_address
    from collm.serving.settings import Settings

    settings = Settings(**{field.name: options[field.name] for field in fields(Settings)})
    check_address(options["host"], settings, no_auth=options["no_auth"])
    return settings


def check_extra() -> None:
    """Raise a MissingExtra where a server's libraries are missing."""
    try:
        import collm.serving.run  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtra(str(error.name).partition(".")[0], "serve") from error


def _models(collaborations: list[str], servers: Sequence[Servers | None], options: dict[str, Any]) -> dict[str, Any]:
    """By name."""
    import transformers

    from collm.collaboration import CoLLM

    transformers.utils.logging.disable_progress_bar()  # the log is JSON
    models: dict[str, Any] = {}
    for given, served in zip(collaborations, servers, strict=True):
        name, equals, path = given.partition("=")
        if not equals:
            name, path = Path(given).resolve().name, given
        if name in models:
            raise ConfigError(f"two collaborations are called {name!r}; give one of them another name: NAME={path}")
        models[name] = CoLLM.from_pretrained(path, servers=served, **options)
    return models
