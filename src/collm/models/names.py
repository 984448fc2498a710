"""What the name of a model means: a directory, a GGUF file, or something on the Hub."""

from __future__ import annotations

import difflib
from importlib.util import find_spec
from pathlib import Path

from collm.errors import LoadError, MissingExtra

GGUF = ".gguf"


def looks_like_path(name: str) -> bool:
    """Whether a name can only mean a place on this machine: no Hub id begins so, or has two separators.

    Of a name with one separator, its folder's being there tells.
    """
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name or not name:
        return True
    return "/" in name and Path(name).parent.is_dir()


def names_gguf(name: str) -> bool:
    """Whether a name means a GGUF file: one on this machine, or repo:file.gguf on the Hub."""
    return name.lower().endswith(GGUF) and not Path(name).expanduser().is_dir()


def absolute(name: str) -> str:
    """A model's name that means the same from every working directory."""
    place = Path(name).expanduser()
    if place.is_dir():
        return str(place.resolve())
    if names_gguf(name) and place.is_file():  # a link keeps its name: in the Hub's cache what it leads to has no suffix
        return str(place.parent.resolve() / place.name)
    return name


def check_there(name: str) -> None:
    """Refuse a path to nothing at once: transformers would look for it on the Hub, at length.

    Raises:
        LoadError: nothing is there, or GGUF files alone.
    """
    place = Path(name).expanduser()
    if looks_like_path(name) and not place.exists():
        raise LoadError(f"there is no model at {name!r}: no such directory{_hint(place)}")
    if place.is_dir() and not (place / "config.json").exists() and (found := sorted(place.glob(f"*{GGUF}"))):
        raise LoadError(f"{name!r} has no config.json but GGUF files; name the file, as {str(found[0])!r}")


def gguf_file(name: str, revision: str | None) -> Path:
    """Where a GGUF file lies on this machine, fetched from the Hub if its name is repo:file.gguf.

    Raises:
        LoadError: there is no such file, or the Hub does not give it.
        MissingExtra: gguf is not installed.
    """
    if find_spec("gguf") is None:
        raise MissingExtra("gguf", "gguf")
    place = Path(name).expanduser()
    if place.is_file():
        return place.absolute()
    repo, _, file = name.partition(":")
    if not file or looks_like_path(repo) or file.startswith(("/", "\\")):
        raise LoadError(f"there is no GGUF file {name!r}{_hint(place)}; expected a path, or on the Hub repo:file{GGUF}")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, file, revision=revision))
    except Exception as error:  # of the Hub or the network, whatever they raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LoadError(
            f"could not get the GGUF file {file!r} of {repo!r}: {reason.rstrip('.')}; name a file that the "
            "repository has, or one on this machine"
        ) from error


def _hint(place: Path) -> str:
    names = [entry.name for entry in place.parent.iterdir()] if place.parent.is_dir() else []
    near = difflib.get_close_matches(place.name, names, n=1)
    return f"; did you mean {str(place.with_name(near[0]))!r}?" if near else ""
