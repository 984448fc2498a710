"""`collm export`: a collaboration in the form that another program runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

export = typer.Typer(no_args_is_help=True, help="Write a collaboration in the form that another program runs.")


@export.command("vllm")
def vllm(
    collaboration: Annotated[str, typer.Argument(metavar="DIR", help="The collaboration, a directory.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new directory.")],
) -> None:
    """Write the base, its adapter merged, with the deferral head as further rows of its output layer."""
    from collm.collaboration import CoLLM

    CoLLM.from_pretrained(collaboration, device="cpu", trust_code=True).export_vllm(out)
    typer.echo(f"{out}: serve it with vLLM beside the assistants; docs/scaling.md says how")
