"""The artefact: what is saved loads the same, and what is broken is refused with one clear sentence."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from collm import CoLLM, DeferralHead, SamplingParams
from collm.atomic import atomic_directory, atomic_file, sole_writer, write_text
from collm.core.calibration import Calibration, CalibrationPoint
from collm.core.policies import PricePolicy
from collm.errors import (
    ArtefactError,
    CollmError,
    ConfigError,
    LoadError,
    MismatchError,
    RequestError,
    UnsupportedModel,
    WriteError,
)
from collm.models.loading import ModelSpec, load_model
from collm.text.template import PromptTemplate
from tests.engine.slow import slow_decode

SavedModel = Callable[..., Path]
PARAMS = SamplingParams(max_tokens=10)
POINTS = [CalibrationPoint(1.0, 0.0, 0.2, 0.1, 0.3, 0.0, 0.0), CalibrationPoint(0.5, 0.1, 0.8, 0.7, 0.9, 0.0, 0.2)]


def head(k: int = 1, hidden_size: int = 32) -> DeferralHead:
    made = DeferralHead(hidden_size, k)
    torch.nn.init.normal_(made.weight, std=0.5, generator=torch.Generator().manual_seed(0))
    return made


@pytest.fixture
def specs(saved_model: SavedModel) -> list[ModelSpec]:
    return [ModelSpec(str(saved_model("small", 0))), ModelSpec(str(saved_model("large", 1, hidden_size=48)))]


@pytest.fixture
def saved(tmp_path: Path, specs: list[ModelSpec], tokenizer: PreTrainedTokenizerFast) -> Path:
    template = PromptTemplate("w1 {prompt} w2")
    CoLLM(specs[0], specs[1:], head(), tokenizer, template=template).save_pretrained(tmp_path / "pair")
    return tmp_path / "pair"


def token_ids(model: CoLLM) -> list[list[int]]:
    return [c.token_ids for c in model.generate(["w5", "w6 w7"], PARAMS, threshold=0.5)]


@pytest.mark.slow
def test_a_frozen_base_is_referenced_and_everything_loads_the_same(
    saved: Path, specs: list[ModelSpec], tokenizer: PreTrainedTokenizerFast
) -> None:
    model = CoLLM.from_pretrained(saved)
    assert sorted(path.name for path in saved.iterdir()) == ["README.md", "collm.json", "head.safetensors"]
    assert torch.equal(model.head.weight, head().weight)
    assert model.template == PromptTemplate("w1 {prompt} w2")
    assert token_ids(model) == token_ids(CoLLM(specs[0], specs[1:], head(), tokenizer, template=model.template))


@pytest.mark.slow
def test_a_base_in_memory_is_saved_with_the_artefact_and_moves_with_it(
    tmp_path: Path,
    specs: list[ModelSpec],
    tiny_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = CoLLM(tiny_model(5), specs[1:], head(), tokenizer)
    model.save_pretrained(tmp_path / "first")
    expected = token_ids(model)
    CoLLM.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    shutil.rmtree(tmp_path / "first")
    assert token_ids(CoLLM.from_pretrained(tmp_path / "second")) == expected


@pytest.mark.slow
def test_a_lora_base_is_saved_as_its_adapter(
    tmp_path: Path, specs: list[ModelSpec], tokenizer: PreTrainedTokenizerFast
) -> None:
    from peft import LoraConfig, get_peft_model

    from collm.models.loading import load_model

    base: Any = get_peft_model(
        load_model(specs[0]), LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"])
    )
    model = CoLLM(base, specs[1:], head(), tokenizer)
    model.save_pretrained(tmp_path / "pair")
    assert not (tmp_path / "pair" / "base").exists()
    assert token_ids(CoLLM.from_pretrained(tmp_path / "pair")) == token_ids(model)
    assert token_ids(model) != token_ids(CoLLM(specs[0], specs[1:], head(), tokenizer))


@pytest.mark.slow
def test_a_head_that_predicts_gains_takes_a_price(
    tmp_path: Path, specs: list[ModelSpec], tokenizer: PreTrainedTokenizerFast
) -> None:
    gains = head()
    gains.predicts_gain = True
    CoLLM(specs[0], specs[1:], gains, tokenizer).save_pretrained(tmp_path / "gains")
    model = CoLLM.from_pretrained(tmp_path / "gains")
    assert model.head.predicts_gain
    threshold = 1 / (1 + math.exp(-0.4))
    assert model.threshold(price=0.4) == pytest.approx(threshold)
    by_price, by_threshold = model.generate("w5", PARAMS, price=0.4), model.generate("w5", PARAMS, threshold=threshold)
    assert (by_price[0].token_ids, by_price[0].authors) == (by_threshold[0].token_ids, by_threshold[0].authors)
    assert 0 < by_price.deferral_rate < 1
    assert [step.token_id for step in model.stream("w5", PARAMS, price=0.4)] == by_price[0].token_ids
    assert model.generate("w5", PARAMS, policy="price:0.4")[0].token_ids == by_price[0].token_ids
    with pytest.raises(ConfigError, match="budget and price are given, but each selects a threshold; give one of them"):
        model.generate("w5", budget=0.1, price=0.4)
    with pytest.raises(ConfigError, match="price have no effect with policy joint"):
        model.generate("w5", price=0.4, policy="joint")


@pytest.mark.slow
def test_each_assistant_may_have_a_price(specs: list[ModelSpec], tokenizer: PreTrainedTokenizerFast) -> None:
    gains = head(2)
    gains.predicts_gain = True
    model = CoLLM(specs[0], [specs[1], specs[1]], gains, tokenizer)
    (out,) = model.generate("w5", PARAMS, price=[0.2, 1.5])
    models = [load_model(one) for one in (*specs, specs[1])]
    assert (out.token_ids, out.authors) == slow_decode(
        models, gains, out.prompt_token_ids, PricePolicy((0.2, 1.5)), PARAMS
    )
    assert set(out.authors) == {1, 2}
    assert out.authors != model.generate("w5", PARAMS, price=0.2)[0].authors
    assert model.generate("w5", PARAMS, policy="price:0.2,1.5")[0].token_ids == out.token_ids
    with pytest.raises(ConfigError, match=r"several prices are no threshold; compare the policy price:0.2,1.5"):
        model.threshold(price=[0.2, 1.5])
    with pytest.raises(ConfigError, match="got 3 prices for 2 assistants"):
        model.generate("w5", policy=[PricePolicy((0.2, 1.5, 2.0))])


def test_a_head_of_another_objective_takes_no_price(saved: Path) -> None:
    with pytest.raises(ConfigError, match=r"price is 0.4, but this head predicts no gains"):
        CoLLM.from_pretrained(saved).generate("w5", price=0.4)


def test_calibration_gives_the_default_threshold_and_budgets(saved: Path) -> None:
    model = CoLLM.from_pretrained(saved)
    model.calibration = Calibration(POINTS, "exact_match", 20, {})
    model.save_calibration(saved)
    model = CoLLM.from_pretrained(saved)
    assert json.loads((saved / "collm.json").read_text())["default_threshold"] == 0.5
    by_default, by_threshold = model.generate(["w5"], PARAMS), model.generate(["w5"], PARAMS, threshold=0.5)
    assert by_default[0].authors == by_threshold[0].authors
    assert set(model.generate(["w5"], PARAMS, budget=0.05)[0].authors) == {0}
    card = (saved / "README.md").read_text()
    assert "| 0.5 | 10.0% | 0.0% - 20.0% | 0.800 | 0.700 - 0.900 | default |" in card
    assert "chosen teacher-forced" not in card
    by_chance = [replace(point, differs=False, gold_accuracy=0.9 - point.threshold / 2) for point in POINTS]
    model.calibration = Calibration(by_chance, "exact_match", 20, {})
    model.save_calibration(saved)
    assert "So the threshold is chosen teacher-forced" in (saved / "README.md").read_text()


def test_models_may_be_replaced_when_loading(saved: Path, specs: list[ModelSpec], tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.move(specs[1].path, moved)
    with pytest.raises(LoadError, match="there is no model at"):
        CoLLM.from_pretrained(saved)
    model = CoLLM.from_pretrained(saved, assistants=[ModelSpec(str(moved))])
    assert len(token_ids(model)) == 2


def test_a_base_that_was_replaced_is_the_one_that_is_saved(
    specs: list[ModelSpec], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    made = CoLLM(load_model(specs[0]), specs[1:], DeferralHead(32), tokenizer)
    made.save_pretrained(tmp_path / "made")
    assert (tmp_path / "made" / "base").exists()
    CoLLM.from_pretrained(tmp_path / "made", base=specs[0]).save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other" / "base").exists()
    assert CoLLM.from_pretrained(tmp_path / "other").base == specs[0]


def test_chat_messages_need_a_chat_template(saved: Path) -> None:
    with pytest.raises(RequestError, match="no chat template"):
        CoLLM.from_pretrained(saved).generate([[{"role": "user", "content": "w1"}]], threshold=0.5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: shutil.rmtree(d), "no such directory"),
        (lambda d: (d / "collm.json").unlink(), "has no collm.json"),
        (lambda d: (d / "collm.json").write_text('{"format": 1, "base"'), "damaged"),
        (lambda d: (d / "collm.json").write_text('{"format": 99}'), "has format 99, this version reads 1"),
        (lambda d: (d / "collm.json").write_text("[]"), "damaged"),
        (lambda d: (d / "head.safetensors").unlink(), "has no head.safetensors"),
        (lambda d: (d / "head.safetensors").write_bytes(b"\x08\x00garbage"), "corrupt"),
        (lambda d: (d / "head.safetensors").write_bytes((d / "head.safetensors").read_bytes()[:-9]), "corrupt"),
        (lambda d: save_file({"weight": torch.zeros(1, 31), "bias": torch.zeros(1)}, d / "head.safetensors"), "31"),
        (lambda d: save_file({"weight": torch.zeros(1, 32)}, d / "head.safetensors"), "belongs to another pair"),
        (
            lambda d: save_file(
                {"weight": torch.full((1, 32), torch.nan), "bias": torch.zeros(1)}, d / "head.safetensors"
            ),
            "not finite",
        ),
        (lambda d: (d / "calibration.json").write_text("{}"), "damaged"),
    ],
)
def test_a_damaged_artefact_is_refused(saved: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(saved)
    with pytest.raises(ArtefactError, match=message):
        CoLLM.from_pretrained(saved)


def test_a_changed_tokenizer_is_refused(
    saved: Path, specs: list[ModelSpec], tokenizer: PreTrainedTokenizerFast
) -> None:
    import copy

    changed = copy.deepcopy(tokenizer)
    changed.add_tokens(["new"])
    changed.save_pretrained(specs[0].path)
    with pytest.raises(ArtefactError, match="is not the one"):
        CoLLM.from_pretrained(saved)


def test_a_pair_with_different_vocabularies_is_refused_before_weights_are_read(
    specs: list[ModelSpec], tokenizer: PreTrainedTokenizerFast
) -> None:
    path = Path(specs[1].path) / "tokenizer.json"
    path.write_text(path.read_text().replace('"w40"', '"x40"'))
    (Path(specs[1].path) / "model.safetensors").unlink()
    with pytest.raises(MismatchError, match="token 43 is 'x40' there and 'w40' in the base"):
        CoLLM(specs[0], specs[1:], head(), tokenizer)


def test_heads_that_do_not_fit_are_refused(
    specs: list[ModelSpec], tokenizer: PreTrainedTokenizerFast, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    with pytest.raises(MismatchError, match="chooses among 2 assistants, but 1 are given"):
        CoLLM(specs[0], specs[1:], head(k=2), tokenizer)
    with pytest.raises(MismatchError, match="hidden states of size 40, the base has 32"):
        CoLLM(tiny_model(0), [tiny_model(1)], head(hidden_size=40), tokenizer).generate(["w1"], threshold=0.5)


def test_models_that_end_texts_differently_are_refused(
    tiny_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(MismatchError, match="ends texts with"):
        CoLLM(tiny_model(0), [tiny_model(1, eos_token_id=5)], head(), tokenizer).generate(["w1"], threshold=0.5)


def test_an_assistant_without_a_path_cannot_be_referenced(
    tmp_path: Path, tiny_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ArtefactError, match="made in memory"):
        CoLLM(tiny_model(0), [tiny_model(1)], head(), tokenizer).save_pretrained(tmp_path / "pair")
    assert list(tmp_path.iterdir()) == []


def test_saving_never_replaces_something_else(saved: Path, specs: list[ModelSpec]) -> None:
    with pytest.raises(ArtefactError, match="is not a collaboration"):
        CoLLM.from_pretrained(saved).save_pretrained(specs[0].path)


@pytest.mark.parametrize("kind", [partial(OSError, errno.ENOSPC), SafetensorError])
def test_a_full_disk_leaves_the_old_artefact_and_no_rest(
    kind: Callable[[str], Exception], saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = CoLLM.from_pretrained(saved)
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def full(*args: object, **kwargs: object) -> None:
        raise kind("No space left on device")

    monkeypatch.setattr("collm.artefact.save_file", full)
    model.head.weight.data += 1
    with pytest.raises(WriteError, match=r"No space left on device\. Its previous content is unchanged"):
        model.save_pretrained(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path for path in saved.parent.iterdir() if path.name.startswith(".")] == []


def test_saving_keeps_what_is_not_ours(saved: Path) -> None:
    (saved / "notes.txt").write_text("mine")
    (saved / ".git" / "objects").mkdir(parents=True)
    (saved / ".git" / "objects" / "pack").write_bytes(b"p")
    (saved / ".git" / "objects" / "pack").chmod(0o444)
    (saved / ".git" / "here").symlink_to("objects")
    (saved / "base").mkdir()  # of a collaboration with a tuned base
    loaded = CoLLM.from_pretrained(saved)
    model = CoLLM(loaded.base, loaded.assistants, loaded.head, loaded.tokenizer)
    model.save_pretrained(saved)
    model.save_pretrained(saved)
    assert (saved / "notes.txt").read_text() == "mine"
    assert (saved / ".git" / "here" / "pack").read_bytes() == b"p"
    assert (saved / ".git" / "here").is_symlink()
    assert not (saved / "base").exists()
    assert [path for path in saved.parent.iterdir() if path.name.startswith(".")] == []


def fail_after_writing(*paths: Path) -> None:
    for path in paths:
        path.write_text("other")
    raise OSError(errno.ENOSPC, "full")


def test_writers_of_one_process_number_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "out" / "file"
    (path.parent).mkdir()
    for number in (os.getpid(), 1):  # what a kill left, or a link that somebody put there
        (path.parent / f".file.{number}.tmp").symlink_to(tmp_path / "elsewhere")
    with atomic_directory(tmp_path / "made") as one, atomic_file(path) as file:
        (one / "a").touch()
        with pytest.raises(WriteError), atomic_directory(tmp_path / "made") as two, atomic_file(path) as other:
            fail_after_writing(two / "b", other)
        file.write_text("mine")
    assert [entry.name for entry in (tmp_path / "made").iterdir()] == ["a"]
    assert path.read_text() == "mine"
    assert path.stat().st_mode & 0o777 == (tmp_path / "made" / "a").stat().st_mode & 0o777  # as any file
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["made", "out"]


def test_where_nothing_can_be_written_is_one_sentence(saved: Path) -> None:
    (saved / "notes").touch()
    place = saved / "notes" / "under a file"
    for write in (
        lambda: write_text(place / "a", ""),
        lambda: atomic_directory(place / "a").__enter__(),
        lambda: sole_writer(place).__enter__(),
        lambda: CoLLM.from_pretrained(saved).save_pretrained(place),
    ):
        with pytest.raises(WriteError, match=r"could not write .*under a file.*: (Not a directory|File exists)\. "):
            write()


def test_one_process_at_a_time_writes_a_directory(tmp_path: Path) -> None:
    with sole_writer(tmp_path / "out"):
        with pytest.raises(ConfigError, match=rf"out is being written by process {os.getpid()} on .*; wait until it"):
            sole_writer(tmp_path / "out").__enter__()
        with pytest.raises(ConfigError, match=rf"by process {os.getpid()} on "), sole_writer(tmp_path / "out"):
            pass
    with sole_writer(tmp_path / "out"):
        pass


def test_pushing_uploads_the_artefact(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded: dict[str, Any] = {}

    class FakeApi:
        def create_repo(self, repo_id: str, **options: Any) -> str:
            return f"https://hub/{repo_id}"

        def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
            uploaded[repo_id] = sorted(path.name for path in folder_path.iterdir())

    monkeypatch.setattr("huggingface_hub.HfApi", FakeApi)
    assert CoLLM.from_pretrained(saved).push_to_hub("me/pair") == "https://hub/me/pair"
    assert uploaded == {"me/pair": ["README.md", "collm.json", "head.safetensors"]}


def test_every_error_has_one_root() -> None:
    assert all(issubclass(e, CollmError) for e in (ArtefactError, LoadError, MismatchError, RequestError, WriteError))


@pytest.mark.slow
def test_each_model_has_a_device_or_all_the_same(saved: Path) -> None:
    expected = token_ids(CoLLM.from_pretrained(saved))
    assert token_ids(CoLLM.from_pretrained(saved, device="cpu,cpu")) == expected
    placed = CoLLM.from_pretrained(saved, device="cpu,auto")
    assert [cast(ModelSpec, one).device for one in (placed.base, *placed.assistants)] == ["cpu", "auto"]
    with pytest.raises(ConfigError, match=r"names 3 devices .*expected one, or one for each of 2 models"):
        CoLLM.from_pretrained(saved, device="cpu,cpu,cpu")


@pytest.mark.slow
def test_a_quantized_base_that_is_saved_loads_again(
    saved_model: Callable[..., Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Its weights are saved as they are in memory, and quantized no second time."""
    assistant = ModelSpec(str(saved_model("assistant", 1)))
    base = load_model(ModelSpec(str(saved_model("base", 0)), dtype="float32", quantization="nf4"))
    pair = CoLLM(base, [assistant], DeferralHead(32, 1), tokenizer)
    pair.save_pretrained(tmp_path / "pair")
    loaded = CoLLM.from_pretrained(tmp_path / "pair")
    said = [one.generate("w5 w6", SamplingParams(8), threshold=0.4)[0].token_ids for one in (pair, loaded)]
    assert said[0] == said[1]
    loaded.save_pretrained(tmp_path / "again")
    (again,) = CoLLM.from_pretrained(tmp_path / "again").generate("w5 w6", SamplingParams(8), threshold=0.4)
    assert again.token_ids == said[0]


def test_a_model_with_an_adapter_inside_is_refused(
    tiny_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """transformers puts an adapter into a model itself; only a `PeftModel` says what belongs to it."""
    base = tiny_model(0)
    base.add_adapter(LoraConfig(target_modules=["q_proj"]))
    for use in (
        lambda pair: pair.generate("w5", threshold=0.5),
        lambda pair: pair.save_pretrained(tmp_path / "pair"),
        lambda pair: pair.export_vllm(tmp_path / "exported"),
    ):
        with pytest.raises(UnsupportedModel, match="wrap it with peft"):
            use(CoLLM(base, [tiny_model(1)], DeferralHead(32, 1), tokenizer))
    assert not any((tmp_path / name).exists() for name in ("pair", "exported"))
