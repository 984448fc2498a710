"""`collm launch`: start the vLLM servers of a collaboration on this machine, and serve the collaboration."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from collm.cli import serve
from collm.cli.options import CollaborationArgument
from collm.errors import ConfigError

if TYPE_CHECKING:
    from collm.collaboration import CoLLM
    from collm.vllm.launch import ServerPlan
    from collm.vllm.servers import Servers

NOT_HERE = {
    "--device": "device",
    "--dtype": "dtype",
    "--engine": "engine",
    "--servers": "servers",
    "--eager": "eager",
    "--cache-memory": "cache_memory",
    "--trust-code": "trust_code",
}
"""Options of `collm serve` for loading models. They have no effect here, because vLLM servers run the models."""
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


def launch(
    context: typer.Context,
    collaboration: CollaborationArgument,
    work: Annotated[
        Path | None,
        typer.Option(help="Directory for the exported base, the server logs and servers.yaml. Default: ./NAME-vllm."),
    ] = None,
    vllm_python: Annotated[
        str | None, typer.Option(help="Python interpreter with vLLM and the collm plug-in. Default: this one.")
    ] = None,
    wait: Annotated[float, typer.Option(help="Maximum time until all servers are ready, seconds.")] = 900.0,
    max_model_len: Annotated[
        int | None, typer.Option(help="Maximum sequence length, tokens. Default: the models' context, at most 8192.")
    ] = None,
    base_flags: Annotated[str, typer.Option(help="Further vLLM flags for the base's server, in quotes.")] = "",
    assistant_flags: Annotated[str, typer.Option(help="Further vLLM flags for the assistants' servers.")] = "",
    on_failure: Annotated[
        Literal["fail", "base"],
        typer.Option(
            help="If an assistant does not answer: fail the request, or let the base write the token and mark it."
        ),
    ] = "fail",
    separate: Annotated[
        bool,
        typer.Option("--separate", help="Start a server for each model. Default: one server if there are two models."),
    ] = False,
) -> None:
    """Start vLLM with the collaboration and serve it. Ctrl-C or SIGTERM stops all servers.

    A base and one assistant share one engine. With more assistants, each model has a server. Further options, such as
    --port, --api-key and --max-batch, are those of 'collm serve'.
    """
    serve.check_extra()
    from collm.serving.run import log_as_json
    from collm.vllm.placement import fits_in_one, one_engine

    log_as_json()
    serving = _serve_command(collaboration, context.args)
    directory = work or Path(f"{Path(collaboration).resolve().name}-vllm")
    python, flags = vllm_python or sys.executable, shlex.split(assistant_flags)
    max_batch = serving.params["max_batch"]
    if separate or not fits_in_one(collaboration):
        with _terminated_as_interrupted():
            plans = _plans(collaboration, directory, [shlex.split(base_flags), flags], max_batch, max_model_len)
            with _servers_of_each(plans, python, directory, wait, on_failure) as servers:
                _serve(serving, servers, directory)
        return
    if base_flags or on_failure != "fail":
        given = "--base-flags" if base_flags else "--on-failure"
        raise ConfigError(f"{given} has no effect on one engine; leave it out, or give --separate")
    options: dict[str, Any] = {"python": python, "max_batch": max_batch, "max_length": max_model_len, "wait_s": wait}
    with _terminated_as_interrupted(), one_engine(collaboration, directory / "logs", flags=flags, **options) as servers:
        _serve(serving, servers, directory)


def _serve(serving: Any, servers: Servers, directory: Path) -> None:
    servers.write(directory / "servers.yaml")
    serving.params["servers"] = [str(directory / "servers.yaml")]
    serving.command.invoke(serving)


@contextmanager
def _servers_of_each(
    plans: Sequence[ServerPlan], python: str, directory: Path, wait: float, on_failure: Literal["fail", "base"]
) -> Iterator[Servers]:
    from collm.vllm.launch import check_python, launched
    from collm.vllm.servers import Servers

    with launched(plans, check_python(python), directory / "logs", wait_s=wait) as running:
        yield Servers([server.url for server in running], on_failure=on_failure)


def _serve_command(collaboration: str, arguments: list[str]) -> Any:
    """The parsed call of `collm serve`, checked before anything starts."""
    app = typer.Typer(add_completion=False)
    app.command("serve")(serve.serve)
    context = typer.main.get_command(app).make_context("collm serve", [collaboration, *arguments])
    for option, name in NOT_HERE.items():
        if context.params[name]:
            raise ConfigError(f"{option} has no effect here; --base-flags and --assistant-flags say how models run")
    if len(context.params["collaborations"]) > 1:
        raise ConfigError(f"collm launch serves one collaboration, got {' '.join(context.params['collaborations'])}")
    serve.settings_of(context.params)
    return context


def _plans(
    collaboration: str, directory: Path, flags: list[list[str]], max_batch: int, max_length: int | None
) -> Sequence[ServerPlan]:
    from collm.collaboration import CoLLM
    from collm.core.types import BASE, author_name
    from collm.models.loading import ModelSpec
    from collm.vllm.placement import Machine, Served, placed

    model = CoLLM.from_pretrained(collaboration, engine="local")
    base = ModelSpec(str(_exported(model, directory / "export")))
    models = [Served(author_name(BASE), base, flags[0])]
    for number, assistant in enumerate(model.assistants, start=1):
        if not isinstance(assistant, ModelSpec):
            raise ConfigError(f"the assistant {assistant} is a program, which no server runs; use 'collm serve'")
        models.append(Served(author_name(number), assistant, flags[1]))
    return placed(models, Machine.this(), max_batch=max_batch, max_length=max_length)


def _exported(model: CoLLM, out: Path) -> Path:
    """Export the base unless the export exists."""
    from collm.vllm.export import check_exported

    if out.exists():
        check_exported(out, model.head)
    else:
        typer.echo(f"writing the base with its head to {out}", err=True)
        model.export_vllm(out)
    return out


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Handle SIGTERM like Ctrl-C, so that servers are stopped. While serving, the server has its own handler."""
    import signal

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
