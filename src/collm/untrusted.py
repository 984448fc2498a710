"""Files that may come from somebody else: where links lead, how large they are, what kinds of values they hold."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from collm.errors import ArtefactError, ConfigError

MAX_JSON_BYTES = 16 << 20
"""Largest accepted JSON file of an artefact. Even a chat template has only a few thousand bytes."""

MAX_YAML_BYTES = 1 << 18
"""Largest accepted YAML file, because 1 MB takes ten seconds to parse."""

_CACHED_REPO = re.compile(r"(models|datasets)--.+")
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def contained(directory: Path, *parts: str) -> Path:
    """Join a path inside a directory, and check that neither it nor anything below it leads out or is a pipe.

    A snapshot in the Hub's cache consists of links, models--NAME/snapshots/REVISION/.. to models--NAME/blobs/HASH.
    They are allowed.
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
    """Whether a link's target is a blob of the cached repository of which the directory is a snapshot or a part."""
    repo = target.parent.parent
    is_blob = target.parent == repo / "blobs" and _BLOB.fullmatch(target.name) is not None
    return is_blob and _CACHED_REPO.fullmatch(repo.name) is not None and directory.is_relative_to(repo / "snapshots")


def read_text(path: Path, limit: int = MAX_JSON_BYTES) -> str:
    """Read a text file. Raises a ValueError if it has more than `limit` bytes or is not UTF-8."""
    size = path.stat().st_size
    if size > limit:
        raise ValueError(f"it has {size} bytes, expected at most {limit}")
    return path.read_text(encoding="utf-8-sig")


def read_yaml(path: Path, loader: type[yaml.SafeLoader | yaml.BaseLoader] = yaml.SafeLoader) -> Any:
    """Read a YAML file without aliases, which could unfold to any size. It may raise any of `DAMAGED`.

    With the BaseLoader, every scalar is text.
    """
    text = read_text(path, MAX_YAML_BYTES)
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise ValueError("it has an alias (*name); write the value out")
        return yaml.load(text, Loader=loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def check_fields(record: Any) -> None:
    """Check that the fields of a dataclass have the types it declares. An int is a float, and floats are finite."""
    kinds = get_type_hints(type(record))
    for field in fields(record):
        value = getattr(record, field.name)
        if not fits(value, kinds[field.name]):
            raise ConfigError(f"{field.name} is {value!r:.80}, expected {field.type}")


def fits(value: Any, kind: Any) -> bool:
    """Whether a value has the type that an annotation declares."""
    origin, kinds = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin is Literal:
        return value in kinds
    if origin in (Union, UnionType):
        return any(fits(value, one) for one in kinds)
    if origin is tuple and kinds[-1] is not ...:
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(fits, value, kinds))
    if origin in (tuple, list, Sequence):
        return isinstance(value, list | tuple) and all(fits(one, kinds[0]) for one in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(one, kinds[0]) and fits(value[one], kinds[1]) for one in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float) and abs(value) < math.inf if kind is float else isinstance(value, kind)
