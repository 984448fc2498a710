"""Which options of a command go together."""

from __future__ import annotations

import typer


def allow_only(context: typer.Context, *names: str, why: str) -> None:
    """Wrong usage if an option was given that is none of `names`, where it would have no effect.

    Raises:
        typer.BadParameter: naming all such options.
    """
    given = [
        parameter.opts[-1]
        for parameter in context.command.params
        if parameter.name not in names
        and (source := context.get_parameter_source(str(parameter.name))) is not None
        and source.name == "COMMANDLINE"
    ]
    if given:
        raise typer.BadParameter(f"{why}; leave {', '.join(given)} out")
