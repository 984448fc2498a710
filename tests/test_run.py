"""One run from two checkpoints to an artefact: the three ways of training, resuming, and what is refused."""

from __future__ import annotations

import copy
import json
import shutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast, TrainerCallback

from collm import CoLLM, CoLLMConfig, SamplingParams
from collm.atomic import sole_writer
from collm.errors import ConfigError, DataError, MismatchError
from collm.models.loading import ModelSpec, load_model
from collm.run import RunConfig, RunResult, train_collaboration
from collm.run.data import split_rows
from collm.text.chats import Chat
from collm.training.checkpoints import last_checkpoint
from collm.training.scores import read_header
from collm.training.trainer import CoLLMTrainer

pytestmark = pytest.mark.slow

SavedModel = Callable[..., Path]


@pytest.fixture
def setting(saved_model: SavedModel, tmp_path: Path) -> dict[str, Any]:
    rows = [{"prompt": f"w{i % 20} w{i % 7}", "completion": f"w{(i * 3) % 30} w{i % 11} w{i % 5}"} for i in range(60)]
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "base": str(saved_model("base", 0)),
        "assistant": [str(saved_model("first", 1)), str(saved_model("second", 2, hidden_size=48))],
        "data": str(data),
        "template": "w9 {prompt} w8",
        "max_tokens": 4,
        "rates": [0.0, 0.5, 1.0],
    }


def train(setting: dict[str, Any], directory: Path, **changes: Any) -> RunResult:
    how = {"method": "head", "max_length": 32, "num_train_epochs": 2, "per_device_train_batch_size": 8, **changes}
    args = CoLLMConfig(output_dir=str(directory), use_cpu=True, disable_tqdm=True, **how)
    return train_collaboration(RunConfig(**setting), args, quiet=True)


def check_same(loaded: CoLLM, trained: CoLLM, *thresholds: float) -> None:
    params = SamplingParams(max_tokens=6)
    for threshold in thresholds:
        came, expected = (model.generate(["w1 w2", "w5"], params, threshold=threshold) for model in (loaded, trained))
        assert [c.token_ids for c in came] == [c.token_ids for c in expected]


@pytest.mark.parametrize(
    ("method", "changes", "folder"),
    [
        ("head", {}, None),
        ("head", {"objective": "gain"}, None),
        ("full", {"learning_rate": 1e-3}, "base"),
        ("lora", {"lora_r": 2, "learning_rate": 1e-3}, "adapter"),
    ],
)
def test_each_way_of_training_gives_an_artefact_that_loads(
    method: str, changes: dict[str, Any], folder: str | None, setting: dict[str, Any], tmp_path: Path
) -> None:
    result = train(setting, tmp_path / "run", method=method, **changes)
    folders = {path.name for path in result.directory.iterdir() if path.is_dir()}
    assert folders == ({folder} if folder else set())
    loaded = CoLLM.from_pretrained(result.directory)
    assert loaded.template.text == "w9 {prompt} w8"
    check_same(loaded, result.model, 0.4)
    assert loaded.calibration == result.calibration
    assert loaded.head.weight.abs().sum() > 0
    card = (result.directory / "README.md").read_text()
    assert f"- method: {method}" in card
    assert result.calibration.num_prompts == 6  # a tenth of the rows, held out


DEFAULT = (
    "{% for m in messages %}{{ 'w1' if m.role == 'user' else 'w2' }} {{ m.content }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}w2 {% endif %}"
)
TOOL_USE = "w3 {% for tool in tools %}{{ tool.function.name }} {% endfor %}" + DEFAULT


@pytest.mark.parametrize("method", ["full", "head"])
@pytest.mark.parametrize(
    "named",
    [
        {"default": DEFAULT, "tool_use": TOOL_USE},
        {"tool_use": TOOL_USE, "rag": "w4", "default": DEFAULT},
        {"default": TOOL_USE.replace("in tools", "in tools or []")},
        TOOL_USE.replace("in tools", "in tools or []"),
    ],
    ids=["two", "more", "one named", "one"],
)
def test_a_tokenizer_with_named_chat_templates(
    named: Any, method: str, setting: dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    own = copy.deepcopy(tokenizer)
    own.chat_template = named
    for model in (setting["base"], *setting["assistant"]):
        own.save_pretrained(model)
    tools = [{"type": "function", "function": {"name": "w7"}}]
    chat = [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w8"}]
    rows = [{"messages": chat, "tools": tools if i % 2 else None} for i in range(20)]
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"data": str(data), "template": "{prompt}"}
    result = train({**setting, **changes}, tmp_path / "run", method=method, warm_start=False)
    loaded = CoLLM.from_pretrained(result.directory)
    assert loaded.template == result.model.template
    opening = [] if isinstance(named, dict) and len(named) > 1 else ["w3"]
    for given, before in ((None, opening), (tools, ["w3", "w7"])):
        prompt = Chat(chat[:1], given)
        ids = loaded.template.encode_prompt(loaded.tokenizer, prompt)
        assert tokenizer.convert_ids_to_tokens(ids) == [*before, "w1", "w5", "w6", "<eos>", "w2"]
        transformers_ids = own.apply_chat_template(chat[:1], tools=given, add_generation_prompt=True)["input_ids"]
        assert ids == transformers_ids
        loaded.generate([prompt], SamplingParams(max_tokens=2))


@pytest.mark.parametrize("body", ["return 2", "return prediction.score"])
def test_a_metric_that_is_none_is_refused_before_anything_is_scored(
    body: str, setting: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"metric_{len(body)}"
    (tmp_path / f"{name}.py").write_text(f"def close(prediction, reference):\n    {body}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=rf"metric '{name}:close' (returned 2|raised AttributeError)"):
        train({**setting, "metric": f"{name}:close"}, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def artefact_bytes(run: Path) -> dict[str, bytes]:
    names = ("head.safetensors", "calibration.json", "base/model.safetensors")
    return {name: (run / "collaboration" / name).read_bytes() for name in names}


class StopAt(TrainerCallback):  # type: ignore[misc]
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@contextmanager
def stopped_at(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A training in this block is interrupted after this step."""
    plain = CoLLMTrainer.__init__
    with monkeypatch.context() as patch:
        patch.setattr(CoLLMTrainer, "__init__", lambda s, **kw: plain(s, **kw, callbacks=[StopAt(step)]))
        with pytest.raises(KeyboardInterrupt):
            yield


@pytest.mark.parametrize("what", ["rows", "weights of the base", "assistants", "evaluation rows"])
def test_a_checkpoint_of_other_rows_or_models_is_not_resumed(
    what: str, setting: dict[str, Any], saved_model: SavedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting |= {"validation": str(shutil.copy(setting["data"], tmp_path / "validation.jsonl")), "calibrate": False}
    again = partial(train, setting, tmp_path / "run", save_steps=2, method="full", eval_strategy="steps", eval_steps=2)
    with stopped_at(5, monkeypatch):
        again()
    if what.endswith("rows"):
        path = Path(setting["data" if what == "rows" else "validation"])
        path.write_text(path.read_text().replace('"w3 ', '"w4 '))
    elif what == "assistants":
        saved_model("second", 7, hidden_size=48)
    else:
        saved_model("base", 7)
    for _ in range(2):  # before anything is scored, and where the scores were removed
        with pytest.raises(ConfigError, match=f"checkpoint-4 .* with different {what}.* delete the checkpoints"):
            again()
        shutil.rmtree(tmp_path / "run/scores", ignore_errors=True)
    for checkpoint in (tmp_path / "run").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    again()
    assert (tmp_path / "run/collaboration").exists()


def test_an_interrupted_run_ends_with_the_same_bytes(
    setting: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = {"method": "full", "learning_rate": 1e-3, "save_steps": 2}
    train(setting, tmp_path / "whole", **how)
    with stopped_at(9, monkeypatch):
        train(setting, tmp_path / "cut", **how)
    assert not (tmp_path / "cut" / "collaboration").exists()
    train(setting, tmp_path / "cut", **how)
    assert artefact_bytes(tmp_path / "cut") == artefact_bytes(tmp_path / "whole")


def test_other_options_in_the_same_directory_are_refused(setting: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "file").touch()
    with pytest.raises(ConfigError, match="exists and holds no run"):
        train(setting, tmp_path / "foreign")
    with pytest.raises(ConfigError, match="exists and holds no run"):
        train(setting, tmp_path / "foreign" / "file")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".run.yaml.x").touch()  # of a run that was killed while it wrote its first file
    with sole_writer(tmp_path / "run"), pytest.raises(ConfigError, match=r"is being written by process \d+ on "):
        train(setting, tmp_path / "run")
    train(setting, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"holds a run with seed=42, now it is 43"):
        train(setting, tmp_path / "run", seed=43)
    with pytest.raises(ConfigError, match="holds a run with template='w9"):
        train({**setting, "template": "{prompt}"}, tmp_path / "run")


def test_the_assistants_are_not_in_memory_while_training(
    setting: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[torch.nn.Module]] = []
    load, plain = load_model, CoLLMTrainer.train

    def load_and_note(spec: Any) -> Any:
        model = load(spec)
        loaded.append(weakref.ref(model))
        return model

    alive: list[tuple[int, int]] = []

    def count_and_train(self: CoLLMTrainer, **kwargs: Any) -> Any:
        alive.append((len(loaded), sum(ref() is not None for ref in loaded)))
        return plain(self, **kwargs)

    for module in ("models.members", "models.loading", "run.train"):
        monkeypatch.setattr(f"collm.{module}.load_model", load_and_note)
    monkeypatch.setattr(CoLLMTrainer, "train", count_and_train)
    train(setting, tmp_path / "run")
    assert alive == [(4, 1)]  # base, two assistants, and the base again to be trained


def test_a_pair_that_does_not_fit_is_refused_before_scoring(setting: dict[str, Any], tmp_path: Path) -> None:
    path = Path(setting["assistant"][1]) / "tokenizer.json"
    path.write_text(path.read_text().replace('"w40"', '"x40"'))
    with pytest.raises(MismatchError, match=r"assistant-2 .*token 43 is 'x40'"):
        train(setting, tmp_path / "run")
    assert not (tmp_path / "run").exists()  # so that the corrected command may use it


def test_held_out_rows_are_a_tenth_at_random_and_never_trained_on(tmp_path: Path) -> None:
    def split(count: int, seed: int = 0) -> tuple[set[str], set[str]]:
        path = tmp_path / f"{count}.jsonl"
        path.write_text("".join(f'{{"prompt": "p{i}", "completion": "c"}}\n' for i in range(count)))
        rows = split_rows(RunConfig(data=str(path), base="b", assistant=["a"]), seed=seed)
        return {str(row.prompt) for row in rows[0]}, {str(row.prompt) for row in rows[1]}

    train, validation = split(300)
    assert (len(train), len(validation), train & validation) == (270, 30, set())
    assert len(split(3000)[1]) == 200
    assert split(300)[1] == validation != split(300, seed=1)[1]
    with pytest.raises(ConfigError, match="9 rows are too few"):
        split(9)


def test_models_may_name_a_revision(tmp_path: Path) -> None:
    assert (ModelSpec.parse("me/model@v2").path, ModelSpec.parse("me/model@v2").revision) == ("me/model", "v2")
    assert ModelSpec.parse("me/model").revision is None
    (tmp_path / "a@b").mkdir()
    assert ModelSpec.parse(str(tmp_path / "a@b")).revision is None


def test_a_published_format_and_its_bad_rows(setting: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"question": f"w{i % 20} w{i % 7}", "answer": f"w{(i * 3) % 30} <<1+1=2>>w{i % 11}"} for i in range(60)]
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    lines = [json.dumps(row) for row in rows]
    (folder / "train.jsonl").write_text("\n".join([*lines[:5], '{"question": "w1"}', *lines[5:]]))
    changes = {"data": str(folder), "data_split": "train", "format": "gsm8k-plain"}
    with pytest.raises(DataError, match=r"train\.jsonl:6"):
        train({**setting, **changes}, tmp_path / "stopped")
    changes |= {"bad_rows": "skip", "assistant": setting["assistant"][:1]}
    result = train({**setting, **changes}, tmp_path / "run", pseudo_label_variant="b")
    assert result.metrics["bad_rows_skipped"] == 1
    shown, _, learned = (tmp_path / "run/example.txt").read_text().partition("--- its target tokens ---\n")
    assert shown.startswith("--- the first example ---\nw9 w")
    assert learned.startswith("w")
    assert learned.endswith("<eos>\n")


def test_evaluations_while_training_use_the_validation_rows(setting: dict[str, Any], tmp_path: Path) -> None:
    saving = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    patience = {"early_stopping_patience": 1, "head_learning_rate": 0.5, "num_train_epochs": 20}
    result = train(setting, tmp_path / "run", **saving, **patience)
    scored = {path.name for path in (tmp_path / "run/scores/validation").iterdir()}
    assert scored == {"base", "assistant", "assistant-2"}
    checkpoint = last_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    history = json.loads((checkpoint / "trainer_state.json").read_text())
    losses = [entry["eval_loss"] for entry in history["log_history"] if "eval_loss" in entry]
    assert 1 < len(losses) < 20
    assert result.metrics["eval_loss"] == pytest.approx(min(losses), rel=1e-5)
    assert json.loads((tmp_path / "run/metrics.json").read_text())["eval_loss"] == result.metrics["eval_loss"]


def test_hidden_states_kept_on_disk_train_the_same_head(setting: dict[str, Any], tmp_path: Path) -> None:
    shape = {"head": "mlp", "head_width": 8, "head_doubt": True}
    result = train({**setting, **shape, "cache_hidden_states": True}, tmp_path / "run-True", num_train_epochs=2.0)
    assert result.model.head.shape == {"hidden_size": 32, "num_assistants": 2, "width": 8, "doubt": True}
    again = CoLLM.from_pretrained(result.directory)
    assert all(map(torch.equal, again.head.state_dict().values(), result.model.head.state_dict().values()))
    assert (
        "a hidden layer of 8 units, reads the base's hidden state and its doubt"
        in (result.directory / "README.md").read_text()
    )
    with pytest.raises(ConfigError, match="num_train_epochs has no effect here: a head on stored hidden states"):
        train({**setting, "cache_hidden_states": True}, tmp_path / "x", num_train_epochs=3)
    assert read_header(tmp_path / "run-True/scores/base").hidden_states
    assert not read_header(tmp_path / "run-True/scores/assistant").hidden_states
    full = [
        train({**setting, "cache_hidden_states": kept}, tmp_path / f"full-{kept}", method="full").model.head
        for kept in (False, True)
    ]
    torch.testing.assert_close(*(head.weight.detach() for head in full), rtol=1e-4, atol=1e-6)
    with pytest.raises(ConfigError, match=r"deferral_cost is \[0.0, 1.0, 2.0\], .* or one for each assistant \(2\)"):
        train(setting, tmp_path / "x", deferral_cost=[0, 1, 2])
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("nf4", "lora"),
        ("int8", "head"),
        pytest.param("int8", "lora", marks=pytest.mark.soak),
        pytest.param("nf4", "head", marks=pytest.mark.soak),
    ],
)
def test_quantized_models_train_and_are_loaded_quantized(
    method: str, kind: str, setting: dict[str, Any], saved_model: SavedModel, tmp_path: Path
) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 128}  # bitsandbytes cuts rows into blocks of 64
    names = {"base": str(saved_model("base", 0, **shape)), "assistant": [str(saved_model("first", 1, **shape))]}
    models = {**setting, **names, "base_quantization": kind, "assistant_quantization": kind}
    tuning = {"lora_r": 2, "learning_rate": 1e-2} if method == "lora" else {}
    result = train(models, tmp_path / "run", method=method, **tuning)
    loaded = CoLLM.from_pretrained(result.directory)
    manifest = json.loads((result.directory / "collm.json").read_text())
    assert [spec["quantization"] for spec in (manifest["base"], *manifest["assistants"])] == [kind, kind]
    check_same(loaded, result.model, 1.0, 0.4, -1.0)


def test_quantized_weights_are_not_tuned_whole(setting: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="take no updates; use lora"):
        train({**setting, "base_quantization": "nf4"}, tmp_path / "x", method="full")
    with pytest.raises(ConfigError, match=r"quantization of .* is 'nf3', expected one of nf4, int8"):
        RunConfig(**setting, base_quantization="nf3").base_model  # noqa: B018


@pytest.mark.parametrize("split", ["test", "test[:200]", "test_hard"])
def test_nothing_is_learned_or_chosen_on_a_test_split(split: str, setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="is for test results"):
        RunConfig(**setting, data_split=split)
    with pytest.raises(ConfigError, match="is for test results"):
        RunConfig(**setting, validation=setting["data"], validation_split=split)
