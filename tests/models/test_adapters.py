"""Authors that are adapters of one model: one load, the same tokens as with a model each, and their way to disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedTokenizerFast

from collm import CoLLM, ModelSpec, SamplingParams
from collm.artefact.packing import pack
from collm.errors import ArtefactError, LoadError
from collm.models import members as members_module
from collm.models.loading import load_adapted, load_model, load_tokenizer, with_shared_weights
from collm.models.members import load_members
from tests.engine.test_engine import random_head

SavedModel = Callable[..., Path]
PARAMS = SamplingParams(max_tokens=12)
PROMPTS = ["w1 w2", "w6 w7 w3"]


def save_adapter(model: Path, out: Path, seed: int, **options: Any) -> Path:
    torch.manual_seed(seed)
    lora = LoraConfig(**{"r": 2, "init_lora_weights": False, "target_modules": ["q_proj", "down_proj"], **options})
    get_peft_model(load_model(ModelSpec(str(model))), lora).save_pretrained(out)  # type: ignore[arg-type]
    return out


@pytest.fixture
def specs(saved_model: SavedModel, tmp_path: Path) -> list[ModelSpec]:
    """A model without an adapter, and with two."""
    model = saved_model("model", 0)
    adapters = [save_adapter(model, tmp_path / f"adapter-{seed}", seed) for seed in (1, 2)]
    return [ModelSpec(str(model)), *(ModelSpec.parse(f"{model}+{one}") for one in adapters)]


def merged(specs: list[ModelSpec], out: Path) -> list[ModelSpec]:
    """A model of its own for each spec."""
    for number, spec in enumerate(specs):
        model: Any = load_adapted(spec)
        (model.merge_and_unload() if spec.adapter else model).save_pretrained(out / str(number))
        load_tokenizer(spec).save_pretrained(out / str(number))
    return [ModelSpec(str(out / str(number))) for number in range(len(specs))]


def said(model: CoLLM) -> list[tuple[list[int], list[int]]]:
    return [(one.token_ids, one.authors) for one in model.generate(PROMPTS, PARAMS, threshold=0.6)]


def collaboration(specs: list[ModelSpec], tokenizer: PreTrainedTokenizerFast) -> CoLLM:
    return CoLLM(specs[0], specs[1:], random_head(32, len(specs) - 1, scale=1.0), tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("base", [0, 1])
def test_adapters_write_what_merged_models_write(
    base: int, specs: list[ModelSpec], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    ordered = [specs[base], *(one for one in specs if one is not specs[base])]
    expected = said(collaboration(merged(ordered, tmp_path / "merged"), tokenizer))
    assert said(collaboration(ordered, tokenizer)) == expected
    assert {author for _, authors in expected for author in authors} == {0, 1, 2}


def test_one_load_serves_all_adapters_of_a_model(
    specs: list[ModelSpec], tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[ModelSpec] = []
    monkeypatch.setattr(members_module, "load_model", lambda spec: (loads.append(spec), load_model(spec))[1])
    loaded: list[Any] = load_members([*specs, specs[1]], tokenizer, vocab_size=len(tokenizer))
    assert loads == [specs[0]]
    weights = [{one.data_ptr() for one in author.inner.parameters() if one.ndim == 2} for author in loaded]
    assert [len(weights[0] & each) for each in weights] == [len(weights[0])] * 4
    assert len(set.union(*weights)) == len(weights[0]) + 3 * 2 * 2 * 2  # adapters, layers, modules, matrices
    assert len({id(author.config) for author in loaded}) == 4


def test_specs_that_differ_elsewhere_share_nothing(specs: list[ModelSpec], tokenizer: PreTrainedTokenizerFast) -> None:
    half = ModelSpec(specs[1].path, dtype="bfloat16", adapter=specs[1].adapter)
    base, other = load_members([specs[0], half], tokenizer, vocab_size=len(tokenizer))
    assert {one.dtype for one in base.inner.parameters()} == {torch.float32}  # type: ignore[union-attr]
    assert other.inner.lm_head.weight.dtype == torch.bfloat16  # type: ignore[union-attr]


def test_a_copy_with_shared_weights_is_left_alone_by_an_adapter(specs: list[ModelSpec]) -> None:
    plain, text = load_model(specs[0]), torch.tensor([[1, 2, 3]])
    before = plain(text).logits
    adapted = load_adapted(specs[1], with_shared_weights(plain))
    assert torch.equal(plain(text).logits, before)
    assert not torch.equal(adapted(text).logits, before)
    assert torch.equal(adapted(text).logits, load_adapted(specs[1])(text).logits)


@pytest.mark.slow
def test_they_are_saved_by_name_and_packed_once(
    specs: list[ModelSpec], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = collaboration(specs, tokenizer)
    expected = said(model)
    model.save_pretrained(tmp_path / "saved")
    loaded = CoLLM.from_pretrained(tmp_path / "saved")
    assert list(loaded.assistants) == specs[1:]
    assert said(loaded) == expected
    assert pack(tmp_path / "saved", tmp_path / "outside") == [specs[0].path, *(str(one.adapter) for one in specs[1:])]
    pack(tmp_path / "saved", tmp_path / "packed", with_assistants=True)
    for one in specs:
        shutil.rmtree(one.adapter or one.path)
    assert len([*(tmp_path / "packed").rglob("model.safetensors")]) == 1
    assert said(CoLLM.from_pretrained(tmp_path / "packed")) == expected


def test_a_name_is_a_model_a_revision_and_an_adapter(tmp_path: Path) -> None:
    for name in ("me/model", "me/model@v2", "me/model+me/adapter", "me/model@v2+me/adapter"):
        assert ModelSpec.parse(name).name == name
    assert ModelSpec.parse("me/model@v2+a@b").adapter == "a@b"
    (tmp_path / "a+b").mkdir()
    assert ModelSpec.parse(str(tmp_path / "a+b")).adapter is None


def test_scores_depend_on_the_adapter(specs: list[ModelSpec]) -> None:
    identities = [one.identity() for one in specs]
    assert len({one["weights"] for one in identities}) == len({one["path"] for one in identities}) == 3


def test_what_cannot_be_an_author_is_one_sentence(
    specs: list[ModelSpec], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with pytest.raises(LoadError, match=r"nowhere/adapter_config.json is damaged \(FileNotFoundError"):
        load_adapted(ModelSpec(specs[0].path, adapter="nowhere"))
    in_memory = CoLLM(specs[0], [load_adapted(specs[1])], random_head(32, 1), tokenizer)
    with pytest.raises(ArtefactError, match=r"assistant was made in memory .* save it, or its adapter, and load it"):
        in_memory.save_pretrained(tmp_path / "out")
