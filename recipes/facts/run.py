"""Make data and tiny models, train with the public functions, and compare with every baseline.

python -m recipes.facts.run --out demo-out
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers

from collm.atomic import write_text
from collm.cli.demo import show
from collm.cli.terminal import log_to_terminal
from collm.demo.real import check_own
from collm.evaluation.report import Report, write_report
from collm.run import RunConfig, RunResult, train_collaboration
from collm.training.config import CoLLMConfig
from collm.training.data import write_rows
from collm.training.scoring import progress_bar
from recipes.facts import two_tokenizers
from recipes.facts.results import SeedResult, to_json, to_report, to_rows
from recipes.facts.systems import MAX_BATCH, PARAMS, measure_all, measure_curve
from recipes.facts.tiny_models import ModelPaths, fine_tune, make_models
from recipes.facts.world import DemoWorld

EPOCHS = {"head": 8, "full": 3}
LEARNING_RATES: dict[str, dict[str, Any]] = {"head": {"head_learning_rate": 1e-2}, "full": {"learning_rate": 1e-3}}
RATES = [i / 10 for i in range(11)]
SAME, DIFFERENT = "same", "different"


def run(out: Path, *, num_assistants: int, tokenizers: str, seeds: Sequence[int]) -> Report:
    """Train and evaluate with each seed. Write results.json and report.html into `out`.

    Args:
        tokenizers: "same" for all models, or "different".

    Raises:
        ConfigError: `out` has files that are not from this recipe.
        CollmError: an error of a step.
    """
    clear(out)
    started = time.monotonic()
    results = [_run_seed(out / f"seed-{seed}", num_assistants, tokenizers, seed) for seed in seeds]
    rows = to_rows(results)
    seconds = time.monotonic() - started
    command = (
        f"python -m recipes.facts.run --assistants {num_assistants} --tokenizers {tokenizers} "
        f"--seeds {len(seeds)} --seed {seeds[0]}"
    )
    report = to_report(results, rows, command, seconds)
    write_report(out / "report.html", report)
    write_text(out / "results.json", json.dumps(to_json(results, rows, command, seconds), indent=2) + "\n")
    return report


def clear(out: Path) -> None:
    """Remove an earlier run from `out`.

    Raises:
        ConfigError: `out` has files that are not from this recipe.
    """
    check_own(out, "seed-*", "results.json", "report.html")
    for entry in list(out.iterdir()) if out.exists() else []:
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _run_seed(directory: Path, num_assistants: int, tokenizers: str, seed: int) -> SeedResult:
    different = tokenizers == DIFFERENT
    world = DemoWorld(num_assistants=num_assistants, seed=seed, separator=" " if different else "")
    make = two_tokenizers.make_models if different else make_models
    with progress_bar("making tiny models", "steps") as progress:
        models = make(world, directory / "models", seed=seed, on_step=progress)
    for split in ("train", "validation", "test"):
        write_rows(directory / f"{split}.jsonl", getattr(world, split))
    results = {method: _train(directory, models, method, seed) for method in EPOCHS}
    tuned = fine_tune(models.base, world.train, directory / "fine-tuned", seed=seed, epochs=EPOCHS["full"])
    measured = measure_all(world, tuned, results)
    with progress_bar("measuring the curve", "thresholds") as progress:
        curve = measure_curve(results["full"], world, progress)
    share = world.fact_share(results["full"].model.tokenizer.tokenize) if different else world.fact_share()
    return SeedResult(world, measured, curve, results["full"].calibration.best().threshold, share)


def _train(directory: Path, models: ModelPaths, method: str, seed: int) -> RunResult:
    """Train as `collm train` does."""
    config = RunConfig(
        base=str(models.base),
        assistant=[str(path) for path in models.experts],
        data=str(directory / "train.jsonl"),
        validation=str(directory / "validation.jsonl"),
        metric="exact_match",
        rates=list(RATES),
        max_tokens=PARAMS.max_tokens,
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
        **LEARNING_RATES[method],
    )
    return train_collaboration(config, args)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory for models, report.html and results.json")
    parser.add_argument("--assistants", type=int, choices=(1, 2), default=1, help="1: geography, 2: chemistry too")
    parser.add_argument("--tokenizers", choices=(SAME, DIFFERENT), default=SAME, help="of the models")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds, whose results the table pools")
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    options = parser.parse_args(arguments)
    log_to_terminal()
    transformers.utils.logging.disable_progress_bar()  # tiny models load in an instant
    seeds = range(options.seed, options.seed + options.seeds)
    report = run(options.out, num_assistants=options.assistants, tokenizers=options.tokenizers, seeds=seeds)
    show(report, "whole answers right with 95% interval, entities never seen in training", options.out)


if __name__ == "__main__":
    main()
