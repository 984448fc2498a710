"""Experts that are adapters of one model, and an expert that joins a trained collaboration.

python -m recipes.facts.experts --out experts-out
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig, get_peft_model

from collm.atomic import write_text
from collm.cli.terminal import log_to_terminal
from collm.collaboration import CoLLM
from collm.core.types import deferral_rate
from collm.evaluation.metrics import exact_match
from collm.models.loading import ModelSpec, load_model
from collm.run import RunConfig, train_collaboration
from collm.run.experts import add_assistants
from collm.run.options import Addition
from collm.training.config import CoLLMConfig
from collm.training.data import write_rows
from recipes.facts.lessons import conversations, encoder, noisy_facts
from recipes.facts.run import EPOCHS, LEARNING_RATES
from recipes.facts.systems import MAX_BATCH, PARAMS
from recipes.facts.tiny_models import (
    EXPERT_RECIPE,
    Progress,
    make_models,
    make_tokenizer,
    save_model,
    train_model,
    trained_model,
)
from recipes.facts.world import DemoWorld, Domain

RANK = 16
ADAPTER_RECIPE = replace(EXPERT_RECIPE, steps=1200, learning_rate=1e-2)
RATES = (0.1,)
Rows = list[dict[str, str]]


def make_adapters(world: DemoWorld, out: Path, *, seed: int) -> list[str]:
    """Train one model of an expert's size that knows no facts, and an adapter of it for each domain.

    Returns:
        MODEL+ADAPTER of each domain.
    """
    tokenizer, rng = make_tokenizer(world), random.Random(f"{seed} shared")
    encode, steps = encoder(tokenizer), EXPERT_RECIPE.steps
    lessons = conversations(world.domains, encode, cast(int, tokenizer.eos_token_id), rng)
    shared = out / "shared"
    save_model(trained_model(EXPERT_RECIPE, tokenizer, lessons, rng, Progress(steps)), tokenizer, shared)
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    for domain in world.domains:
        rng = random.Random(f"{seed} adapter {domain.name}")
        adapted: Any = get_peft_model(load_model(ModelSpec(str(shared))), lora)  # type: ignore[arg-type]
        train_model(adapted, ADAPTER_RECIPE, noisy_facts(domain, encode, rng), rng, Progress(ADAPTER_RECIPE.steps))
        adapted.save_pretrained(out / domain.name)
    return [f"{shared}+{out / domain.name}" for domain in world.domains]


def of_domain(domain: Domain, rows: Rows) -> Rows:
    """The rows that ask about a domain."""
    asked = {statement.prompt for statement in domain.statements(domain.entities)}
    return [row for row in rows if row["prompt"] in asked]


def train(out: Path, name: str, base: Path, experts: Sequence[str], data: Path, method: str) -> CoLLM:
    """Train on rows of a directory, as `recipes.facts.run` does."""
    rows = {"data": str(data / "train.jsonl"), "validation": str(data / "validation.jsonl"), "metric": "exact_match"}
    config = RunConfig(
        base=str(base),
        assistant=list(experts),
        max_tokens=PARAMS.max_tokens,
        max_batch=MAX_BATCH,
        rates=list(RATES),
        refine=0,
        **cast(Any, rows),
    )
    options = {"num_train_epochs": EPOCHS[method], "per_device_train_batch_size": 16, "max_length": 128}
    options |= {"save_strategy": "no", "logging_strategy": "no", "use_cpu": True, **LEARNING_RATES[method]}
    args = CoLLMConfig(output_dir=str(out / name), method=method, **cast(Any, options))
    return train_collaboration(config, args).model


def measure(model: CoLLM, rows: Rows) -> tuple[dict[str, float], list[list[int]]]:
    """The share of whole answers that are right, the deferral rate, and the tokens of each answer."""
    answers = model.generate([row["prompt"] for row in rows], PARAMS, max_batch=MAX_BATCH)
    right = [exact_match(one.text, row["completion"]) for one, row in zip(answers, rows, strict=True)]
    rate = deferral_rate([author for one in answers for author in one.authors])
    return {"right": sum(right) / len(right), "deferral_rate": rate}, [one.token_ids for one in answers]


def run(out: Path, experts: str, method: str, seed: int) -> dict[str, Any]:
    """Train geography and chemistry together, and one after the other."""
    world = DemoWorld(num_assistants=2, seed=seed)
    models = make_models(world, out / "models", seed=seed)
    separate = experts == "models"
    names = [str(path) for path in models.experts] if separate else make_adapters(world, out / "adapted", seed=seed)
    sets = {"both": {split: getattr(world, split) for split in ("train", "validation", "test")}}
    for domain in world.domains:
        sets[domain.name] = {split: of_domain(domain, rows) for split, rows in sets["both"].items()}
    for kind, splits in sets.items():
        (out / "rows" / kind).mkdir(parents=True, exist_ok=True)
        for split, rows in splits.items():
            write_rows(out / "rows" / kind / f"{split}.jsonl", rows)
    trained = {
        "both": train(out, "both", models.base, names, out / "rows" / "both", method),
        "geography alone": train(out, "geography", models.base, names[:1], out / "rows" / "geography", method),
    }
    started, later = time.monotonic(), out / "rows" / "chemistry"
    added = Addition(str(later / "train.jsonl"), names[1:], str(later / "validation.jsonl"))
    extended, changes = add_assistants(out / "geography", added, out / "added")
    trained["chemistry added"] = extended.model
    found: dict[str, Any] = {
        "experts": experts,
        "method": method,
        "seconds_to_add": round(time.monotonic() - started, 1),
    }
    found["changes"], answers = list(map(str, changes)), {}
    for system, model in trained.items():
        measured = {name: measure(model, splits["test"]) for name, splits in sets.items()}
        found[system] = {name: numbers for name, (numbers, _) in measured.items()}
        answers[system] = measured["geography"][1]
    pairs = zip(answers["geography alone"], answers["chemistry added"], strict=True)
    found["same_geography_answers"] = sum(one == other for one, other in pairs), len(answers["geography alone"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of the models, runs and results.json")
    parser.add_argument("--experts", choices=("models", "adapters"), default="models", help="what the experts are")
    parser.add_argument("--method", choices=sorted(EPOCHS), default="full", help="what is trained")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    log_to_terminal()
    found = run(options.out, options.experts, options.method, options.seed)
    write_text(options.out / "results.json", json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
