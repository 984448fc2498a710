"""Stages of a run. Each leaves a file or a directory that is whole or absent, so an interrupted run goes on there."""

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

SILENT = "tool:date"
"""A tool that never has anything to say in these texts: a base trained with it is trained alone."""


class Stages:
    """What a run has made below `out`.

    Raises:
        ConfigError: `out` holds a run with another plan or seed.
    """

    def __init__(self, plan: Plan, out: Path, *, seed: int) -> None:
        self.plan, self.out, self.seed = plan, out, seed
        settings = json.dumps({**asdict(plan), "seed": seed}, indent=2) + "\n"
        kept = out / "plan.json"
        if kept.exists() and kept.read_text(encoding="utf-8") != settings:
            raise ConfigError(f"{out} holds a run with another plan or seed; choose another directory")
        write(kept, settings)

    def chats(self, name: str, rows: Iterable[Row]) -> Path:
        """The file with these rows as chats."""
        path = self.out / f"{name}.jsonl"
        listed = ({"messages": [*chat(row), {"role": "assistant", "content": row.completion}]} for row in rows)
        write(path, "".join(json.dumps(one) + "\n" for one in listed))
        return path

    def made(self, stage: str, name: str, make: Callable[[Path], Any]) -> Path:
        """The file or directory of this name, made unless it is there."""
        place = self.out / name
        if not place.exists():
            print(f"--- {stage}", file=sys.stderr, flush=True)
            started = time.monotonic()
            make(place)
            seconds = self.seconds() | {stage: round(time.monotonic() - started, 1)}
            write(self.out / "seconds.json", json.dumps(seconds))
        return place

    def kept(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What was measured under this name, now or in an earlier run."""
        file = f"measured/{name.replace(' ', '-').replace(',', '')}.json"
        path = self.made(name, file, lambda path: write(path, json.dumps(make()) + "\n"))
        return dict(json.loads(path.read_text(encoding="utf-8")))

    def seconds(self) -> dict[str, float]:
        """What each stage took, in whichever run it was made."""
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
        """The collaboration of this name, trained unless it is there: what `collm train` does with these options.

        Args:
            metric: with which it is calibrated; None for not at all.
            method: in place of the plan's.
            options: of `CoLLMConfig`, in place of the plan's.
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
            max_new_tokens=plan.max_new_tokens,
            dtype="float32" if method == "full" else plan.dtype,
            device=plan.device,
        )
        chosen = {
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
        args = CoLLMConfig(output_dir=str(self.out / name), method=method, **(chosen | options))
        return self.made(f"training: {name}", f"{name}/collaboration", lambda _: train_collaboration(config, args))

    def load(self, collaboration: Path) -> CoLLM:
        return CoLLM.from_pretrained(collaboration, device=self.plan.device, dtype=self.plan.dtype)


def write(path: Path, text: str) -> None:
    """Replace a file by this text, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
