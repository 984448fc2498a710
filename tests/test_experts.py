"""One assistant more or less in a trained run: the new one writes its tokens, and what was there stays."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from collm import CoLLM, CoLLMConfig, SamplingParams
from collm.cli.main import app
from collm.errors import ConfigError
from collm.run import RunConfig, train_collaboration
from collm.run.calibrate import PastRun
from collm.run.experts import add_assistants, drop_assistant
from collm.run.options import Addition

pytestmark = pytest.mark.slow
SavedModel = Callable[..., Path]


def write(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows(mark: str, says: str) -> list[dict[str, str]]:
    return [{"prompt": f"w{i} w{j} {mark}", "completion": says} for i in range(20, 30) for j in range(20, 24)]


@pytest.fixture
def setting(saved_model: SavedModel, tmp_path: Path) -> dict[str, Any]:
    """Words that only tables know: w11 after w5, and w12 after w6."""
    for name, mark, says in (("first", "w5", "w11"), ("second", "w6", "w12")):
        (tmp_path / f"{name}.csv").write_text(f"pattern,a\n{mark} {{a}},{says}\n")
        write(tmp_path / f"{name}.jsonl", rows(mark, says))
    base = saved_model("base", 0, hidden_size=96)
    return {"base": str(base), "assistant": [f"tool:lookup:{tmp_path / 'first.csv'}"]}


def train(setting: dict[str, Any], tmp_path: Path, **how: Any) -> Path:
    options = {"method": "head", "num_train_epochs": 10, "max_length": 32, "head_learning_rate": 0.01, **how}
    run = RunConfig(**setting, data=str(tmp_path / "first.jsonl"), max_tokens=1, rates=[0.0, 0.5], refine=0)
    train_collaboration(
        run, CoLLMConfig(output_dir=str(tmp_path / "run"), use_cpu=True, disable_tqdm=True, **options), quiet=True
    )
    return tmp_path / "run"


def addition(tmp_path: Path, **more: Any) -> Addition:
    return Addition(str(tmp_path / "second.jsonl"), [f"tool:lookup:{tmp_path / 'second.csv'}"], **more)


GAIN = {"objective": "gain", "num_train_epochs": 2.0, "head_learning_rate": None}


@pytest.mark.parametrize("how", [{}, {"method": "lora", "lora_r": 2}, GAIN], ids=["head", "lora", "gain"])
def test_a_new_assistant_writes_its_own_and_nothing_else(
    how: dict[str, Any], setting: dict[str, Any], tmp_path: Path
) -> None:
    run = train(setting, tmp_path, **how)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    old = CoLLM.from_pretrained(run / "collaboration")
    _, found = add_assistants(run, addition(tmp_path), tmp_path / "more", quiet=True)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    model = CoLLM.from_pretrained(tmp_path / "more" / "collaboration")
    assert torch.equal(model.head.weight[:1], old.head.weight)
    assert torch.equal(model.head.bias[:1], old.head.bias)
    changes = {change.kind: change for change in found}
    assert changes["old"].same == changes["old"].prompts == 4
    assert changes["new"].before == 0
    assert changes["new"].after >= 0.75
    asked = [row["prompt"] for mark in ("w5", "w6") for row in rows(mark, "")]
    first = [one.authors[0] for one in model.generate(asked, SamplingParams(max_tokens=1))]
    assert how == GAIN or first == [1] * 40 + [2] * 40  # a gain head defers where the gain pays


def test_an_assistant_is_dropped_and_another_added(setting: dict[str, Any], tmp_path: Path) -> None:
    run = train(setting, tmp_path)
    old = CoLLM.from_pretrained(run / "collaboration")
    add_assistants(run, addition(tmp_path, old_biases=True, sample=10), tmp_path / "more", quiet=True)
    past = PastRun.read(tmp_path / "more")
    assert len(past.rows()) == 8  # a tenth of both
    assert len(past.config.load(past.config.data, None)) == 10 + 36
    with pytest.raises(ConfigError, match=r"cannot drop third.csv .* expected one of .* it has assistant \(tool:"):
        drop_assistant(tmp_path / "more", "third.csv", tmp_path / "less")
    dropped, _ = drop_assistant(tmp_path / "more", "assistant-2", tmp_path / "less", quiet=True)
    assert torch.equal(dropped.model.head.weight, old.head.weight)
    with pytest.raises(ConfigError, match=r"cannot drop assistant .* expected one of several assistants"):
        drop_assistant(tmp_path / "less", "assistant", tmp_path / "none")
    again, _ = add_assistants(tmp_path / "less", addition(tmp_path), tmp_path / "again", quiet=True)
    assert again.model.head.num_assistants == 2


def test_the_commands_say_what_changed(setting: dict[str, Any], tmp_path: Path) -> None:
    run = train(setting, tmp_path)
    given = ["--assistant", f"tool:lookup:{tmp_path / 'second.csv'}", "--data", str(tmp_path / "second.jsonl")]
    done = CliRunner().invoke(app, ["add", str(run), *given, "--out", str(tmp_path / "more")], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "old prompts: 4 of 4 answers have the same tokens" in done.output
    assert "new prompts: 0 of 4 answers have the same tokens; exact_match 0.000 before, 1.000 now" in done.output
    named = ["--assistant", given[1], "--out", str(tmp_path / "less")]
    done = CliRunner().invoke(app, ["drop", str(tmp_path / "more"), *named], catch_exceptions=False)
    assert done.exit_code == 0, done.output


def test_options_that_do_not_fit_are_refused(setting: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no assistant to add; name at least one with --assistant"):
        Addition("data.jsonl")
    with pytest.raises(ConfigError, match="sample is -1, expected at least 0 rows"):
        addition(tmp_path, sample=-1)
    with pytest.raises(ConfigError, match=r"there is no .*run.yaml of a training run"):
        add_assistants(tmp_path, addition(tmp_path), tmp_path / "more")
    run = train(setting, tmp_path, deferral_cost=[0.1])
    assert add_assistants(run, addition(tmp_path), tmp_path / "more", quiet=True)
