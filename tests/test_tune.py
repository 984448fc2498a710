"""`collm tune`: one model alone, on the same rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from collm import DeferralHead
from collm.cli.main import main
from collm.errors import ConfigError
from collm.models.loading import ModelSpec, load_model, load_tokenizer
from collm.run import RunConfig, tune_model
from collm.training.config import CoLLMConfig
from collm.training.module import JointModule

SavedModel = Callable[..., Path]
ROWS = [{"prompt": f"w{i % 20}", "completion": f"w{(i * 3) % 30} w{i % 11}"} for i in range(60)]


def nll(model: PreTrainedModel, tokenizer: Any) -> float:
    """Mean NLL of the completions' tokens, in nats."""
    total, count = 0.0, 0
    for row in ROWS:
        prompt, whole = (
            tokenizer(text)["input_ids"] for text in (row["prompt"], f"{row['prompt']} {row['completion']}")
        )
        with torch.no_grad():
            logprobs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        total -= sum(float(logprobs[at - 1, whole[at]]) for at in range(len(prompt), len(whole)))
        count += len(whole) - len(prompt)
    return total / count


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_tuned_model_is_a_model_like_any_other(method: str, saved_model: SavedModel, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    base = saved_model("base", 0)
    config = RunConfig(base=str(base), assistant=[], data=str(data), calibrate=False, template="{prompt} ")
    how: dict[str, Any] = {"method": method, "learning_rate": 1e-2, "num_train_epochs": 3, "warm_start": False}
    args = CoLLMConfig(output_dir=str(tmp_path / "run"), use_cpu=True, disable_tqdm=True, max_length=32, **how)
    out = tune_model(config, args, quiet=True)
    assert out == tmp_path / "run" / "model"
    spec, before = ModelSpec(str(out)), ModelSpec(str(base))
    assert load_tokenizer(spec).get_vocab() == load_tokenizer(before).get_vocab()
    assert nll(load_model(spec), load_tokenizer(spec)) < nll(load_model(before), load_tokenizer(before)) - 0.5
    assert tune_model(config, args, quiet=True) == out, "a finished run is found again"


def test_its_loss_is_that_of_a_language_model(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model(0)
    joint = JointModule(model, DeferralHead(32, 0))
    ids = torch.randint(3, 90, (2, 9))
    mask = torch.rand(2, 8) < 0.6
    inputs = {"input_ids": ids[:, :-1], "attention_mask": torch.ones(2, 8, dtype=torch.long), "gold": ids[:, 1:]}
    loss = joint(target_mask=mask, assistant_logprobs=torch.zeros(2, 8, 0), **inputs)["loss"]
    loss.backward()
    found = model.lm_head.weight.grad.clone()
    model.zero_grad()
    expected = F.cross_entropy(model(ids[:, :-1]).logits[mask], ids[:, 1:][mask])
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, model.lm_head.weight.grad)


def test_options_of_a_collaboration_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["collm", "tune", "--model", "x", "--data", "y", "--output-dir", str(tmp_path / "run")]
    monkeypatch.setattr("sys.argv", [*command, "--assistant", "z"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "assistant has no effect on a model that is tuned alone" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["collm", "tune", "--help"])
    with pytest.raises(SystemExit):
        main()
    shown = capsys.readouterr().out
    assert "--model" in shown
    assert "--assistant" not in shown
    config = RunConfig(base="x", assistant=[], data="y", calibrate=False)
    with pytest.raises(ConfigError, match="no assistant, warm start or quantization"):
        tune_model(config, CoLLMConfig(output_dir=str(tmp_path / "run"), use_cpu=True))
