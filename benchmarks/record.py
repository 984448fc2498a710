"""Records of a benchmark: its command, the versions of libraries, and the results of each part, as JSON."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from collm.artefact import library_versions


def run_parts(name: str, arguments: Namespace, parts: Mapping[str, Callable[[], Any]]) -> None:
    """Run the parts named in `arguments.parts`, or all. Write the results to `arguments.out`, or without it to stdout.

    The file is written after every part, so a run that is interrupted keeps its results.
    """
    options = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    results: dict[str, Any] = {
        "command": " ".join([f"python -m {name}", *sys.argv[1:]]),
        "arguments": options,
        "versions": library_versions(),
    }
    out: Path | None = arguments.out
    for part in vars(arguments).get("parts", parts):
        results[part] = parts[part]()
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(results, indent=1) + "\n")
    if out is None:
        print(json.dumps(results, indent=1))
