"""Model names: directories, GGUF files and Hub repositories."""

from __future__ import annotations

import difflib
from importlib.util import find_spec
from pathlib import Path

from collm.errors import LoadError, MissingExtra

GGUF = ".gguf"


def looks_like_path(name: str) -> bool:
    """Whether a name must be a local path, because it cannot be a Hub id or its parent directory exists."""
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name or not name:
        return True
    return "/" in name and Path(name).parent.is_dir()


def names_gguf(name: str) -> bool:
    """Whether a name is a GGUF file: a local one, or repo:file.gguf on the Hub."""
    return name.lower().endswith(GGUF) and not Path(name).expanduser().is_dir()


def absolute(name: str) -> str:
    """Make a local path absolute; return any other name unchanged."""
    place = Path(name).expanduser()
    if place.is_dir():
        return str(place.resolve())
    if names_gguf(name) and place.is_file():  # keep the name of a link, as blobs in the Hub's cache have no suffix
        return str(place.parent.resolve() / place.name)
    return name


def gguf_file(name: str, revision: str | None) -> Path:
    """The local path of a GGUF file, which is downloaded if its name is repo:file.gguf."""
    if find_spec("gguf") is None:
        raise MissingExtra("gguf", "gguf")
    place = Path(name).expanduser()
    if place.is_file():
        return place.absolute()
    repo, _, file = name.partition(":")
    if not file or looks_like_path(repo) or file.startswith(("/", "\\")):
        raise LoadError(f"there is no GGUF file {name!r}{hint(place)}; expected a path, or repo:file{GGUF} on the Hub")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, file, revision=revision))
    except Exception as error:  # any error of the Hub or the network
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        what = f"could not download the GGUF file {file!r} of {repo!r}: {reason}"
        raise LoadError(f"{what}; name a file of the repository or a local file") from error


def hint(place: Path) -> str:
    """What a name that does not exist may have meant."""
    names = [entry.name for entry in place.parent.iterdir()] if place.parent.is_dir() else []
    near = difflib.get_close_matches(place.name, names, n=1)
    return f"; did you mean {str(place.with_name(near[0]))!r}?" if near else ""
