"""A base with Llama-2's tokenizer, trained on GSM8K, and SmolLM2 with its own: is text more likely under both together?

    python -m recipes.smollm2.two_tokenizers --data DIR --tokenizers DIR --out runs/two-tokenizers

Every stage leaves its output in `--out`, so an interrupted run resumes where it stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.tokenizers import fetch, load
from collm import CoLLM, CoLLMConfig
from collm.artefact import library_versions
from collm.atomic import atomic_file
from collm.core.head import defer_probs
from collm.core.objective import marginal_logprobs
from collm.demo.real import smollm2
from collm.evaluation.gold import gold_examples, gold_views
from collm.evaluation.intervals import Interval, statistic_interval
from collm.run import RunConfig, train_collaboration
from collm.training.data import Row, load_rows, write_rows
from recipes.smollm2.from_scratch import make_base
from recipes.smollm2.gsm8k import HUB_NAME, load_problems

BASE_TOKENIZER = "Llama-2"
TEMPLATE = "{prompt}\n"
STEPS, TRAIN_ROWS, TEST_ROWS = 500, 160, 80


def make(data: str, tokenizers: Path, out: Path, *, steps: int, train_rows: int, test_rows: int) -> CoLLM:
    """Create the pair with a head trained on scores of both. The rows are written to `out` as JSON Lines."""
    out.mkdir(parents=True, exist_ok=True)
    problems = load_problems(data)
    splits = {"train": problems.train[:train_rows], "validation": problems.validation[:20]}
    for name, rows in {**splits, "test": problems.test[:test_rows]}.items():
        write_rows(out / f"{name}.jsonl", rows)
    base, assistant = out / "base", smollm2(out / "model")
    if not base.exists():
        fetch(tokenizers)
        tokenizer = load(tokenizers, BASE_TOKENIZER).tokenizer
        tokenizer.eos_token = "</s>"
        texts = [TEMPLATE.replace("{prompt}", str(row.prompt)) + row.completion for row in problems.train]
        make_base(texts, tokenizer, base, steps=steps, seed=0)
    config = RunConfig(
        base=str(base),
        assistant=[str(assistant)],
        data=str(out / "train.jsonl"),
        validation=str(out / "validation.jsonl"),
        template=TEMPLATE,
        calibrate=False,
        dtype="float32",
        device="cpu",
    )
    args = CoLLMConfig(
        output_dir=str(out / "run"),
        method="head",
        max_length=512,
        num_train_epochs=10,
        per_device_train_batch_size=16,
        head_learning_rate=1e-2,
        save_strategy="no",
        use_cpu=True,
    )
    if not (out / "run" / "collaboration").exists():
        train_collaboration(config, args)
    return CoLLM.from_pretrained(out / "run" / "collaboration", device="cpu")


def measure(model: CoLLM, rows: Sequence[Row]) -> dict[str, Any]:
    """Nats per byte of the solutions, for each model alone and for both, with intervals over problems."""
    examples = gold_examples(model, rows, max_length=1024)
    views = gold_views(model, examples)
    joint = marginal_logprobs(views.base_logprob, views.assistant_logprobs, views.defer_logits)
    counts = [example.num_targets for example in examples]
    sums = {
        "base": views.base_logprob,
        "SmolLM2": views.assistant_logprobs[:, 0],
        "joint": joint,
    }
    nats = {name: torch.stack([one.sum() for one in (-values).split(counts)]) for name, values in sums.items()}
    size = torch.tensor([float(len(row.completion.encode())) for row in rows])
    deferring = defer_probs(views.defer_logits)
    return {
        "problems": len(rows),
        "segments": len(joint),
        "segments_per_base_token": len(joint) / sum(sum(example.is_target) for example in examples),
        "nats_per_byte": {name: asdict(_ratio(values, size)) for name, values in nats.items()},
        "joint_minus": {name: asdict(_ratio(nats["joint"] - nats[name], size)) for name in ("base", "SmolLM2")},
        "defer_prob": deferring.mean().item(),
        "deferred_at_0.5": (deferring > 0.5).double().mean().item(),
        "greedy_right": {
            "base": views.base_correct.double().mean().item(),
            "SmolLM2": views.assistant_correct[:, 0].double().mean().item(),
        },
    }


def _ratio(nats: torch.Tensor, size: torch.Tensor) -> Interval:
    """Nats per byte over all problems. The interval resamples problems."""
    items = list(zip(nats.tolist(), size.tolist(), strict=True))
    return statistic_interval(lambda sums: sums[..., 0] / sums[..., 1], items)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default=HUB_NAME, help="directory of train.jsonl and test.jsonl, or a Hub name")
    parser.add_argument("--tokenizers", type=Path, required=True, help="tokenizers; missing ones are fetched")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps of the base")
    parser.add_argument("--train_rows", type=int, default=TRAIN_ROWS)
    parser.add_argument("--test_rows", type=int, default=TEST_ROWS)
    options = parser.parse_args(arguments)
    sizes = {name: getattr(options, name) for name in ("steps", "train_rows", "test_rows")}
    model = make(options.data, options.tokenizers, options.out, **sizes)
    command = "python -m recipes.smollm2.two_tokenizers --data DIR --tokenizers DIR --out DIR"
    results = {
        "command": command + "".join(f" --{name} {value}" for name, value in sizes.items()),
        "versions": library_versions(),
        **measure(model, load_rows(options.out / "test.jsonl")),
    }
    with atomic_file(options.out / "results.json") as temporary:
        temporary.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
