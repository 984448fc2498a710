"""The `collm` command. Errors are one sentence on stderr."""

from __future__ import annotations

import io
import sys
import traceback
from typing import Annotated

import typer

from collm.cli import (
    calibrate,
    chat,
    demo,
    env,
    evaluate,
    export,
    generate,
    launch,
    lm_eval,
    report,
    score,
    serve,
    train,
)
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


app.command("demo")(demo.demo)
app.command("score")(score.score)
app.command("train", context_settings=PASS_ON, add_help_option=False)(train.train)
app.command("calibrate")(calibrate.calibrate)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("eval")(evaluate.evaluate)
app.command("lm-eval", context_settings=PASS_ON_ALL)(lm_eval.lm_eval)
app.command("report")(report.report)
app.command("serve")(serve.serve)
app.command("launch", context_settings=PASS_ON)(launch.launch)
app.add_typer(export.export, name="export")
app.command("env")(env.env)


def main() -> None:
    """Entry point. Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    debug = "--debug" in sys.argv
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # not every encoding has all characters of a text
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app(arguments)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            _say("interrupted; run the same command again to resume training or scoring")
        raise
    except Exception as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, CollmError):
            _say(str(error))
        else:  # a defect of ours or of a library: still one sentence, the rest on request
            _say(f"{type(error).__name__}: {error} (--debug shows where)")
        sys.exit(WRONG_USAGE if isinstance(error, ConfigError) else FAILED)


def _say(message: str) -> None:
    sys.stderr.write(f"collm: {visible(' '.join(message.split()))}\n")
