"""The gain from packed linear layers on this processor: all layers packed, or only those that were faster when timed.

    python -m benchmarks.packing --threads 2

Each measurement is one pass over one new token of each sequence, after 32 tokens. The forms run in turn, and the
fastest of 25 passes counts. `packed` and `chosen` are speeds relative to plain layers. `choosing_s` is the time spent
on choosing layers at load, in seconds. Prints JSON.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.pairs import SHAPES, make_model
from benchmarks.record import run_parts
from collm.engine.runner import ModelRunner
from collm.models.language_model import LanguageModel
from collm.models.packing import PackedLinear, pack_linears

ROUNDS, PROMPT = 25, 32


def pack_all(module: nn.Module) -> None:
    for name, child in module.named_children():
        if type(child) is nn.Linear:
            setattr(module, name, PackedLinear(child))
        else:
            pack_all(child)


def compare(shape: str, dtype: torch.dtype, batches: list[int]) -> list[dict[str, Any]]:
    models = {kind: make_model(shape, SHAPES[shape][-1], dtype, "cpu") for kind in ("plain", "packed", "chosen")}
    pack_all(models["packed"])
    start = time.perf_counter()
    pack_linears(models["chosen"])
    choosing_s = time.perf_counter() - start
    runners = {kind: ModelRunner(LanguageModel(model, name=kind)) for kind, model in models.items()}
    rows = []
    for batch in batches:
        best = dict.fromkeys(runners, float("inf"))
        slots = {kind: [runner.open() for _ in range(batch)] for kind, runner in runners.items()}
        for kind, runner in runners.items():
            runner.extend({slot: [1] * PROMPT for slot in slots[kind]})
        for token in range(ROUNDS):
            for kind, runner in runners.items():
                start = time.perf_counter()
                runner.extend({slot: [token] for slot in slots[kind]})
                best[kind] = min(best[kind], time.perf_counter() - start)
        for kind, runner in runners.items():
            for slot in slots[kind]:
                runner.close(slot)
        gained = {kind: best["plain"] / best[kind] for kind in ("packed", "chosen")}
        rows.append({"model": shape, "dtype": str(dtype)[6:], "batch": batch, **gained, "choosing_s": choosing_s})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["25m", "150m"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--parts", nargs="+", choices=("packing",), default=["packing"])
    parser.add_argument("--out", type=Path, help="write the JSON here instead of to stdout")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    def packing() -> list[dict[str, Any]]:
        dtypes = (torch.float32, torch.bfloat16)
        return [row for dtype in dtypes for shape in arguments.models for row in compare(shape, dtype, arguments.batch)]

    run_parts("benchmarks.packing", arguments, {"packing": packing})


if __name__ == "__main__":
    main()
