"""Which options of a command go together."""

from __future__ import annotations

from collections.abc import Container

import typer


def refuse(context: typer.Context, why: str, *, only: Container[str] | None = None, none: Container[str] = ()) -> None:
    """Refuse options that would have no effect.

    Args:
        why: the reason.
        only: parameters that are allowed; None for all.
        none: parameters that are not allowed.

    Raises:
        typer.BadParameter: names all such options of the command line.
    """
    refused = [
        parameter.opts[-1]
        for parameter in context.command.params
        if (source := context.get_parameter_source(str(parameter.name))) is not None and source.name == "COMMANDLINE"
        if parameter.name in none or (only is not None and parameter.name not in only)
    ]
    if refused:
        raise typer.BadParameter(f"{why}; leave {', '.join(refused)} out")
