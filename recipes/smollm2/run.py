"""SmolLM2-135M with a calculator on GSM8K, from an empty directory to a served collaboration.

    python -m recipes.smollm2.run --data DIR --out runs/smollm2

Every stage leaves a file or a directory that is whole or absent, so an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from collm import CoLLM, CoLLMConfig, DeferralHead, ModelSpec, SamplingParams, ToolSpec
from collm.artefact import library_versions
from collm.atomic import atomic_file
from collm.core.policies import RandomPolicy, SingleAuthorPolicy, ThresholdPolicy
from collm.demo.real import smollm2
from collm.errors import ConfigError
from collm.evaluation.gold import gold_examples
from collm.models.loading import load_tokenizer
from collm.run import RunConfig, train_collaboration
from collm.training.data import Row, load_rows
from recipes.gsm8k_calculator.data import HUB_NAME, Problems, load_problems
from recipes.smollm2.measure import ORACLE, System, chat, read_solutions, solve, summary
from recipes.smollm2.plans import PLANS, Plan
from recipes.smollm2.tables import write_results

THRESHOLDS = (0.2, 0.5, 0.8)
SHOTS = 5
AS_IT_COMES, FEW_SHOT, TUNED = "as it comes", f"as it comes, {SHOTS} examples", "tuned as long without the tool"
REGEX, LEARNED, ALWAYS = "tuned, calculator by a regular expression", "learned", "learned, asked at every token"
RANDOM = "learned, asked at random"
METRIC = "recipes.gsm8k_calculator.measure:mark_score"


class Run:
    """The stages; each leaves what it made below `out` unless it is there.

    Raises:
        ConfigError: `out` holds a run with another plan or seed.
    """

    def __init__(self, plan: Plan, problems: Problems, out: Path, *, seed: int) -> None:
        self.plan, self.problems, self.out, self.seed = plan, problems, out, seed
        out.mkdir(parents=True, exist_ok=True)
        settings = json.dumps({**asdict(plan), "seed": seed}, indent=2) + "\n"
        kept = out / "plan.json"
        if kept.exists() and kept.read_text(encoding="utf-8") != settings:
            raise ConfigError(f"{out} holds a run with another plan or seed; choose another directory")
        _write(kept, settings)
        shuffled = random.Random(seed).sample(problems.train, len(problems.train))
        self.shots, rows = shuffled[:SHOTS], shuffled[SHOTS:]
        self.train, self.validation = rows[: plan.train_rows], problems.validation[: plan.validation_rows]
        self.test = problems.test[: plan.test_rows]
        for split, rows in {"train": self.train, "validation": self.validation, "test": self.test}.items():
            _write(out / f"{split}.jsonl", "".join(json.dumps(_as_chat(row)) + "\n" for row in rows))
        self.base = self._timed("fetching SmolLM2", out / "model", smollm2)

    def calculator(self) -> CoLLM:
        """Base and head trained together with the calculator, and calibrated."""
        return self._trained("calculator", "tool:calculator", warm_start=True)

    def tuned(self) -> CoLLM:
        """The base trained as long on the same rows, with a tool that never has anything to say."""
        return self._trained("tuned", "tool:date", warm_start=False)

    def _trained(self, name: str, assistant: str, *, warm_start: bool) -> CoLLM:
        made = self._timed(
            f"training: {name}", self.out / name / "collaboration", lambda _: self._train(name, assistant, warm_start)
        )
        return CoLLM.from_pretrained(made, device=self.plan.device, dtype=self.plan.dtype)

    def _train(self, name: str, assistant: str, warm_start: bool) -> None:
        """What `collm train` does with these options."""
        plan = self.plan
        config = RunConfig(
            base=str(self.base),
            assistant=[assistant],
            data=str(self.out / "train.jsonl"),
            validation=str(self.out / "validation.jsonl"),
            metric=METRIC,
            rates=[0.05, 0.1],
            refine=0,
            calibrate=warm_start,
            max_new_tokens=plan.max_new_tokens,
            dtype=plan.dtype if plan.method == "lora" else "float32",
            device=plan.device,
        )
        args = CoLLMConfig(
            output_dir=str(self.out / name),
            method=plan.method,
            max_length=plan.max_length,
            num_train_epochs=plan.epochs,
            per_device_train_batch_size=plan.batch_size,
            learning_rate=plan.learning_rate,
            lr_scheduler_type="cosine",
            train_sampling_strategy="group_by_length",
            warm_start=warm_start,
            save_steps=0.25,
            save_total_limit=1,
            bf16=plan.bf16,
            use_cpu=plan.device == "cpu",
            seed=self.seed,
        )
        train_collaboration(config, args)

    @cached_property
    def systems(self) -> list[System]:
        """The rows of the table."""
        learned, tuned = self.calculator(), self.tuned()
        spec = ModelSpec(str(self.base), dtype=self.plan.dtype, device=self.plan.device)
        nobody = DeferralHead(learned.head.hidden_size, 1)
        plain = CoLLM(spec, [ToolSpec("date")], nobody, load_tokenizer(spec), template=learned.template)
        regex = CoLLM(tuned.base, [ToolSpec("calculator", "marks")], nobody, tuned.tokenizer, template=tuned.template)
        chosen = learned.threshold()
        named = {f"{LEARNED}, threshold {eta:.2g}": eta for eta in THRESHOLDS} | {
            f"{LEARNED}, calibrated threshold {chosen:.2g}": chosen
        }
        return [
            System(AS_IT_COMES, plain, SingleAuthorPolicy(0), threshold=1.0),
            System(FEW_SHOT, plain, SingleAuthorPolicy(0), shots=SHOTS),
            System(TUNED, tuned, SingleAuthorPolicy(0), threshold=1.0),
            System(REGEX, regex, SingleAuthorPolicy(1)),
            *(System(name, learned, ThresholdPolicy(eta), threshold=eta) for name, eta in named.items()),
            System(ALWAYS, learned, SingleAuthorPolicy(1), threshold=-1.0),
        ]

    def measure(self) -> list[dict[str, Any]]:
        """Every row, measured."""
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
        params = SamplingParams(max_new_tokens=self.plan.max_new_tokens, seed=seed)
        rows = self.test[: self.plan.written_rows]
        return self._kept(
            f"solved, {system.name}", lambda: solve(system, rows, self.shots, params, self.plan.max_batch)
        )

    def _given(self) -> dict[str, Any]:
        """Of each system, what it makes of given solutions."""
        found: dict[str, Any] = {}
        models: dict[int, tuple[CoLLM, dict[str, float]]] = {}
        for system in self.systems:
            if system.threshold is not None:
                models.setdefault(id(system.model), (system.model, {}))[1][system.name] = system.threshold
        for model, thresholds in models.values():
            rows = load_rows(self.out / "test.jsonl")
            read = self._kept(
                f"given, {next(iter(thresholds))}",
                lambda model=model, rows=rows, thresholds=thresholds: read_solutions(
                    model, gold_examples(model, rows, max_length=1024), thresholds
                ),
            )
            found |= {
                name: values for name, values in read.items() if name != ORACLE or LEARNED in next(iter(thresholds))
            }
        return found

    def _kept(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What was measured under this name, now or in an earlier run."""
        path = self.out / "measured" / f"{name.replace(' ', '-').replace(',', '')}.json"
        self._timed(name, path, lambda path: _write(path, json.dumps(make()) + "\n"))
        return dict(json.loads(path.read_text(encoding="utf-8")))

    def _timed(self, name: str, place: Path, make: Callable[[Path], Any]) -> Path:
        if not place.exists():
            print(f"--- {name}", file=sys.stderr, flush=True)
            started = time.monotonic()
            make(place)
            _write(self.out / "seconds.json", json.dumps(self.seconds() | {name: round(time.monotonic() - started, 1)}))
        return place

    def seconds(self) -> dict[str, float]:
        """What each stage took, in whichever run it was made."""
        path = self.out / "seconds.json"
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def _as_chat(row: Row) -> dict[str, Any]:
    return {"messages": [*chat(row), {"role": "assistant", "content": row.completion}]}


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default=HUB_NAME, help="directory of train.jsonl and test.jsonl, or a Hub name")
    parser.add_argument("--size", choices=PLANS, default="cpu")
    parser.add_argument("--out", type=Path, required=True, help="where the model, the collaboration and the results go")
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
