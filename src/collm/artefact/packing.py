"""Copies of an artefact for other machines."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from collm.artefact import HEAD, check_weights, read_calibration, read_head, save_assistant, save_model, write_texts
from collm.artefact.manifest import read_manifest
from collm.atomic import atomic_directory
from collm.core.types import BASE, author_name
from collm.errors import ArtefactError
from collm.models.loading import ModelSpec


def pack(source: Path, out: Path, *, with_assistants: bool = False) -> list[str]:
    """Copy an artefact, with the files of its base in it, so that it works on another machine.

    Args:
        with_assistants: the files of the assistants too.

    Returns:
        The paths outside of the copy that it refers to: those of assistants on this machine.

    Raises:
        ArtefactError: `out` exists, `source` is not a complete artefact, or a model is missing or has changed.
        WriteError: the disk is full or not writable.
    """
    if out.exists():
        raise ArtefactError(f"{out} exists; choose another name or remove it")
    manifest, everywhere = read_manifest(source), Path(source.resolve().anchor)
    read_head(source, manifest)
    check_weights(manifest.base_weights(source), manifest, source)
    copies: dict[Path, Path] = {}
    with atomic_directory(out.resolve()) as directory:
        shutil.copyfile(source / HEAD, directory / HEAD)
        if manifest.saved_base is not None:
            shutil.copytree(source / manifest.saved_base, directory / manifest.saved_base)
        if manifest.saved_base in (None, "adapter"):
            base = save_model(manifest.base, author_name(BASE), directory, everywhere, copies)
        else:
            base = replace(manifest.base, path=Path(manifest.base.path).name)
        within = everywhere if with_assistants else source
        numbered = enumerate(manifest.assistants, start=1)
        assistants = [save_assistant(one, author_name(k), directory, within, copies) for k, one in numbered]
        write_texts(directory, replace(manifest, base=base, assistants=assistants), read_calibration(source))
        models = [one for one in assistants if isinstance(one, ModelSpec)]
        paths = [Path(path) for one in models for path in filter(None, (one.path, one.adapter))]
        outside = [str(path) for path in paths if path.is_absolute() and not path.is_relative_to(directory)]
        return list(dict.fromkeys(outside))
