"""The demo: make data and tiny models, train with the public functions, and compare with every baseline."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from collm.atomic import write_text
from collm.demo import two_tokenizers
from collm.demo.files import check_own, write_rows
from collm.demo.results import SeedResult, to_json, to_report, to_rows
from collm.demo.systems import MAX_BATCH, PARAMS, measure_all, measure_curve
from collm.demo.tiny_models import ModelPaths, fine_tune, make_models
from collm.demo.world import DemoWorld
from collm.errors import ConfigError
from collm.evaluation.calibration import DEFERRAL_RATES
from collm.evaluation.page import write_report
from collm.evaluation.report import Report
from collm.run import RunConfig, RunResult, train_collaboration
from collm.training.config import CoLLMConfig
from collm.training.scoring import progress_bar

EPOCHS = {"head": 8, "full": 3}
LEARNING_RATES: dict[str, dict[str, Any]] = {"head": {"head_learning_rate": 1e-2}, "full": {"learning_rate": 1e-3}}
RATES = DEFERRAL_RATES
SAME, DIFFERENT = "same", "different"


def run_demo(
    out: Path,
    *,
    num_assistants: int = 1,
    tokenizers: str = SAME,
    seeds: Sequence[int] = (0,),
    quiet: bool = False,
) -> Report:
    """Train and evaluate with each seed. Write results.json and report.html into `out`.

    Args:
        tokenizers: "same" for all models, or "different".

    Raises:
        ConfigError: no seed, an invalid value of tokenizers, or `out` has files that are not from a demo.
        CollmError: an error of a step.
    """
    if not seeds:
        raise ConfigError("there is no seed; expected at least one")
    if tokenizers not in (SAME, DIFFERENT):
        raise ConfigError(f"tokenizers is {tokenizers!r}, expected {SAME!r} or {DIFFERENT!r}")
    clear(out)
    started = time.monotonic()
    results = [_run_seed(out / f"seed-{seed}", num_assistants, tokenizers, seed, quiet) for seed in seeds]
    rows = to_rows(results)
    seconds = time.monotonic() - started
    different = "" if tokenizers == SAME else f" --tokenizers {tokenizers}"
    command = f"collm demo --assistants {num_assistants}{different} --seeds {len(seeds)} --seed {seeds[0]}"
    report = to_report(results, rows, command, seconds)
    write_report(out / "report.html", report)
    write_text(out / "results.json", json.dumps(to_json(results, rows, command, seconds), indent=2) + "\n")
    return report


def clear(out: Path) -> None:
    """Remove an earlier demo from `out`.

    Raises:
        ConfigError: `out` has files that are not from a demo.
    """
    check_own(out, "seed-*", "results.json", "report.html")
    for entry in list(out.iterdir()) if out.exists() else []:
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _run_seed(directory: Path, num_assistants: int, tokenizers: str, seed: int, quiet: bool) -> SeedResult:
    different = tokenizers == DIFFERENT
    world = DemoWorld(num_assistants=num_assistants, seed=seed, separator=" " if different else "")
    make = two_tokenizers.make_models if different else make_models
    with progress_bar("making tiny models", enabled=not quiet) as progress:
        models = make(world, directory / "models", seed=seed, on_step=progress)
    for split in ("train", "validation", "test"):
        write_rows(directory / f"{split}.jsonl", getattr(world, split))
    results = {method: _train(directory, models, method, seed, quiet) for method in EPOCHS}
    tuned = fine_tune(models.base, world.train, directory / "fine-tuned", seed=seed, epochs=EPOCHS["full"])
    measured = measure_all(world, tuned, results)
    with progress_bar("measuring the curve", enabled=not quiet) as progress:
        curve = measure_curve(results["full"], world, progress)
    share = world.fact_share(results["full"].model.tokenizer.tokenize) if different else world.fact_share()
    return SeedResult(world, measured, curve, results["full"].calibration.best().threshold, share)


def _train(directory: Path, models: ModelPaths, method: str, seed: int, quiet: bool) -> RunResult:
    """Train as `collm train` does."""
    config = RunConfig(
        base=str(models.base),
        assistant=[str(path) for path in models.experts],
        data=str(directory / "train.jsonl"),
        validation=str(directory / "validation.jsonl"),
        rates=list(RATES),
        max_new_tokens=PARAMS.max_new_tokens,
        max_batch=MAX_BATCH,
        scores=str(directory / "scores"),
    )
    args = CoLLMConfig(
        output_dir=str(directory / method),
        method=method,
        max_length=128,
        num_train_epochs=EPOCHS[method],
        per_device_train_batch_size=16,
        save_strategy="no",
        logging_strategy="no",
        use_cpu=True,
        seed=seed,
        disable_tqdm=quiet,
        **LEARNING_RATES[method],
    )
    return train_collaboration(config, args, quiet=quiet)
