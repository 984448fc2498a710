"""Files of a demo's directory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from collm.atomic import write_text
from collm.errors import ConfigError


def check_own(out: Path, *patterns: str) -> None:
    """Raise a ConfigError if a directory holds a file that matches none of the patterns."""
    names = sorted(entry.name for entry in out.iterdir()) if out.exists() else []
    for name in names:
        if not any(fnmatch(name, pattern) for pattern in patterns):
            raise ConfigError(f"{out} holds {name}, which this demo did not write; choose another directory")


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows of training data as JSON lines."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
