"""The `collm` command. Errors are one sentence on stderr."""

from __future__ import annotations

import io
import sys
import traceback
from typing import Annotated, Any

import typer

from collm.cli import calibrate, chat, demo, evaluate, export, forecast, generate, score, serve, train
from collm.cli.options import SPELLING
from collm.errors import CollmError, ConfigError
from collm.redaction import visible
from collm.version import __version__

FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
PASS_ON_ALL = {"allow_extra_args": True, "allow_interspersed_args": False}

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings=SPELLING,
    help="Token-level collaboration between language models. A base learns when an assistant writes the next token.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"collm {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options before the command."""


def env() -> None:
    """Print versions and devices."""
    import os
    import platform
    from importlib.metadata import distributions

    import torch

    installed = {one.name: one.version for one in distributions()}
    typer.echo(f"collm         {__version__}")
    typer.echo(f"python        {platform.python_version()} on {platform.platform()}")
    for package in ("torch", "transformers", "tokenizers", "accelerate", "datasets", "safetensors", "peft"):
        typer.echo(f"{package:<13} {installed.get(package, 'not installed')}")
    typer.echo(f"cpu           {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    typer.echo(f"gpu           {', '.join(devices) or 'none'}")


app.command("demo")(demo.demo)
app.command("forecast")(forecast.forecast)
app.command("score")(score.score)
app.command("train", context_settings=PASS_ON, add_help_option=False)(train.train)
app.command("tune", context_settings=PASS_ON, add_help_option=False)(train.tune)
app.command("add")(train.add)
app.command("drop")(train.drop)
app.command("calibrate")(calibrate.calibrate)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("eval")(evaluate.evaluate)
app.command("lm-eval", context_settings=PASS_ON_ALL)(evaluate.lm_eval)
app.command("report")(evaluate.report)
app.command("serve")(serve.serve)
app.command("launch", context_settings=PASS_ON)(serve.launch)
app.command("pack")(export.pack)
app.add_typer(export.export, name="export")
app.command("env")(env)


def main() -> None:
    """Entry point. Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    debug = "--debug" in sys.argv
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # not every encoding has all characters of a text
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        status = app(arguments, standalone_mode=False)
    except Exception as error:
        if debug:
            traceback.print_exc()
        if hasattr(error, "format_message"):
            _say(_wrong_usage(error))
            sys.exit(WRONG_USAGE)
        if isinstance(error, CollmError):
            _say(str(error))
        else:  # a defect of ours or of a library: still one sentence, the rest on request
            _say(f"{type(error).__name__}: {error} (--debug shows where)")
        sys.exit(WRONG_USAGE if isinstance(error, ConfigError) else FAILED)
    if status == INTERRUPTED:
        _say("interrupted; run the same command again to resume training or scoring")
    sys.exit(status or 0)


def _wrong_usage(error: Any) -> str:
    """The sentence of an exception of typer about the command line; empty if it has shown the help."""
    message, options = str(error.format_message()).removeprefix("Invalid value: "), getattr(error, "possibilities", [])
    if not message:
        return ""
    if options:
        return f"there is no option {error.option_name}; did you mean {options[0]}?"
    if hasattr(error.__cause__, "errors"):  # of pydantic, whose messages may lack the value
        message, value = message.replace("Value error, ", ""), repr(error.__cause__.errors()[0]["input"])
        message = message if value in message else f"{message.rstrip('.')}, got {value}"
    listing = f"; '{error.ctx.command_path} --help' lists the options" if error.ctx and message[-1] != "?" else ""
    return message[0].lower() + message[1:].rstrip(".") + listing


def _say(message: str) -> None:
    if message:
        sys.stderr.write(f"collm: {visible(' '.join(message.split()))}\n")
