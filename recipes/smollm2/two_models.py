"""SmolLM2's first layers as the base and the whole model as the assistant: does the head learn when to ask?

    python -m recipes.smollm2.two_models --data DIR --out runs/two-models

The base is healed on text and solutions. The assistant is tuned on other solutions. On a third set they learn to
collaborate. Then rules that choose between the two are compared at equal deferral rates. An interrupted run resumes at
the stage where it stopped (`recipes.smollm2.stages`).
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from torch import nn

from collm import ModelSpec
from collm.artefact import library_versions
from collm.atomic import atomic_directory
from collm.core.policies import ThresholdPolicy
from collm.demo.real import smollm2
from collm.evaluation.compare import Evaluation, compare
from collm.evaluation.gold import gold_examples
from collm.evaluation.systems import systems_named
from collm.evaluation.tasks.gsm8k import Gsm8k
from collm.models.loading import load_model, load_tokenizer
from collm.training.data import Row, load_rows
from recipes.smollm2.gsm8k import HUB_NAME, Problems, load_problems
from recipes.smollm2.plans import PAIR_PLANS, PairPlan
from recipes.smollm2.rules import compared, read_pair, threshold_at
from recipes.smollm2.stages import SILENT, Stages, write
from recipes.smollm2.tables import write_pair

RATES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
WRITTEN_RATES = (0.1, 0.3, 0.5)
PARAGRAPH = 900
"""Number of characters in a paragraph of documentation."""
TOGETHER, FROZEN = "base and head together", "head alone, on the tuned base"
WITH_COST = "{}, with a deferral cost"


class PairRun(Stages):
    """The stages of this recipe.

    Raises:
        ConfigError: `out` holds a run with another plan or seed.
    """

    plan: PairPlan

    def __init__(self, plan: PairPlan, problems: Problems, out: Path, *, seed: int) -> None:
        super().__init__(plan, out, seed=seed)
        rows = iter(random.Random(seed).sample(problems.train, len(problems.train)))
        texts = random.Random(seed).sample(list(documentation()), plan.heal_texts)
        healing, expert, train = (
            [next(rows) for _ in range(count)] for count in (plan.heal_rows, plan.expert_rows, plan.train_rows or 0)
        )
        self.healing = self.chats("healing", [*healing, *texts])
        self.expert_rows = self.chats("expert", expert)
        self.train = self.chats("train", train)
        self.validation = self.chats("validation", problems.validation[: plan.validation_rows])
        self.test = self.chats("test", problems.test[: plan.test_rows])
        written = problems.test[: plan.written_rows]
        self.items = out / "items.jsonl"
        write(self.items, "".join(json.dumps({"question": r.prompt, "answer": r.completion}) + "\n" for r in written))
        self.whole = self.made("fetching SmolLM2", "model", smollm2)
        self.cut = self.made("cutting layers off", "cut", self._cut)

    def _cut(self, out: Path) -> None:
        """Save the first layers, with embedding, last norm and output layer."""
        spec = ModelSpec(str(self.whole), dtype="float32", device="cpu")
        model: Any = load_model(spec)
        model.model.layers = nn.ModuleList(list(model.model.layers)[: self.plan.layers])
        model.config.num_hidden_layers = self.plan.layers
        with atomic_directory(out) as directory:
            model.save_pretrained(directory)
            load_tokenizer(spec).save_pretrained(directory)

    def alone(self, name: str, model: Path, rows: Path, **options: Any) -> Path:
        """Train a model on rows without an assistant, and return its directory."""
        return self.trained(name, model, SILENT, rows, self.validation, warm_start=False, **options) / "base"

    @property
    def healed(self) -> Path:
        return self.alone("healed", self.cut, self.healing, learning_rate=self.plan.heal_learning_rate)

    @property
    def assistant(self) -> Path:
        return self.alone("assistant", self.whole, self.expert_rows)

    @property
    def tuned(self) -> Path:
        """The base, trained for as long on the collaboration's rows, without the assistant."""
        return self.alone("tuned", self.healed, self.train)

    def together(self, cost: float = 0.0) -> Path:
        """A collaboration whose base and head were trained together with a deferral cost."""
        data = str(self.assistant), self.train, self.validation
        return self.trained(_name("together", cost), self.healed, *data, objective="marginal", deferral_cost=cost)

    def frozen(self, cost: float = 0.0) -> Path:
        """A collaboration whose head was trained on a base that was trained without the assistant."""
        options = {"method": "head", "objective": "marginal", "learning_rate": 0.0}
        data = str(self.assistant), self.train, self.validation
        return self.trained(_name("frozen", cost), self.tuned, *data, deferral_cost=cost, **options)

    def measure(self) -> dict[str, Any]:
        """Measure the rules on given solutions, and generated solutions."""
        given = {}
        ways = [(TOGETHER, self.together), (FROZEN, self.frozen)]
        for (way, train), cost in product(ways, (0.0, self.plan.deferral_cost)):
            collaboration = train(cost)
            measured = self.kept(f"given, {collaboration.parent.name}", partial(self._given, collaboration))
            given[WITH_COST.format(way) if cost else way] = measured
        if not self.plan.written_rows:
            return {"given": given}
        return {"given": given, "written": self.kept("written", lambda: self._written(given[TOGETHER]))}

    def _given(self, collaboration: Path) -> dict[str, Any]:
        model = self.load(collaboration)
        examples = gold_examples(model, load_rows(self.test), max_length=1024)
        untuned = load_model(ModelSpec(str(self.healed), dtype=self.plan.dtype, device=self.plan.device))
        return compared(read_pair(model, examples, untuned), RATES, model.tokenizer)

    def _written(self, given: dict[str, Any]) -> dict[str, Any]:
        """Run `collm eval` on the first test problems, at thresholds that defer at the rates `WRITTEN_RATES`."""
        model = self.load(self.together())
        thresholds = [threshold_at(given, rate) for rate in WRITTEN_RATES]
        names = ["base", "assistant", f"sft={self.tuned}", "random", "confidence"]
        names += [f"threshold={eta!r}" for eta in thresholds[::2]]
        systems = systems_named(model, names, ThresholdPolicy(thresholds[1]))
        task, size = Gsm8k(), self.plan.max_batch
        asked = Evaluation(task, task.read(self.items, None), chat=True, max_batch=size, seed=self.seed)
        return compare(systems, asked, self.out / "written").to_dict()


def _name(stage: str, cost: float) -> str:
    return f"{stage}-with-cost" if cost else stage


def documentation() -> Iterator[Row]:
    """Paragraphs of Python's documentation as installed with the interpreter, each as the answer to its title."""
    for title, text in sorted(topics.items()):
        for start in range(0, len(text) - PARAGRAPH, PARAGRAPH):
            yield Row(title, text[start : start + PARAGRAPH], None, f"topic {title}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default=HUB_NAME, help="directory of train.jsonl and test.jsonl, or a Hub name")
    parser.add_argument("--size", choices=PAIR_PLANS, default="cpu")
    parser.add_argument("--out", type=Path, required=True, help="directory for the models and the results")
    parser.add_argument("--docs", type=Path, help="also write the table into this folder's results.md")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if find_spec("matplotlib") is None:
        parser.error("the picture of the results needs matplotlib: pip install matplotlib")
    run = PairRun(PAIR_PLANS[options.size], load_problems(options.data), options.out, seed=options.seed)
    command = "python -m recipes.smollm2.two_models --data DIR --out DIR"
    results = {
        "command": f"{command} --size {options.size} --seed {options.seed}",
        "plan": asdict(run.plan),
        "versions": library_versions(),
        **run.measure(),
        "seconds": run.seconds(),
    }
    write(options.out / "results.json", json.dumps(results, indent=2) + "\n")
    for folder in filter(None, (options.out, options.docs)):
        write_pair(folder, results)


if __name__ == "__main__":
    main()
