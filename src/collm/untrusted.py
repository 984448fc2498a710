"""Files that may come from somebody else: where their links lead, how large they are, what they unfold to."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

from collm.errors import ArtefactError

MAX_JSON_BYTES = 16 << 20
"""Largest accepted JSON file of an artefact. Even a chat template has only a few thousand bytes."""

MAX_YAML_BYTES = 1 << 18
"""Largest accepted YAML file, because 1 MB takes ten seconds to parse."""

_CACHED_REPO = re.compile(r"(models|datasets)--.+")
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def contained(directory: Path, *parts: str) -> Path:
    """Join a path inside a directory, and check that neither it nor anything below it leads out.

    A snapshot in the Hub's cache consists of links, models--NAME/snapshots/REVISION/.. to models--NAME/blobs/HASH.
    They are allowed.

    Raises:
        ArtefactError: the path or a symbolic link leads out, or a file is a pipe, which would never end. The message
            names the first.
    """
    path, root = directory.joinpath(*parts), Path(os.path.realpath(directory))
    for one in (path, *path.rglob("*")):
        if one is path or one.is_symlink():
            target = Path(os.path.realpath(one))
            if not target.is_relative_to(root) and not _is_cached(target, root):
                what = "is a link that leads" if one.is_symlink() else "is"
                raise ArtefactError(f"{one} {what} out of {directory}; replace it with the file itself")
        if one.is_fifo():
            raise ArtefactError(f"{one} is a pipe, expected a file; remove it")
    return path


def _is_cached(target: Path, directory: Path) -> bool:
    """Whether a link's target is a blob of the cached repository that the directory is a snapshot of, or part of one."""
    repo = target.parent.parent
    return (
        _CACHED_REPO.fullmatch(repo.name) is not None
        and directory.is_relative_to(repo / "snapshots")
        and target.parent == repo / "blobs"
        and _BLOB.fullmatch(target.name) is not None
    )


def read_text(path: Path, limit: int = MAX_JSON_BYTES) -> str:
    """Read a text file.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file has more than `limit` bytes, or is not UTF-8.
    """
    size = path.stat().st_size
    if size > limit:
        raise ValueError(f"it has {size} bytes, expected at most {limit}")
    return path.read_text(encoding="utf-8-sig")


def read_yaml(path: Path) -> Any:
    """Read a YAML file without aliases, which could unfold to any size.

    Raises:
        OSError: the file cannot be read.
        ValueError, RecursionError: the file is too large, no YAML, nested too deeply, or has an alias.
    """
    text = read_text(path, MAX_YAML_BYTES)
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise ValueError("it has an alias (*name); write the value out")
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
