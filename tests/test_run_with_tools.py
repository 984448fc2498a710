"""Training with programs as assistants: who owns what is found without labels, and the artefact says what it runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from collm import CoLLM, CoLLMConfig, DeferralHead, ModelSpec, SamplingParams, ToolSpec
from collm.errors import ArtefactError, ConfigError, LoadError, ToolFailure
from collm.run import RunConfig, train_collaboration
from tests.processes import collm
from tests.tools import functions

ADDER = "tool:tests.tools.functions:add_words"
SavedModel = Callable[..., Path]


def rows() -> list[dict[str, str]]:
    """After w5 a sum that only the tool knows, after w6 a word that only the assistant knows."""
    pairs = [(i, j) for i in range(10, 20) for j in range(10, 20)]
    sums = [{"prompt": f"w{i} w{j} w5", "completion": f"w{i + j + 20}"} for i, j in pairs]
    names = [{"prompt": f"w{i} w{j} w6", "completion": "w7"} for i, j in pairs]
    return [row for both in zip(sums, names, strict=True) for row in both]


def always_says(directory: Path, token_id: int) -> Path:
    """Teaches the saved model one word."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        ids = torch.randint(3, 97, (32, 4), generator=generator)
        logits = model(ids).logits[:, -1]
        loss = torch.nn.functional.cross_entropy(logits, torch.full((32,), token_id))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(directory)
    return directory


def run(tmp_path: Path, base: Path, assistants: list[str], **changes: object) -> CoLLM:
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    config = RunConfig(data=str(data), base=str(base), assistant=assistants, max_tokens=2, **changes)  # type: ignore[arg-type]
    options = {"method": "head", "num_train_epochs": 20, "per_device_train_batch_size": 20, "max_length": 32}
    options |= {"use_cpu": True, "disable_tqdm": True, "head_learning_rate": 0.01, "output_dir": str(tmp_path / "run")}
    return train_collaboration(config, CoLLMConfig(**options), quiet=True).model


@pytest.mark.slow
def test_a_model_and_a_tool_get_the_tokens_they_own(saved_model: SavedModel, tmp_path: Path) -> None:
    expert = always_says(saved_model("expert", 1), 10)
    model = run(tmp_path, saved_model("base", 0, hidden_size=96), [str(expert), ADDER])
    out = model.generate([row["prompt"] for row in rows()], SamplingParams(max_tokens=1), threshold=0.5)
    right = [c.text.strip() == row["completion"] for c, row in zip(out, rows(), strict=True)]
    owner = [c.authors[0] == (2 if row["prompt"].endswith("w5") else 1) for c, row in zip(out, rows(), strict=True)]

    assert sum(right) / len(right) > 0.97
    assert sum(owner) / len(owner) > 0.97
    card = (tmp_path / "run/collaboration/README.md").read_text()
    assert f"assistant-2: `{ADDER}`, code that is not included" in card


@pytest.mark.slow
def test_code_of_others_runs_only_when_trusted(saved_model: SavedModel, tmp_path: Path) -> None:
    run(tmp_path, saved_model("base", 0), [ADDER])
    collaboration = tmp_path / "run/collaboration"
    with pytest.raises(ArtefactError, match=r"would run .*tool:tests.tools.functions:add_words.*--trust-code"):
        CoLLM.from_pretrained(collaboration)
    trusting = CoLLM.from_pretrained(collaboration, trust_code=True)
    out = trusting.generate("w11 w12 w5", SamplingParams(max_tokens=1), threshold=-1)
    assert out[0].text == " w43"
    assert CoLLM.from_pretrained(collaboration, assistants=[ToolSpec("calculator")]).assistants == (
        ToolSpec("calculator"),
    )
    command = ("generate", collaboration, "w11 w12 w5", "--threshold", -1, "--max-tokens", 1)
    refused = collm(*command, cwd=tmp_path)
    assert refused.returncode == 1
    assert "--trust-code" in refused.stderr
    done = collm(*command, "--trust-code", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "w43"


def test_a_table_travels_with_the_artefact(
    saved_model: SavedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    table = tmp_path / "facts.csv"
    table.write_text("pattern,a,b\nw1 {a} {b},w2,w3\n")
    base = ModelSpec(str(saved_model("base", 0)))
    model = CoLLM(base, [ToolSpec.parse(f"tool:lookup:{table}")], DeferralHead(32, 1), tokenizer)
    model.save_pretrained(tmp_path / "made")
    table.unlink()
    (tmp_path / "made").rename(tmp_path / "moved")
    moved = CoLLM.from_pretrained(tmp_path / "moved")
    assert moved.generate("w1 w2", SamplingParams(max_tokens=1), threshold=-1)[0].text == " w3"
    moved.save_pretrained(tmp_path / "moved")  # over itself
    again = CoLLM.from_pretrained(tmp_path / "moved")
    assert again.generate("w1 w2", SamplingParams(max_tokens=1), threshold=-1)[0].text == " w3"
    assert json.loads((tmp_path / "moved/collm.json").read_text())["assistants"][0]["argument"] == (
        "tables/assistant.csv"
    )
    shutil.rmtree(tmp_path / "moved/tables")
    with pytest.raises(ArtefactError, match=r"the table .*assistant.csv of assistant is missing"):
        again.save_pretrained(tmp_path / "other")


def test_a_function_is_an_assistant_as_it_stands(
    saved_model: SavedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = CoLLM(ModelSpec(str(saved_model("base", 0))), [functions.add_words], DeferralHead(32, 1), tokenizer)
    model.save_pretrained(tmp_path / "saved")
    loaded = CoLLM.from_pretrained(tmp_path / "saved", trust_code=True)
    assert loaded.assistants == (ToolSpec("tests.tools.functions:add_words"),)
    with pytest.raises(ConfigError, match="an assistant is a int, expected a model, a spec or a function"):
        CoLLM(ModelSpec(str(tmp_path)), [3], DeferralHead(32, 1), tokenizer)  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="the base is tool:calculator, expected a language model"):
        CoLLM(ToolSpec("calculator"), [ToolSpec("calculator")], DeferralHead(32, 1), tokenizer)  # type: ignore[arg-type]


def test_a_tool_that_fails_stops_the_run_with_the_text(saved_model: SavedModel, tmp_path: Path) -> None:
    base = saved_model("base", 0)
    with pytest.raises(LoadError, match=r"could not load tool:nowhere:f: .*No module named 'nowhere'"):
        run(tmp_path, base, ["tool:nowhere:f"])
    assert not (tmp_path / "run").exists()
    with pytest.raises(ToolFailure, match="raised ValueError: always; the text so far ends with"):
        run(tmp_path, base, ["tool:tests.tools.functions:failing"])


def test_options_of_tools_reach_them_and_are_refused_without_one() -> None:
    config = RunConfig(data="d", base="b", assistant=[ADDER], tool_eps=0.1, tool_seconds=3)
    assert config.assistants == [ToolSpec("tests.tools.functions:add_words", eps=0.1, seconds=3)]
    with pytest.raises(ConfigError, match="tool_eps has no effect without a tool"):
        RunConfig(data="d", base="b", assistant=["a"], tool_eps=0.1)
    with pytest.raises(ConfigError, match="tool_seconds has no effect without a Python function as an assistant"):
        RunConfig(data="d", base="b", assistant=["tool:calculator"], tool_seconds=3)
    with pytest.raises(ConfigError, match="the base is tool:calculator, expected a language model"):
        RunConfig(data="d", base="tool:calculator", assistant=["a"])
