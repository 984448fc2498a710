"""`collm export` and `collm pack`: copies of a collaboration, for another program or another machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from collm.cli.options import CollaborationArgument

OutArgument = Annotated[Path, typer.Argument(metavar="OUT", help="Output directory. It must not exist.")]

export = typer.Typer(no_args_is_help=True, help="Write a collaboration in the format of another program.")


@export.command("vllm")
def vllm(
    collaboration: Annotated[str, typer.Argument(metavar="DIR", help="The collaboration: a directory.")],
    out: OutArgument,
) -> None:
    """Write the base for vLLM, with the deferral head as further rows of its output layer. An adapter is merged."""
    from collm.collaboration import CoLLM

    CoLLM.from_pretrained(collaboration, device="cpu", trust_code=True).export_vllm(out)
    typer.echo(f"{out}: serve it with vLLM beside the assistants; see docs/scaling.md")


@export.command("gguf")
def gguf(
    source: Annotated[
        str, typer.Argument(metavar="DIR", help="The collaboration: a directory. Or a model: a directory or Hub id.")
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Output directory, or file.gguf for a model. It must not exist.")
    ],
    kind: Annotated[
        Literal["f32", "bf16", "q8_0", "q4_0"], typer.Option("--type", help="Type of the matrices.")
    ] = "q8_0",
) -> None:
    """Write the base, or a model, as a GGUF file, which llama.cpp runs. An adapter is merged."""
    from collm.artefact import load_parts
    from collm.artefact.manifest import CONFIG
    from collm.errors import ArtefactError, ConfigError
    from collm.models.gguf_export import write_gguf
    from collm.models.loading import ModelSpec, load_tokenizer
    from collm.models.names import GGUF

    is_collaboration = (Path(source).expanduser() / CONFIG).exists()
    if out.exists():
        raise ArtefactError(f"{out} exists; choose another name or remove it")
    if is_collaboration == (out.suffix == GGUF):
        expected = "a directory for a collaboration" if is_collaboration else f"a name that ends in {GGUF} for a model"
        raise ConfigError(f"the output is {out}, expected {expected}")
    if not is_collaboration:
        spec = ModelSpec.parse(source)
        write_gguf(spec, load_tokenizer(spec), out, kind)
        typer.echo(f"{out}: use it as --base or --assistant; llama.cpp runs it")
        return
    parts = load_parts(Path(source).expanduser(), trust_code=True)
    parts.save_pretrained(out, gguf=kind)
    typer.echo(f"{out}: use it like {source}; llama.cpp runs its base")
    if parts.calibration is not None:
        typer.echo(f"Its threshold was chosen with other weights; choose one again with: collm calibrate {out}")


def pack(
    collaboration: CollaborationArgument,
    out: OutArgument,
    with_assistants: Annotated[
        bool, typer.Option("--with-assistants", help="Copy the files of the assistants too.")
    ] = False,
) -> None:
    """Copy a collaboration with the files of its base, so that it works on another machine.

    Models on the Hub are not copied. The other machine downloads them.
    """
    from collm import artefact
    from collm.artefact.packing import pack

    outside = pack(artefact.local_directory(collaboration, None), out, with_assistants=with_assistants)
    typer.echo(f"{out}: use it like {collaboration}, on any machine")
    if outside:
        typer.echo(f"{out} refers to {', '.join(outside)}; on another machine, say with --assistant where it is there")
