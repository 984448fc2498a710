"""`collm export`: write a collaboration in the format of another program."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

export = typer.Typer(no_args_is_help=True, help="Write a collaboration in the format of another program.")


@export.command("vllm")
def vllm(
    collaboration: Annotated[str, typer.Argument(metavar="DIR", help="The collaboration: a directory.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Output directory. It must not exist.")],
) -> None:
    """Write the base for vLLM, with the deferral head as further rows of its output layer. An adapter is merged."""
    from collm.collaboration import CoLLM

    CoLLM.from_pretrained(collaboration, device="cpu", trust_code=True).export_vllm(out)
    typer.echo(f"{out}: serve it with vLLM beside the assistants; docs/scaling.md says how")
