"""Which options of a command go together."""

from __future__ import annotations

import typer


def allow_only(context: typer.Context, *names: str, why: str) -> None:
    """Wrong usage if an option was given that is none of `names`, where it would have no effect.

    Raises:
        typer.BadParameter: naming all such options.
    """
    _refuse([option for name, option in _given(context).items() if name not in names], why)


def allow_none(context: typer.Context, *names: str, why: str) -> None:
    """Wrong usage if one of these options was given, where it would have no effect.

    Raises:
        typer.BadParameter: naming all such options.
    """
    _refuse([option for name, option in _given(context).items() if name in names], why)


def _given(context: typer.Context) -> dict[str, str]:
    """The options of the command line, as they are written there, by parameter."""
    return {
        str(parameter.name): parameter.opts[-1]
        for parameter in context.command.params
        if (source := context.get_parameter_source(str(parameter.name))) is not None and source.name == "COMMANDLINE"
    }


def _refuse(options: list[str], why: str) -> None:
    if options:
        raise typer.BadParameter(f"{why}; leave {', '.join(options)} out")
