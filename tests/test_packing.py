"""A packed collaboration works on a machine that has nothing else of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from collm import CoLLM, ModelSpec, SamplingParams, ToolSpec
from collm.artefact.packing import pack
from collm.cli.main import app
from collm.core.calibration import Calibration, CalibrationPoint
from collm.errors import ArtefactError, MismatchError
from collm.models.loading import load_model, load_tokenizer
from tests.engine.test_engine import random_head
from tests.tiny_models import make_model, tiny_config

SavedModel = Callable[..., Path]
PARAMS = SamplingParams(max_tokens=10)
POINTS = [CalibrationPoint(1.0, 0.0, 0.2, 0.1, 0.3, 0.0, 0.1), CalibrationPoint(0.5, 0.1, 0.8, 0.7, 0.9, 0.0, 0.2)]


def token_ids(model: CoLLM) -> list[list[int]]:
    return [one.token_ids for one in model.generate(["w1 w2", "w6 w7"], PARAMS, threshold=0.4)]


@pytest.fixture
def there(saved_model: SavedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """Another machine's directory, which has a frozen base, a model and a table as assistants, and nothing else."""
    here = tmp_path / "here"
    here.mkdir()
    for name, seed, changes in (("small", 0, {}), ("large", 1, {"hidden_size": 48})):
        saved_model(name, seed, **cast(Any, changes)).rename(here / name)
    (here / "small" / "checkpoint-5").mkdir()
    (here / "facts.csv").write_text("pattern,a,b\nw1 {a} {b},w2,w3\n")
    assistants = [ModelSpec(str(here / "large"), dtype="float32"), ToolSpec.parse(f"tool:lookup:{here / 'facts.csv'}")]
    calibration = Calibration(POINTS, "accuracy", 20, {})
    head = random_head(32, 2, scale=1.0)
    model = CoLLM(ModelSpec(str(here / "small")), assistants, head, tokenizer, calibration=calibration)
    model.save_pretrained(here / "pair")
    return tmp_path


def run(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.slow
def test_with_its_assistants_it_needs_nothing_else(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = there / "here"
    expected = token_ids(CoLLM.from_pretrained(here / "pair"))
    said = run("pack", here / "pair", here / "packed", "--with-assistants")
    assert "refers to" not in said
    (here / "packed").rename(there / "moved")
    shutil.rmtree(here)
    (there / "models/base/small").mkdir(parents=True)  # of somebody else
    monkeypatch.chdir(there)
    moved = CoLLM.from_pretrained("moved")
    assert token_ids(moved) == expected
    assert moved.calibration == Calibration(POINTS, "accuracy", 20, {})
    for name in ("collm.json", "README.md"):
        assert str(there) not in Path("moved", name).read_text()
    assert "base: `models/base/small`" in Path("moved/README.md").read_text()
    assert not Path("moved/models/base/small/checkpoint-5").exists()


@pytest.mark.slow
def test_what_is_saved_of_it_again_has_the_models_too(there: Path) -> None:
    expected = token_ids(CoLLM.from_pretrained(there / "here/pair"))
    pack(there / "here/pair", there / "packed", with_assistants=True)
    model = CoLLM.from_pretrained(there / "packed")
    model.save_calibration(there / "packed")
    model.save_pretrained(there / "packed")  # over itself
    model.save_pretrained(there / "again")
    assert pack(there / "packed", there / "once-more") == []
    for gone in ("here", "packed"):
        shutil.rmtree(there / gone)
    for name in ("again", "once-more"):
        assert token_ids(CoLLM.from_pretrained(there / name)) == expected
        assert str(there) not in (there / name / "collm.json").read_text()


@pytest.mark.slow
def test_without_its_assistants_it_says_which_it_needs(there: Path) -> None:
    here = there / "here"
    expected = token_ids(CoLLM.from_pretrained(here / "pair"))
    said = run("pack", here / "pair", there / "packed")
    assert f"refers to {here / 'large'}; on another machine, say with --assistant where it is there" in said
    (here / "large").rename(there / "elsewhere")
    shutil.rmtree(here)
    table = f"tool:lookup:{there / 'packed/tables/assistant-2.csv'}"
    given = [str(there / "elsewhere"), table]
    model = CoLLM.from_pretrained(there / "packed", assistants=given)
    assert token_ids(model) == expected
    assert cast(ModelSpec, model.assistants[0]).dtype == "float32"  # as in the artefact
    options = [part for one in given for part in ("--assistant", one)]
    shown = run("generate", there / "packed", "w1 w2", "--max-tokens", "10", "--threshold", "0.4", *options, "--json")
    assert json.loads(shown)["token_ids"] == expected[0]
    for wrong in (given[:1], [*given, *given]):
        with pytest.raises(MismatchError, match="give one model for each"):
            CoLLM.from_pretrained(there / "packed", assistants=wrong)


@pytest.mark.slow
def test_an_adapter_has_its_base_with_it(there: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    small = ModelSpec(str(there / "here/small"))
    lora = LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"])
    base: Any = get_peft_model(cast(PreTrainedModel, load_model(small)), lora)
    model = CoLLM(base, [ModelSpec(str(there / "here/large"))], random_head(32, 1, scale=1.0), tokenizer)
    model.save_pretrained(there / "tuned")
    expected = token_ids(model)
    pack(there / "tuned", there / "packed", with_assistants=True)
    shutil.rmtree(there / "here")
    packed = CoLLM.from_pretrained(there / "packed")
    assert token_ids(packed) == expected
    packed.save_pretrained(there / "again")
    shutil.rmtree(there / "packed")
    assert token_ids(CoLLM.from_pretrained(there / "again")) == expected


def test_a_saved_base_is_there_once(there: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    base = make_model(tiny_config(), 5)
    base.config._name_or_path = str(there / "here/small")
    model = CoLLM(base, [ModelSpec(str(there / "here/large"))], random_head(32, 1, scale=1.0), tokenizer)
    model.save_pretrained(there / "tuned")
    assert pack(there / "tuned", there / "packed") == [str(there / "here/large")]
    assert not (there / "packed/models").exists()
    assert json.loads((there / "packed/collm.json").read_text())["base"]["path"] == "small"
    assert token_ids(CoLLM.from_pretrained(there / "packed")) == token_ids(model)


@pytest.mark.slow
def test_a_gguf_file_moves(gguf_path: Path, there: Path) -> None:
    here = there / "here"
    file = here / "small.gguf"
    shutil.copy(gguf_path, file)
    spec = ModelSpec(str(file), dtype="float32")
    model = CoLLM(spec, [spec], random_head(32, 1, scale=1.0), load_tokenizer(spec))
    model.save_pretrained(here / "quantized")
    expected = token_ids(model)
    pack(here / "quantized", there / "packed", with_assistants=True)
    shutil.rmtree(here)
    assert [path.name for path in (there / "packed/models").rglob("*.gguf")] == ["small.gguf"]  # both share it
    assert token_ids(CoLLM.from_pretrained(there / "packed")) == expected


def change(directory: Path, **fields: Any) -> None:
    path = directory / "collm.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_models_on_the_hub_are_not_copied(there: Path) -> None:
    assistants = json.loads((there / "here/pair/collm.json").read_text())["assistants"]
    change(there / "here/pair", assistants=[{**assistants[0], "path": "some/model"}, assistants[1]])
    assert pack(there / "here/pair", there / "packed", with_assistants=True) == []
    written = json.loads((there / "packed/collm.json").read_text())
    assert [one.get("path") for one in written["assistants"]] == ["some/model", None]
    assert not (there / "packed/models/assistant").exists()


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda there: (there / "packed").mkdir(), "packed exists; choose another name"),
        (
            lambda there: shutil.rmtree(there / "here/large"),
            "assistant is .*/here/large, which does not exist; restore",
        ),
        (lambda there: shutil.rmtree(there / "here/small"), "base is .*/here/small, which does not exist; restore"),
        (
            lambda there: make_model(tiny_config(), 7).save_pretrained(there / "here/small"),
            "the weights of .*small' have the digest",
        ),
        (lambda there: (there / "here/pair/head.safetensors").unlink(), "has no head.safetensors"),
    ],
)
def test_what_cannot_be_packed_leaves_nothing(spoil: Callable[[Path], Any], complaint: str, there: Path) -> None:
    spoil(there)
    before = sorted(there.iterdir())
    with pytest.raises(ArtefactError, match=complaint):
        pack(there / "here/pair", there / "packed", with_assistants=True)
    assert sorted(there.iterdir()) == before


@pytest.mark.parametrize("path", ["./../large", "./models/../../large"])
def test_a_model_outside_of_the_artefact_is_not_read(path: str, there: Path) -> None:
    assistants = json.loads((there / "here/pair/collm.json").read_text())["assistants"]
    change(there / "here/pair", assistants=[{**assistants[0], "path": path}, assistants[1]])
    with pytest.raises(ArtefactError, match=r"has the model .*, expected a path inside of it"):
        CoLLM.from_pretrained(there / "here/pair")
