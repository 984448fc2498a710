"""`collm serve`: an OpenAI-compatible server."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from collm.cli.options import Fields, Loading, with_options
from collm.errors import ConfigError, MissingExtra
from collm.serving.settings import Settings

if TYPE_CHECKING:
    from collm.collaboration import CoLLM
    from collm.vllm.servers import Servers


@with_options
def serve(
    collaborations: Annotated[
        list[str],
        typer.Argument(
            metavar="DIR...", help="Collaborations. The model name is the directory name, or NAME in NAME=DIR."
        ),
    ],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port, 0 for a free one.", min=0, max=65535)] = 8000,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Allow requests without an API key on any host.")] = False,
    servers: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL,.. | FILE", help="As for 'collm generate'. Give it once for each DIR, in the same order."
        ),
    ] = None,
    *,
    settings: Annotated[
        Settings,
        Fields(
            "api_key max_batch threshold drain_s",
            "max_waiting max_tokens max_prompt_tokens max_choices max_body_bytes time_limit_s max_connections "
            "keep_alive_s allow_hosts allow_origins ignore_unknown log_prompts",
            "Limits and requests",
        ),
    ],
    loading: Annotated[Loading, Fields("device trust_code", "dtype engine eager cache_memory")],
) -> None:
    """Serve collaborations with an OpenAI-compatible API.

    On Ctrl-C or SIGTERM the server finishes running requests and stops.
    """
    check_extra()
    from collm.serving.run import check_address, run
    from collm.vllm.placement import one_engine
    from collm.vllm.servers import Servers

    check_address(host, settings, no_auth=no_auth)
    if servers and len(servers) != len(collaborations):
        times = f"{len(servers)} times for {len(collaborations)} collaborations"
        raise ConfigError(f"--servers was given {times}; give one for each, in the same order")
    where = [Servers.named(one) for one in servers] if servers else [None] * len(collaborations)
    with ExitStack() as engine:
        if loading.engine == "vllm" and not servers:
            if len(collaborations) > 1:
                raise ConfigError("one engine holds one collaboration; give --servers to serve several")
            _, path = named(collaborations[0])
            logs = Path(f"{Path(path).resolve().name}-vllm") / "logs"
            where = [engine.enter_context(one_engine(path, logs, max_batch=settings.max_batch))]
        run(_models(collaborations, where, loading), settings, host=host, port=port, no_auth=no_auth)


def _models(collaborations: list[str], servers: Sequence[Servers | None], loading: Loading) -> dict[str, CoLLM]:
    import transformers

    transformers.utils.logging.disable_progress_bar()  # the log is JSON
    models: dict[str, CoLLM] = {}
    for (name, path), its_servers in zip(map(named, collaborations), servers, strict=True):
        if name in models:
            raise ConfigError(f"two collaborations are called {name!r}; give one of them another name: NAME={path}")
        models[name] = loading.load(path, its_servers)
    return models


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
