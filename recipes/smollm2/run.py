"""SmolLM2-135M with a calculator on GSM8K, from an empty directory to a served collaboration.

    python -m recipes.smollm2.run --data DIR --out runs/smollm2

An interrupted run resumes at the stage where it stopped (`recipes.smollm2.stages`).
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from collm import CoLLM, DeferralHead, ModelSpec, SamplingParams, ToolSpec
from collm.artefact import library_versions
from collm.core.policies import RandomPolicy, SingleAuthorPolicy, ThresholdPolicy
from collm.demo.real import smollm2
from collm.evaluation.gold import gold_examples
from collm.models.loading import load_tokenizer
from collm.training.data import load_rows
from recipes.smollm2.gsm8k import HUB_NAME, Problems, load_problems
from recipes.smollm2.measure import ORACLE, System, read_solutions, solve, summary
from recipes.smollm2.plans import PLANS, Plan
from recipes.smollm2.stages import SILENT, Stages
from recipes.smollm2.tables import write_results

THRESHOLDS = (0.2, 0.5, 0.8)
SHOTS = 5
UNTUNED, FEW_SHOT, TUNED = "untuned", f"untuned, {SHOTS} examples", "tuned as long without the tool"
REGEX, LEARNED, ALWAYS = "tuned, calculator by a regular expression", "learned", "learned, asked at every token"
RANDOM = "learned, asked at random"
METRIC = "recipes.smollm2.gsm8k:mark_score"


class Run(Stages):
    """The stages of this recipe.

    Raises:
        ConfigError: `out` holds a run with another plan or seed.
    """

    def __init__(self, plan: Plan, problems: Problems, out: Path, *, seed: int) -> None:
        super().__init__(plan, out, seed=seed)
        shuffled = random.Random(seed).sample(problems.train, len(problems.train))
        self.shots, rows = shuffled[:SHOTS], shuffled[SHOTS:]
        self.train_file = self.chats("train", rows[: plan.train_rows])
        self.validation_file = self.chats("validation", problems.validation[: plan.validation_rows])
        self.test = problems.test[: plan.test_rows]
        self.test_file = self.chats("test", self.test)
        self.base = self.made("fetching SmolLM2", "model", smollm2)

    def calculator(self) -> CoLLM:
        """Train base and head together with the calculator, and calibrate."""
        return self._trained("calculator", "tool:calculator", warm_start=True)

    def tuned(self) -> CoLLM:
        """Train the base for as long on the same rows, without an assistant."""
        return self._trained("tuned", SILENT, warm_start=False)

    def _trained(self, name: str, assistant: str, *, warm_start: bool) -> CoLLM:
        metric = METRIC if warm_start else None
        return self.load(
            self.trained(
                name,
                self.base,
                assistant,
                self.train_file,
                self.validation_file,
                metric=metric,
                warm_start=warm_start,
                lr_scheduler_type="cosine",
            )
        )

    @cached_property
    def systems(self) -> list[System]:
        """The rows of the table."""
        learned, tuned = self.calculator(), self.tuned()
        spec = ModelSpec(str(self.base), dtype=self.plan.dtype, device=self.plan.device)
        unused = DeferralHead(learned.head.hidden_size, 1)
        plain = CoLLM(spec, [ToolSpec.parse(SILENT)], unused, load_tokenizer(spec), template=learned.template)
        regex = CoLLM(tuned.base, [ToolSpec("calculator", "marks")], unused, tuned.tokenizer, template=tuned.template)
        chosen = learned.threshold()
        named = {f"{LEARNED}, threshold {eta:.2g}": eta for eta in THRESHOLDS} | {
            f"{LEARNED}, calibrated threshold {chosen:.2g}": chosen
        }
        return [
            System(UNTUNED, plain, SingleAuthorPolicy(0), threshold=1.0),
            System(FEW_SHOT, plain, SingleAuthorPolicy(0), shots=SHOTS),
            System(TUNED, tuned, SingleAuthorPolicy(0), threshold=1.0),
            System(REGEX, regex, SingleAuthorPolicy(1)),
            *(System(name, learned, ThresholdPolicy(eta), threshold=eta) for name, eta in named.items()),
            System(ALWAYS, learned, SingleAuthorPolicy(1), threshold=-1.0),
        ]

    def measure(self) -> list[dict[str, Any]]:
        """Measure every row."""
        systems = self.systems
        solved = {system.name: self._solved(system) for system in systems}
        chosen = next(system for system in systems if "calibrated" in system.name)
        rate = solved[chosen.name]["calls"]
        at_random = System(RANDOM, chosen.model, RandomPolicy(rate))
        solved[RANDOM] = self._solved(at_random, seed=self.seed)
        given = self._given()
        rows = [{"name": name, "given": given.get(name), **summary(one, solved[TUNED])} for name, one in solved.items()]
        return [*rows, {"name": ORACLE, "given": given[ORACLE]}]

    def _solved(self, system: System, seed: int | None = None) -> dict[str, Any]:
        params = SamplingParams(max_tokens=self.plan.max_tokens, seed=seed)
        rows = self.test[: self.plan.written_rows]
        return self.kept(f"solved, {system.name}", lambda: solve(system, rows, self.shots, params, self.plan.max_batch))

    def _given(self) -> dict[str, Any]:
        """Measurements of each system on given solutions."""
        found: dict[str, Any] = {}
        models: dict[int, tuple[CoLLM, dict[str, float]]] = {}
        for system in self.systems:
            if system.threshold is not None:
                models.setdefault(id(system.model), (system.model, {}))[1][system.name] = system.threshold
        for model, thresholds in models.values():
            rows = load_rows(self.test_file)
            read = self.kept(
                f"given, {next(iter(thresholds))}",
                lambda model=model, rows=rows, thresholds=thresholds: read_solutions(
                    model, gold_examples(model, rows, max_length=1024), thresholds
                ),
            )
            found |= {
                name: values for name, values in read.items() if name != ORACLE or LEARNED in next(iter(thresholds))
            }
        return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default=HUB_NAME, help="directory of train.jsonl and test.jsonl, or a Hub name")
    parser.add_argument("--size", choices=PLANS, default="cpu")
    parser.add_argument("--out", type=Path, required=True, help="directory for models and results")
    parser.add_argument("--docs", type=Path, help="also write the table into this folder's results.md")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve", action="store_true", help="serve the collaboration at the end")
    options = parser.parse_args(arguments)
    run = Run(PLANS[options.size], load_problems(options.data), options.out, seed=options.seed)
    rows = run.measure()
    results = {
        "command": f"python -m recipes.smollm2.run --data DIR --out DIR --size {options.size} --seed {options.seed}",
        "plan": asdict(run.plan),
        "versions": library_versions(),
        "rows": rows,
        "seconds": run.seconds(),
    }
    write_results(options.out, results, options.docs)
    command = [sys.executable, "-m", "collm", "serve", str(options.out / "calculator" / "collaboration")]
    if options.serve:
        subprocess.run(command, check=True)
    else:
        print(f"serve it: collm serve {command[-1]}")


if __name__ == "__main__":
    main()
