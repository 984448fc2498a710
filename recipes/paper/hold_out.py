"""Hold validation questions out of a BioASQ training file, at random but every time the same.

python -m recipes.paper.hold_out training11b.json data/bioasq   # writes train.json and validation.json there
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

HELD_OUT = 200
SEED = 20_240_306


def hold_out(source: Path, directory: Path) -> None:
    """Write `train.json` and `validation.json`, in BioASQ's own form and order."""
    questions = json.loads(source.read_text(encoding="utf-8"))["questions"]
    chosen = set(random.Random(SEED).sample(range(len(questions)), HELD_OUT))
    directory.mkdir(parents=True, exist_ok=True)
    for name, held_out in (("train", False), ("validation", True)):
        kept = [question for place, question in enumerate(questions) if (place in chosen) == held_out]
        (directory / f"{name}.json").write_text(json.dumps({"questions": kept}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m recipes.paper.hold_out", description=hold_out.__doc__)
    parser.add_argument("source", type=Path, help="BioASQ's training file")
    parser.add_argument("directory", type=Path, help="where the two files go")
    hold_out(**vars(parser.parse_args()))
