"""`collm serve`: an OpenAI-compatible server. `collm launch`: the same with vLLM servers on this machine."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from collm.cli.options import SPELLING, CollaborationArgument, Fields, Loading, collect, take_fields, with_options
from collm.core.types import BASE, author_name
from collm.errors import ConfigError, MissingExtra
from collm.serving.settings import Settings

if TYPE_CHECKING:
    from collm.collaboration import CoLLM
    from collm.vllm.servers import Servers

COLLABORATIONS = typer.Argument(
    metavar="DIR...", help="Collaborations. The model name is that of the run or directory, or NAME in NAME=DIR."
)
SERVERS = typer.Option(
    metavar="URL,.. | FILE", help="As for 'collm generate'. Give it once for each DIR, in the same order."
)
CONFIG = typer.Option(
    metavar="serve.yaml",
    help="YAML file with any of the options, and the collaborations.",
    is_eager=True,
    callback=take_fields,
)


@with_options
def serve(
    collaborations: Annotated[list[str], COLLABORATIONS],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port, 0 for a free one.", min=0, max=65535)] = 8000,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Allow requests without an API key on any host.")] = False,
    servers: Annotated[list[str] | None, SERVERS] = None,
    config: Annotated[str | None, CONFIG] = None,
    *,
    settings: Annotated[
        Settings,
        Fields(
            "api_key max_batch threshold price drain_s",
            "max_waiting max_tokens max_prompt_tokens max_choices max_body_bytes time_limit_s max_connections "
            "keep_alive_s root_path allow_hosts allow_origins ignore_unknown log_prompts",
            "Limits and requests",
        ),
    ],
    loading: Annotated[Loading, Fields("device trust_code", "assistants dtype engine eager cache_memory")],
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
            if loading.assistants:
                raise ConfigError("--assistant has no effect on an engine that is started; give --servers")
            _, path = named(collaborations[0])
            logs = Path(f"{Path(path).resolve().name}-vllm") / "logs"
            where = [engine.enter_context(one_engine(path, logs, max_batch=settings.max_batch))]
        models = _models(collaborations, where, loading)
        if settings.price is not None:
            for model in models.values():
                model.policy(threshold=settings.threshold, price=settings.price)  # raises if it cannot have a price
        run(models, settings, host=host, port=port, no_auth=no_auth)


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
    """The model name and the path of NAME=DIR or DIR, whose path may have a = too. By default it is the run's name."""
    name, equals, path = given.partition("=")
    is_path = Path(given).exists() or (Path(name).name != name and not Path(path).exists())
    if not is_path and name and equals:
        return name, path
    place = Path(given).resolve()
    return place.parent.name if place.name == "collaboration" and place.is_dir() else place.name, given


@dataclass(frozen=True)
class Launching:
    """How the servers of the models run.

    Attributes:
        work: directory for the exported base, the server logs and servers.yaml, by default ./NAME-vllm.
        vllm_python: Python interpreter with vLLM and the collm plug-in, by default this one.
        wait: maximum time until all servers are ready, seconds.
        max_model_len: maximum sequence length, tokens, by default the models' context, at most 8192.
        base_flags: further vLLM flags for the base's server, in quotes.
        assistant_flags: further vLLM flags for the assistants' servers.
        on_failure: if an assistant does not answer: fail the request, or let the base write the token and mark it.
        separate: start a server for each model. By default there is one server if there are two models.
    """

    work: Path | None = None
    vllm_python: str | None = None
    wait: float = 900.0
    max_model_len: int | None = None
    base_flags: str = ""
    assistant_flags: str = ""
    on_failure: Literal["fail", "base"] = "fail"
    separate: bool = False


@with_options
def launch(context: typer.Context, collaboration: CollaborationArgument, how: Launching) -> None:
    """Start vLLM with the collaboration and serve it. Ctrl-C or SIGTERM stops all servers.

    A base and one assistant share one engine. With more assistants, each model has a server. Further options, such as
    --port, --api-key and --max-batch, are those of 'collm serve'.
    """
    check_extra()
    from collm.serving.run import log_as_json
    from collm.vllm.placement import fits_in_one, one_engine

    log_as_json()
    serving = _serve_command(collaboration, context.args)
    max_batch = serving.params["max_batch"]
    directory = how.work or Path(f"{Path(collaboration).resolve().name}-vllm")
    if how.separate or not fits_in_one(collaboration):
        starting = _servers_of_each(collaboration, directory, how, max_batch)
    elif how.base_flags or how.on_failure != "fail":
        given = "--base-flags" if how.base_flags else "--on-failure"
        raise ConfigError(f"{given} has no effect on one engine; leave it out, or give --separate")
    else:
        starting = one_engine(
            collaboration,
            directory / "logs",
            python=how.vllm_python or sys.executable,
            flags=shlex.split(how.assistant_flags),
            max_batch=max_batch,
            max_length=how.max_model_len,
            wait_s=how.wait,
        )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops servers, like Ctrl-C
    with starting as servers:
        servers.write(directory / "servers.yaml")
        serving.params["servers"] = [str(directory / "servers.yaml")]
        serving.command.invoke(serving)


def _serve_command(collaboration: str, arguments: list[str]) -> Any:
    """The parsed call of `collm serve`, checked before anything starts."""
    from collm.serving.run import check_address

    app = typer.Typer(add_completion=False, context_settings=SPELLING)
    app.command("serve")(serve)
    context = typer.main.get_command(app).make_context("collm serve", [collaboration, *arguments])
    loading = {one.name for one in fields(Loading)}
    if given := [one for one in context.command.params if one.name in loading and context.params[one.name]]:
        raise ConfigError(f"{given[0].opts[-1]} has no effect here; use --base-flags and --assistant-flags")
    if len(context.params["collaborations"]) > 1:
        raise ConfigError(f"collm launch serves one collaboration, got {' '.join(context.params['collaborations'])}")
    settings = collect(Settings, {one.name: context.params[one.name] for one in fields(Settings)})
    check_address(context.params["host"], settings, no_auth=context.params["no_auth"])
    return context


@contextmanager
def _servers_of_each(collaboration: str, directory: Path, how: Launching, max_batch: int) -> Iterator[Servers]:
    """Run a vLLM server for each model. The base is exported first, unless its export exists."""
    from collm.collaboration import CoLLM
    from collm.models.loading import ModelSpec
    from collm.vllm.export import check_exported
    from collm.vllm.launch import check_python, launched
    from collm.vllm.placement import Machine, placed
    from collm.vllm.servers import Servers

    model, export = CoLLM.from_pretrained(collaboration, engine="local"), directory / "export"
    if export.exists():
        check_exported(export, model.head)
    else:
        typer.echo(f"writing the base with its head to {export}", err=True)
        model.export_vllm(export)
    models = {author_name(BASE): ModelSpec(str(export))}
    for number, assistant in enumerate(model.assistants, start=1):
        if not isinstance(assistant, ModelSpec):
            raise ConfigError(f"the assistant {assistant} is a program, which no server runs; use 'collm serve'")
        models[author_name(number)] = assistant
    flags = dict.fromkeys(models, shlex.split(how.assistant_flags))
    flags |= {author_name(BASE): shlex.split(how.base_flags)}
    servers = placed(models, Machine.this(), max_batch=max_batch, max_length=how.max_model_len, flags=flags)
    python = check_python(how.vllm_python or sys.executable)
    with launched(servers, python, directory / "logs", wait_s=how.wait):
        yield Servers([server.url for server in servers], on_failure=how.on_failure)
