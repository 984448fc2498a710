"""`collm launch`: start the vLLM servers of a collaboration on this machine, and serve the collaboration."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from collm.cli import serve
from collm.cli.options import CollaborationArgument, Loading, collect, with_options
from collm.core.types import BASE, author_name
from collm.errors import ConfigError
from collm.serving.settings import Settings

if TYPE_CHECKING:
    from collm.vllm.servers import Servers


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
    serve.check_extra()
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

    app = typer.Typer(add_completion=False)
    app.command("serve")(serve.serve)
    context = typer.main.get_command(app).make_context("collm serve", [collaboration, *arguments])
    if given := [one.name.replace("_", "-") for one in fields(Loading) if context.params[one.name]]:
        raise ConfigError(f"--{given[0]} has no effect here; --base-flags and --assistant-flags say how models run")
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
