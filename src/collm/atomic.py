"""Atomic writes: a reader finds either the old or the new content. One process at a time writes a directory."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from collm.errors import ConfigError, WriteError


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`, and rename it to `path` if the block succeeds.

    Raises:
        WriteError: the write failed; `path` is unchanged.
    """
    with _directory_beside(path) as own:
        yield own / path.name
        os.replace(own / path.name, path)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, as `atomic_file`."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def atomic_directory(path: Path, replaces: Collection[str] = ()) -> Iterator[Path]:
    """Yield a temporary directory next to `path`, and replace `path` by it if the block succeeds.

    Args:
        replaces: names of the entries that are replaced or removed. All others of an existing `path` are kept.

    Raises:
        WriteError: a write failed; `path` is unchanged.
    """

    def replaced(directory: str, names: list[str]) -> set[str]:
        return set(names) & set(replaces) if Path(directory) == path else set()

    with _directory_beside(path) as own:
        new, old = own / "new", own / "old"
        new.mkdir()
        yield new
        if path.exists():
            shutil.copytree(path, new, symlinks=True, ignore=replaced, copy_function=_link_or_copy, dirs_exist_ok=True)
            os.replace(path, old)
        try:
            os.replace(new, path)
        except OSError:
            if old.exists() and not path.exists():
                os.replace(old, path)
            raise


@contextmanager
def _directory_beside(path: Path) -> Iterator[Path]:
    """Yield a directory next to `path` that no other process knows, and remove it. A refused write is a WriteError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=path.parent, prefix=f".{path.name[:40]}.", ignore_cleanup_errors=True) as own:
            yield Path(own)
    except (OSError, SafetensorError) as error:
        raise write_error(path, error) from error


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # of a file system without hard links
        shutil.copy2(source, target, follow_symlinks=False)


def write_error(path: Path, error: Exception) -> WriteError:
    """The error for a write that was refused."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return WriteError(
        f"could not write {path}: {reason}. Its previous content is unchanged; "
        "free some space or choose another location"
    )


@contextmanager
def sole_writer(directory: Path) -> Iterator[None]:
    """Hold the lock of a directory, which is created if it does not exist. One that stays empty is removed."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / ".lock"
        lock = FileLock(path, timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise ConfigError(
                f"{directory} is being written by {path.read_text(encoding='utf-8', errors='replace')[:200]}; wait "
                "until it ends, or choose another directory"
            ) from error
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
    except OSError as error:
        raise write_error(directory, error) from error
    try:
        yield
    finally:
        lock.release()
        if [one.name for one in directory.iterdir()] == [path.name]:
            path.unlink()
            directory.rmdir()
