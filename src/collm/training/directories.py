"""The data files of a directory. They are listed here: no file of the directory may name others."""

from __future__ import annotations

import glob
import json
from contextlib import suppress
from pathlib import Path

from collm.errors import DAMAGED, ConfigError, DataError
from collm.training.formats import Format
from collm.untrusted import contained, read_text

FILES = (".json", ".jsonl", ".csv", ".parquet", ".arrow")
"""Suffixes of files with rows."""

SPLITS, STATE = "dataset_dict.json", "state.json"
"""Files that `datasets.save_to_disk` writes."""


def files_in(directory: Path, configuration: str | None, split: str | None, layout: Format) -> list[Path]:
    """The ordered files of a split, "train" by default.

    A directory has the publishers' layout of an official format, or was written by `datasets.save_to_disk`, or names
    of files and directories tell the splits (train.jsonl, data/test-00000-of-00001.parquet), as on the Hub. A
    configuration is a directory in it.

    Raises:
        ArtefactError: a link leads out of the directory.
        ConfigError: the directory has a single table, so a split has no effect.
        DataError: the directory has no data, split or configuration of this name.
    """
    contained(directory)
    if configuration is None and (files := layout.files_in(directory, split)):
        return files
    if (directory / SPLITS).exists() or (directory / STATE).exists():
        return _saved(directory, split)
    if layout.files and next(directory.rglob("*.parquet"), None) is None:
        patterns = " or ".join(layout.files.values())
        raise DataError(f"{directory} has no {layout.name} data; expected {patterns}, or a copy of a Hub data set")
    names = layout.configurations if configuration is None else [configuration]
    folders = [directory / name for name in names if (directory / name).is_dir()]
    if configuration is not None and not folders:
        raise DataError(f"{directory} has no directory {configuration!r} for the configuration of this name")
    return [file for folder in folders or [directory] for file in _of_split(folder, split or "train")]


def _saved(directory: Path, split: str | None) -> list[Path]:
    """The files of a table that `datasets.save_to_disk` wrote."""
    try:
        if (directory / SPLITS).exists():
            splits = json.loads(read_text(directory / SPLITS))["splits"]
            if (split or "train") not in splits:
                raise DataError(f"{directory} has no split {split or 'train'!r}, only {', '.join(splits)}")
            directory = contained(directory, split or "train")
        elif split is not None:
            raise ConfigError(f"split {split!r} has no effect on {directory}, which has a single table; leave it out")
        listed = json.loads(read_text(directory / STATE))["_data_files"]
        return [contained(directory, one["filename"]) for one in listed]
    except DAMAGED as error:
        raise DataError(
            f"{directory} is no data set of datasets.save_to_disk, or damaged ({type(error).__name__}: {error!s:.200})"
        ) from error


def _of_split(directory: Path, split: str) -> list[Path]:
    """The files of a split, which names tell by the rules of the Hub. Without such names all files are for training."""
    from datasets.data_files import get_data_patterns, resolve_pattern

    base, files = glob.escape(str(directory)), []
    try:
        patterns = get_data_patterns(base)
    except FileNotFoundError:
        patterns = {}
    for pattern in patterns.get(split, ()):
        with suppress(FileNotFoundError):
            files += [Path(file) for file in resolve_pattern(pattern, base) if Path(file).suffix in FILES]
    if not files:
        there = f"only {', '.join(map(str, patterns))}" if patterns else "nor any other"
        raise DataError(f"{directory} has no split {split!r} in files of the kinds {', '.join(FILES)}, {there}")
    return [*dict.fromkeys(files)]
