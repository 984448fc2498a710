"""Data files for tasks, written on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def jsonl(path: Path, *rows: Any) -> Path:
    """A row per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
