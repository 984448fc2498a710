"""GSM8K with a calculator: train all models, measure every row, and write the table and the picture.

    python -m recipes.gsm8k_calculator.run --data DIR --out runs/gsm8k

Each stage leaves a complete directory or none, so an interrupted run resumes at the stage where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from collm import CoLLM, CoLLMConfig, CoLLMTrainer, DeferralHead, ModelSpec, SamplingParams, ToolSpec
from collm.artefact import library_versions
from collm.atomic import atomic_directory, atomic_file
from collm.core.policies import ThresholdPolicy
from collm.evaluation.calibration import ValidationItem, calibrate
from collm.models.language_model import LanguageModel
from collm.models.loading import load_model, load_tokenizer
from collm.models.members import AssistantSpec
from collm.run import score
from collm.training.data import Row
from collm.training.dataset import TrainingSet
from collm.training.examples import Examples, encode_rows
from collm.training.scores import Scores
from recipes.gsm8k_calculator.data import HUB_NAME, TEMPLATE, Problems, load_problems
from recipes.gsm8k_calculator.measure import Read, equations, read, results_in, written
from recipes.gsm8k_calculator.models import CONTEXT_TOKENS, SIZES, Size, make_models
from recipes.gsm8k_calculator.tables import write_picture, write_tables

THRESHOLDS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
BASE_ALONE, ASSISTANT_ALONE = 1.0, -1.0
CALCULATOR, MARKS_ONLY = ToolSpec("calculator"), ToolSpec("calculator", "marks")
PICTURED, PICTURED_SYSTEM = 3, "base and head with the calculator"
METRIC = "recipes.gsm8k_calculator.measure:mark_score"


@dataclass(frozen=True)
class Plan:
    """Sizes of a run.

    Attributes:
        size: sizes of the models.
        epochs: epochs of tuning the base, with and without assistants.
        batch_size: number of examples per update.
        learning_rate: learning rate of the base while it is tuned.
        test_problems: number of test problems that are read with the given solution.
        written_problems: number of these problems for which solutions are generated.
        calibration_problems: number of validation problems for calibration.
        max_new_tokens: limit for a solution.
        max_batch: number of solutions generated at once.
    """

    size: Size
    epochs: float
    batch_size: int
    learning_rate: float
    test_problems: int
    written_problems: int
    calibration_problems: int
    max_new_tokens: int
    max_batch: int


PLANS = {
    "small": Plan(SIZES["small"], 1.0, 32, 1e-3, 1319, 300, 60, 200, 64),
    "gpu": Plan(SIZES["gpu"], 2.0, 32, 1e-4, 1319, 1319, 300, 320, 128),
}


@dataclass(frozen=True)
class System:
    """A row of the table.

    Attributes:
        name: name of the row.
        model: the model that decodes.
        thresholds: thresholds at which solutions are generated.
        assistants: names of the assistants' scores.
        by_rule: whether an assistant writes wherever it does not abstain, without a head.
    """

    name: str
    model: CoLLM
    thresholds: Sequence[float]
    assistants: Sequence[str]
    by_rule: bool = False


class Run:
    """The stages. Each creates its directory in `out` unless it exists."""

    def __init__(self, plan: Plan, problems: Problems, out: Path, *, seed: int) -> None:
        self.plan, self.problems, self.out, self.seed = plan, problems, out, seed
        self.seconds: dict[str, float] = {}
        torch.set_num_threads(plan.size.threads)
        models = self._stage("models", lambda directory: make_models(problems, plan.size, directory, seed=seed))
        self.base, self.expert = (
            ModelSpec(str(models / name), dtype="float32", device=plan.size.device) for name in ("base", "arithmetic")
        )
        self.specs: dict[str, AssistantSpec] = {
            "calculator": CALCULATOR,
            "marks": MARKS_ONLY,
            "arithmetic": self.expert,
            "base": self.base,
        }
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(self.base)
        self.test = problems.test[: plan.test_problems]

    def examples(self, rows: Sequence[Row]) -> Examples:
        return encode_rows(rows, TEMPLATE, self.tokenizer, max_length=CONTEXT_TOKENS)

    def scores(self, name: str, split: str, examples: Examples) -> Scores:
        directory = self.out / "scores" / f"{split}-{name}"
        started = time.monotonic()
        scores = score(examples, self.specs[name], directory, self.tokenizer)
        self.seconds.setdefault(f"scoring {split} with {name}", time.monotonic() - started)
        return scores

    def tuned(self, name: str, assistants: Sequence[str], *, method: str = "full") -> CoLLM:
        """Train base and head with these assistants. Without assistants, train the base alone for as many steps."""
        directory = self._stage(name, lambda out: self._tune(out, assistants, method))
        return CoLLM.from_pretrained(directory, device=self.plan.size.device)

    def _tune(self, out: Path, assistants: Sequence[str], method: str) -> None:
        examples = self.examples(self.problems.train)
        scores = [self.scores(each, "train", examples) for each in assistants]
        base = load_model(self.base)
        head = DeferralHead(LanguageModel(base, name="base").hidden_size, max(len(assistants), 1))
        if not assistants:  # use an assistant without knowledge that the head never asks
            scores = [unknowing(self.scores("base", "train", examples), len(self.tokenizer))]
            torch.nn.init.constant_(head.bias, -20.0)
        with_head = TrainingSet(examples, scores, self.scores("base", "train", examples))
        with tempfile.TemporaryDirectory() as output:
            args = self._args(Path(output), method, warm_start=bool(assistants))
            trainer = CoLLMTrainer(base, head, args, with_head, vocab_size=len(self.tokenizer))
            outcome = trainer.train()
        training: dict[str, Any] = {"train_loss_nats": outcome.training_loss}
        if trainer.label_report is not None:
            training["pseudo_label_share"] = trainer.label_report.share
        members = [self.specs[each] for each in assistants] or [ToolSpec("date")]
        member = self.base if method == "head" else trainer.base
        CoLLM(member, members, head, self.tokenizer, template=TEMPLATE, training=training).save_pretrained(out)

    def _args(self, output: Path, method: str, *, warm_start: bool) -> CoLLMConfig:
        rates: dict[str, Any] = {} if method == "head" else {"learning_rate": self.plan.learning_rate}
        return CoLLMConfig(
            output_dir=str(output),
            method=method,
            max_length=CONTEXT_TOKENS,
            num_train_epochs=self.plan.epochs,
            per_device_train_batch_size=self.plan.batch_size,
            train_sampling_strategy="group_by_length",
            lr_scheduler_type="cosine",
            warm_start=warm_start,
            save_strategy="no",
            bf16=self.plan.size.bf16,
            use_cpu=self.plan.size.device == "cpu",
            seed=self.seed,
            **rates,
        )

    def calibrated(self, model: CoLLM) -> float:
        """Calibrate on validation problems, store the result in the artefact and return the chosen threshold."""
        rows = self.problems.validation[: self.plan.calibration_problems]
        started = time.monotonic()
        calibration = calibrate(
            model,
            [ValidationItem(row.prompt, row.completion) for row in rows],
            metric=METRIC,
            params=SamplingParams(max_new_tokens=self.plan.max_new_tokens),
            rates=(0.02, 0.05, 0.1, 0.2),
            max_batch=self.plan.max_batch,
        )
        model.save_calibration(self.out / "calculator")
        self.seconds["calibration"] = time.monotonic() - started
        return calibration.best().threshold

    def measure(self, system: System) -> dict[str, Any]:
        """Measure one system at all of its thresholds."""
        started = time.monotonic()
        examples = self.examples(self.test)
        predictions = self._read(system, examples)
        spans = results_in(examples, self.tokenizer)
        counts = [example.num_targets for example in examples]
        by_threshold = [
            {
                "threshold": threshold,
                "equations": asdict(equations(predictions.right(threshold), spans, counts)),
                "deferred": predictions.deferred(threshold).float().mean().item(),
                "in_vain": predictions.asked_in_vain(threshold).float().mean().item(),
            }
            for threshold in ([*THRESHOLDS] if len(system.thresholds) > 1 else system.thresholds)
        ]
        free = [{"threshold": eta, **asdict(self._write(system, eta))} for eta in system.thresholds]
        self.seconds[f"measuring {system.name}"] = time.monotonic() - started
        if system.by_rule:
            nll = predictions.rule_nll()
        else:
            nll = predictions.base_nll() if list(system.thresholds) == [BASE_ALONE] else predictions.nll()
        return {"name": system.name, "nll": nll, "given": by_threshold, "written": free}

    def _read(self, system: System, examples: Examples) -> Read:
        assistants = [self.scores(name, "test", examples) for name in system.assistants]
        base = system.model.base
        module = load_model(base) if isinstance(base, ModelSpec) else base
        model = LanguageModel(module, name="base", vocab_size=len(self.tokenizer))
        return read(model, system.model.head.to(model.device), examples, assistants)

    def _write(self, system: System, threshold: float) -> Any:
        rows = self.test[: self.plan.written_problems]
        params = SamplingParams(max_new_tokens=self.plan.max_new_tokens)
        policy = ThresholdPolicy(threshold)
        prompts = [row.prompt for row in rows]
        # A tool is also called for drafts. Without them, its calls are the tokens for which it was asked.
        out = system.model.generate(prompts, params, policy=policy, max_batch=self.plan.max_batch, lookahead=0)
        calls, abstained = (sum(getattr(used, name) for used in out.usage.values()) for name in ("calls", "abstained"))
        return written(out, rows, calls, abstained)

    def _stage(self, name: str, make: Callable[[Path], Any]) -> Path:
        directory = self.out / name
        if not directory.exists():
            print(f"--- {name}", file=sys.stderr, flush=True)
            started = time.monotonic()
            with atomic_directory(directory) as temporary:
                make(temporary)
            self.seconds[name] = time.monotonic() - started
        return directory


def unknowing(like: Scores, vocab_size: int) -> Scores:
    """Scores of an assistant that gives all tokens the same probability."""
    logprobs = torch.full_like(like.logprobs, -torch.tensor(float(vocab_size)).log().item())
    return replace(like, logprobs=logprobs, corrects=torch.zeros_like(like.corrects))


def systems(run: Run) -> list[System]:
    """All rows of the table, trained."""
    plain = run.tuned("tuned", [])
    frozen = run.tuned("calculator-head", ["calculator"], method="head")
    calculator = run.tuned("calculator", ["calculator"])
    expert = run.tuned("arithmetic", ["arithmetic"])
    both = run.tuned("both", ["calculator", "arithmetic"])
    chosen = run.calibrated(calculator)
    unused = DeferralHead(calculator.head.hidden_size, 1)
    tuned = ModelSpec(str(run.out / "tuned" / "base"), dtype="float32", device=run.plan.size.device)
    always, rule = (CoLLM(tuned, [spec], unused, run.tokenizer, template=TEMPLATE) for spec in (CALCULATOR, MARKS_ONLY))
    return [
        System("base", frozen, [BASE_ALONE], ["calculator"]),
        System("base tuned as long without the tool", plain, [BASE_ALONE], ["calculator"]),
        System("base frozen, head with the calculator", frozen, [0.2, 0.5], ["calculator"]),
        System(PICTURED_SYSTEM, calculator, sorted({0.05, 0.2, 0.5, 0.8, chosen}), ["calculator"]),
        System("base and head with the arithmetic LM", expert, [0.2, 0.5], ["arithmetic"]),
        System("base and head with both", both, [0.2, 0.5], ["calculator", "arithmetic"]),
        System("tuned base, calculator always asked", always, [ASSISTANT_ALONE], ["calculator"], by_rule=True),
        System("tuned base, calculator asked by a regex", rule, [ASSISTANT_ALONE], ["marks"], by_rule=True),
    ]


def seconds_before(out: Path) -> dict[str, float]:
    """Times of the stages in earlier runs that this run continues."""
    results = out / "results.json"
    return json.loads(results.read_text(encoding="utf-8"))["seconds"] if results.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default=HUB_NAME, help="directory of train.jsonl and test.jsonl, or a Hub name")
    parser.add_argument("--size", choices=PLANS, default="small")
    parser.add_argument("--out", type=Path, required=True, help="directory for models, scores and results")
    parser.add_argument("--docs", type=Path, help="folder that also receives the tables and the picture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; another number may round differently")
    options = parser.parse_args()
    plan = PLANS[options.size]
    plan = replace(plan, size=replace(plan.size, threads=options.threads))
    run = Run(plan, load_problems(options.data), options.out, seed=options.seed)
    rows = systems(run)
    pictured = next(system for system in rows if system.name == PICTURED_SYSTEM)
    results = {
        "command": "python -m recipes.gsm8k_calculator.run "
        + " ".join(f"--{name} {getattr(options, name)}" for name in ("size", "seed", "threads")),
        "versions": library_versions(),
        "test_problems": len(run.test),
        "written_problems": run.plan.written_problems,
        "rows": [run.measure(system) for system in rows],
    }
    results |= {"seconds": {**seconds_before(options.out), **run.seconds}}
    with atomic_file(options.out / "results.json") as temporary:
        temporary.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    for folder in filter(None, (options.out, options.docs)):
        write_tables(folder, results)
        write_picture(folder, pictured.model, 0.5, run.test[:PICTURED], run.plan.max_new_tokens)


if __name__ == "__main__":
    main()
