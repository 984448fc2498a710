"""Forty lookup tools, each with its own row of the head, added ten at a time.

python -m recipes.facts.many_tools --out tools-out
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from collm.atomic import write_text
from collm.cli.terminal import log_to_terminal
from collm.collaboration import CoLLM
from collm.core.head import defer_probs
from collm.evaluation.calibration import EVEN_ODDS
from collm.evaluation.gold import gold_examples, gold_views
from collm.run import RunConfig, train_collaboration
from collm.run.experts import add_assistants
from collm.run.options import Addition
from collm.training.config import CoLLMConfig
from collm.training.data import load_rows, write_rows
from recipes.facts.lessons import conversations, encoder
from recipes.facts.tiny_models import Progress, Recipe, make_tokenizer, save_model, trained_model
from recipes.facts.world import Domain, Entity, Statement, Template

TOOLS, AT_ONCE, THINGS, VALUES = 40, 10, 60, 12
SPLITS = {"train": range(40), "validation": range(40, 44), "test": range(44, 60)}
BASE_RECIPE = Recipe(hidden_size=96, steps=300, learning_rate=8e-3)


@dataclass(frozen=True)
class ToolWorld:
    """Things with forty properties, each of which only one tool knows."""

    domain: Domain

    @property
    def statements(self) -> list[Statement]:
        return list(self.domain.statements(self.domain.entities))


def make_world(seed: int) -> ToolWorld:
    rng = random.Random(seed)
    kinds = [f"property{k}" for k in range(TOOLS)]
    facts = [{kind: f"value{rng.randrange(VALUES)}of{kind}" for kind in kinds} for _ in range(THINGS)]
    templates = [
        Template(kind, f"Tell me the {kind} of {{name}}.", f"The {kind} of {{name}} is {{fact}}.") for kind in kinds
    ]
    things = tuple(Entity(f"thing{n}", each) for n, each in enumerate(facts))
    return ToolWorld(Domain("things", things, tuple(templates)))


def rows_of(world: ToolWorld, tools: range, split: str) -> list[dict[str, str]]:
    """The questions of one split about the properties that these tools know."""
    things = [world.domain.entities[n] for n in SPLITS[split]]
    domain = Domain("", (), world.domain.templates[tools.start : tools.stop])
    return [statement.row for statement in domain.statements(things)]


def write_tables(world: ToolWorld, out: Path) -> list[str]:
    """A table for each tool."""
    out.mkdir(parents=True, exist_ok=True)
    for number, template in enumerate(world.domain.templates):
        pattern = template.answer.replace("{fact}.", "{fact}")
        lines = [f"{pattern},{one.name},{one.facts[template.kind]}" for one in world.domain.entities]
        (out / f"{number}.csv").write_text("\n".join(["pattern,name,fact", *lines]) + "\n", encoding="utf-8")
    return [f"tool:lookup:{out / str(number)}.csv" for number in range(TOOLS)]


def routing(model: CoLLM, rows_file: Path, tools: range) -> dict[str, float]:
    """Of the places of facts the share where the right tool is asked, and calls elsewhere per 100 tokens."""
    rows = load_rows(rows_file)
    examples = gold_examples(model, rows)
    views = gold_views(model, examples)
    threshold = EVEN_ODDS if model.calibration is None else model.calibration.best().threshold
    asked = torch.where(defer_probs(views.defer_logits) > threshold, views.defer_logits.argmax(-1) + 1, 0)
    right = elsewhere = 0
    sizes = [example.num_targets for example in examples]
    for number, (one, row) in enumerate(zip(torch.split(asked, sizes), rows, strict=True)):
        tool = 1 + number % len(tools)
        place = next(i for i, word in enumerate(row.completion.split()) if word.startswith("value"))
        right += int(one[place]) == tool
        elsewhere += int((one != 0).sum()) - int(one[place] != 0)
    return {"right_tool": right / len(rows), "false_calls_per_100_tokens": 100 * elsewhere / len(asked)}


def run(out: Path, seed: int) -> dict[str, Any]:
    world = make_world(seed)
    tokenizer, rng = make_tokenizer(cast(Any, world)), random.Random(f"{seed} base")
    lessons = conversations([world.domain], encoder(tokenizer), cast(int, tokenizer.eos_token_id), rng)
    save_model(trained_model(BASE_RECIPE, tokenizer, lessons, rng, Progress(0)), tokenizer, out / "base")
    tables, steps = write_tables(world, out / "tables"), []
    for start in range(0, TOOLS, AT_ONCE):
        tools, now = range(start, start + AT_ONCE), time.monotonic()
        files = {split: out / "rows" / f"{split}-{start}.jsonl" for split in SPLITS}
        files["test"].parent.mkdir(exist_ok=True)
        for split in ("train", "validation"):
            write_rows(files[split], rows_of(world, tools, split))
        write_rows(files["test"], rows_of(world, range(start + AT_ONCE), "test"))
        here, own = out / f"run-{start + AT_ONCE}", tables[start : start + AT_ONCE]
        data: dict[str, Any] = {"data": str(files["train"]), "validation": str(files["validation"])}
        if start == 0:
            config = RunConfig(
                base=str(out / "base"), assistant=own, max_tokens=16, rates=[], refine=0, **cast(Any, data)
            )
            args = CoLLMConfig(
                output_dir=str(here), method="head", num_train_epochs=8, max_length=64, use_cpu=True,
                head_learning_rate=1e-2, per_device_train_batch_size=16, logging_strategy="no", save_strategy="no",
            )  # fmt: skip
            model = train_collaboration(config, args).model
        else:
            model = add_assistants(out / f"run-{start}", Addition(assistant=own, **data), here)[0].model
        seconds = time.monotonic() - now
        measured = routing(model, files["test"], range(start + AT_ONCE))
        steps.append({"tools": start + AT_ONCE, "seconds_per_tool": round(seconds / AT_ONCE, 2), **measured})
    return {"steps": steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of the base, tables, runs and results.json")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    log_to_terminal()
    found = run(options.out, options.seed)
    write_text(options.out / "results.json", json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
