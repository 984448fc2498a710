"""`collm serve`: an OpenAI-compatible server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from collm.cli import options
from collm.errors import ConfigError, MissingExtra

if TYPE_CHECKING:
    from collm.serving.settings import Settings
    from collm.vllm.servers import Servers


def serve(
    context: typer.Context,
    collaborations: Annotated[
        list[str],
        typer.Argument(
            metavar="DIR...", help="Collaborations. The model name is the directory name, or NAME in NAME=DIR."
        ),
    ],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port, 0 for a free one.", min=0, max=65535)] = 8000,
    api_key: Annotated[str | None, typer.Option(envvar="COLLM_API_KEY", help="API key that clients must send.")] = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Allow requests without an API key on any host.")] = False,
    max_batch: Annotated[int, typer.Option(help="Maximum completions of a collaboration decoded at once.")] = 16,
    max_waiting: Annotated[int, typer.Option(help="Maximum waiting completions. Others get status 429.")] = 256,
    max_tokens: Annotated[int, typer.Option(help="Maximum number of tokens of a completion.")] = 4096,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(help="Maximum number of tokens of a prompt. Default: the models' context.")
    ] = None,
    max_choices: Annotated[int, typer.Option(help="Maximum completions of a request: its prompts times n.")] = 16,
    max_body_bytes: Annotated[int, typer.Option("--max-body", help="Maximum size of a request body, bytes.")] = 4 << 20,
    time_limit_s: Annotated[
        float, typer.Option("--time-limit", help="Maximum time of a request including its waiting time, seconds.")
    ] = 300.0,
    max_connections: Annotated[int, typer.Option(help="Maximum number of open connections.")] = 1000,
    keep_alive_s: Annotated[
        int, typer.Option("--keep-alive", help="Seconds that a connection stays open without a request.")
    ] = 75,
    drain_s: Annotated[
        float, typer.Option("--drain", help="Seconds for running requests to finish when the server stops.")
    ] = 30.0,
    allow_hosts: Annotated[
        list[str],
        typer.Option("--allow-host", help="Name of this server besides localhost, checked without an API key."),
    ] = [],  # noqa: B006
    allow_origins: Annotated[
        list[str],
        typer.Option("--allow-origin", help="Web origin that may call the server. Can be given several times."),
    ] = [],  # noqa: B006
    threshold: Annotated[
        float | None,
        typer.Option(help="Threshold of requests that have none. Default: the calibrated threshold."),
    ] = None,
    ignore_unknown: Annotated[bool, typer.Option("--ignore-unknown", help="Ignore unknown request fields.")] = False,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts to the log.")] = False,
    device: options.DeviceOption = None,
    dtype: options.DtypeOption = None,
    engine: options.EngineOption = None,
    servers: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL,.. | FILE", help="As for 'collm generate'. Give it once for each DIR, in the same order."
        ),
    ] = None,
    trust_code: options.TrustCodeOption = False,
    eager: options.EagerOption = False,
    cache_memory: options.CacheMemoryOption = None,
) -> None:
    """Serve collaborations with an OpenAI-compatible API.

    On Ctrl-C or SIGTERM the server finishes running requests and stops.
    """
    check_extra()
    from collm.serving.run import run

    settings = settings_of(context.params)
    if servers and len(servers) != len(collaborations):
        raise ConfigError(
            f"--servers was given {len(servers)} times for {len(collaborations)} collaborations; give one for each, "
            "in the same order"
        )
    loading: dict[str, Any] = {"device": device, "dtype": dtype, "trust_code": trust_code, "eager": eager}
    loading |= {"engine": engine, "cache_memory": cache_memory}
    where = [options.servers_named(one) for one in servers] if servers else [None] * len(collaborations)
    with _engine_of(collaborations, max_batch) if engine == "vllm" and not servers else nullcontext() as started:
        models = _models(collaborations, where if started is None else [started], loading)
        run(models, settings, host=host, port=port, no_auth=no_auth)


@contextmanager
def _engine_of(collaborations: list[str], max_batch: int) -> Iterator[Servers]:
    """A vLLM engine with the collaboration, in a process of its own.

    Raises:
        ConfigError: there are several collaborations.
    """
    from collm.vllm.placement import one_engine

    if len(collaborations) > 1:
        raise ConfigError("one engine holds one collaboration; give --servers to serve several")
    _, path = named(collaborations[0])
    logs = Path(f"{Path(path).resolve().name}-vllm") / "logs"
    with one_engine(path, logs, max_batch=max_batch) as servers:
        yield servers


def settings_of(given: Mapping[str, Any]) -> Settings:
    """The settings among the options of the command.

    Raises:
        ConfigError: a setting is out of range, or the address needs an API key.
    """
    from collm.serving.run import check_address
    from collm.serving.settings import Settings

    settings = Settings(**{field.name: given[field.name] for field in fields(Settings)})
    check_address(given["host"], settings, no_auth=given["no_auth"])
    return settings


def check_extra() -> None:
    """Raise a MissingExtra if a library of the server is not installed."""
    try:
        import collm.serving.run  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtra(str(error.name).partition(".")[0], "serve") from error


def named(given: str) -> tuple[str, str]:
    """The model name and the path of NAME=DIR or DIR, whose path may have a = too."""
    name, equals, path = given.partition("=")
    is_path = Path(given).exists() or (Path(name).name != name and not Path(path).exists())
    if is_path or not (name and equals):
        return Path(given).resolve().name, given
    return name, path


def _models(collaborations: list[str], servers: Sequence[Servers | None], loading: dict[str, Any]) -> dict[str, Any]:
    """Load the collaborations, by name."""
    import transformers

    from collm.collaboration import CoLLM

    transformers.utils.logging.disable_progress_bar()  # the log is JSON
    models: dict[str, Any] = {}
    for given, served in zip(collaborations, servers, strict=True):
        name, path = named(given)
        if name in models:
            raise ConfigError(f"two collaborations are called {name!r}; give one of them another name: NAME={path}")
        models[name] = CoLLM.from_pretrained(path, servers=served, **loading)
    return models
