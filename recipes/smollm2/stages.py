"""Stages of a run. Each leaves a complete file or directory or none, so an interrupted run resumes where it stopped."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from collm import CoLLM, CoLLMConfig
from collm.atomic import atomic_file
from collm.errors import ConfigError
from collm.run import RunConfig, train_collaboration
from collm.training.data import Row
from recipes.smollm2.measure import chat
from recipes.smollm2.plans import Plan

SILENT = "tool:recipes.smollm2.silent:silent"
"""A base that is trained with this tool is trained alone."""


class Stages:
    """The files and directories that a run has created in `out`.

    Raises:
        ConfigError: `out` holds a run with another plan or seed.
    """

    def __init__(self, plan: Plan, out: Path, *, seed: int) -> None:
        self.plan, self.out, self.seed = plan, out, seed
        settings = json.dumps({**asdict(plan), "seed": seed}, indent=2) + "\n"
        plan_file = out / "plan.json"
        if plan_file.exists() and plan_file.read_text(encoding="utf-8") != settings:
            raise ConfigError(f"{out} holds a run with another plan or seed; choose another directory")
        write(plan_file, settings)

    def chats(self, name: str, rows: Iterable[Row]) -> Path:
        """Write these rows as chats and return the file."""
        path = self.out / f"{name}.jsonl"
        chats = ({"messages": [*chat(row), {"role": "assistant", "content": row.completion}]} for row in rows)
        write(path, "".join(json.dumps(one) + "\n" for one in chats))
        return path

    def made(self, stage: str, name: str, make: Callable[[Path], Any]) -> Path:
        """Return the file or directory of this name. Create it if it does not exist."""
        path = self.out / name
        if not path.exists():
            print(f"--- {stage}", file=sys.stderr, flush=True)
            started = time.monotonic()
            make(path)
            seconds = self.seconds() | {stage: round(time.monotonic() - started, 1)}
            write(self.out / "seconds.json", json.dumps(seconds))
        return path

    def kept(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the measurements of this name, from an earlier run if it has them."""
        file = f"measured/{name.replace(' ', '-').replace(',', '')}.json"
        path = self.made(name, file, lambda path: write(path, json.dumps(make()) + "\n"))
        return dict(json.loads(path.read_text(encoding="utf-8")))

    def seconds(self) -> dict[str, float]:
        """Seconds that each stage took, in the run that created it."""
        path = self.out / "seconds.json"
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}

    def trained(
        self,
        name: str,
        base: Path,
        assistant: str,
        train: Path,
        validation: Path,
        *,
        metric: str | None = None,
        method: str | None = None,
        **options: Any,
    ) -> Path:
        """Return the collaboration of this name. If it does not exist, train it as `collm train` does with these
        options.

        Args:
            name: name of the stage's directory.
            base: directory of the base.
            assistant: directory or name of the assistant.
            train, validation: files of rows.
            metric: metric for calibration. If None, the collaboration is not calibrated.
            method: training method, in place of the plan's.
            options: fields of `CoLLMConfig`, in place of the plan's.
        """
        plan, method = self.plan, method or self.plan.method
        config = RunConfig(
            base=str(base),
            assistant=[assistant],
            data=str(train),
            validation=str(validation),
            metric=metric or "last_number",
            rates=[0.05, 0.1],
            refine=0,
            calibrate=metric is not None,
            max_tokens=plan.max_tokens,
            dtype="float32" if method == "full" else plan.dtype,
            device=plan.device,
            cache_hidden_states=method == "head",
        )
        defaults = {
            "max_length": plan.max_length,
            "num_train_epochs": plan.epochs,
            "per_device_train_batch_size": plan.batch_size,
            "learning_rate": plan.learning_rate,
            "train_sampling_strategy": "group_by_length",
            "save_steps": 0.25,
            "save_total_limit": 1,
            "bf16": plan.bf16,
            "use_cpu": plan.device == "cpu",
            "seed": self.seed,
        }
        if method == "head":  # fitted on stored hidden states, without epochs
            del defaults["num_train_epochs"]
        args = CoLLMConfig(output_dir=str(self.out / name), method=method, **(defaults | options))
        return self.made(f"training: {name}", f"{name}/collaboration", lambda _: train_collaboration(config, args))

    def load(self, collaboration: Path) -> CoLLM:
        return CoLLM.from_pretrained(collaboration, device=self.plan.device, dtype=self.plan.dtype, trust_code=True)


def write(path: Path, text: str) -> None:
    """Replace a file atomically by this text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
