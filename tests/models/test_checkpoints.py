"""Every common form of a checkpoint loads to the same model, or is refused with what it is and what to do."""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from collm.errors import ConfigError, LoadError
from collm.models.loading import ModelSpec, load_model, quiet_if_small
from collm.models.members import spec_of
from collm.run.options import RunConfig
from collm.run.train import train_collaboration
from collm.training.config import CoLLMConfig

SavedModel = Callable[..., Path]


def same(model: nn.Module, other: nn.Module) -> bool:
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def quantized(directory: Path, **config: Any) -> ModelSpec:
    """A checkpoint whose config says so."""
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": config}))
    return ModelSpec(str(directory), device="cpu")


def test_shards_are_one_model(tiny_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    model = tiny_model(0)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    spec = ModelSpec(str(tmp_path), device="cpu")
    assert same(load_model(spec), model)
    shards[1].unlink()
    with pytest.raises(LoadError, match=rf"could not load the model .*{shards[1].name}"):
        load_model(spec)


def test_one_thread_at_a_time_changes_the_settings_of_the_process(tiny_model: Callable[..., PreTrainedModel]) -> None:
    before, entered, done = list(warnings.filters), threading.Event(), threading.Event()
    shown = transformers_logging.is_progress_bar_enabled()

    def load() -> None:
        with quiet_if_small(tiny_model(0)):
            entered.set()
            done.wait(5)

    other = threading.Thread(target=load)
    with quiet_if_small(tiny_model(0)), quiet_if_small(tiny_model(0)):
        other.start()
        assert not entered.wait(0.05)
    assert entered.wait(5)
    done.set()
    other.join()
    assert warnings.filters == before
    assert transformers_logging.is_progress_bar_enabled() is shown


def test_bin_files_are_read(tiny_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    model = tiny_model(0)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert same(load_model(ModelSpec(str(tmp_path), device="cpu")), model)


def test_a_directory_without_weights_is_named(saved_model: SavedModel) -> None:
    directory = saved_model("model")
    (directory / "model.safetensors").unlink()
    with pytest.raises(LoadError, match=r"no file named model.safetensors, or pytorch_model.bin"):
        load_model(ModelSpec(str(directory)))


def test_fp8_weights_are_unpacked_on_a_cpu(saved_model: SavedModel) -> None:
    directory = saved_model("model")
    expected = load_file(directory / "model.safetensors")
    stored: dict[str, Tensor] = {}
    for name, weight in list(expected.items()):
        if "_proj" in name:
            scale = weight.abs().max() / torch.finfo(torch.float8_e4m3fn).max
            stored[name] = (weight / scale).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scale.reshape(1, 1)
            expected[name] = stored[name].float() * scale
        else:
            stored[name] = weight
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    spec = quantized(directory, quant_method="fp8", activation_scheme="dynamic", weight_block_size=[128, 128])
    model = load_model(spec)
    for name, weight in expected.items():
        torch.testing.assert_close(model.state_dict()[name], weight, atol=0, rtol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_bitsandbytes_checkpoints_load_as_they_were_saved(kind: str, saved_model: SavedModel, tmp_path: Path) -> None:
    first = load_model(ModelSpec(str(saved_model("model")), device="cpu", quantization=kind))
    first.save_pretrained(tmp_path / "saved")
    spec = ModelSpec(str(tmp_path / "saved"), device="cpu")
    loaded = load_model(spec)
    input_ids = torch.arange(9)[None]
    assert torch.equal(loaded(input_ids).logits, first(input_ids).logits)
    again = spec_of(loaded)
    assert again is not None
    assert (again.path, again.quantization) == (spec.path, None)
    with pytest.raises(LoadError, match="is already quantized with bitsandbytes; leave nf4 out"):
        load_model(ModelSpec(spec.path, quantization="nf4"))


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "quantized with awq of .* requires gptqmodel"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "quantized with gptq of .* requires optimum"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "compressed-tensors>=.* is required"),
        ({"quant_method": "fbgemm_fp8"}, "quantized with fbgemm_fp8 of .* requires a GPU"),
    ],
)
def test_what_a_quantized_checkpoint_takes_is_said(
    config: dict[str, Any], complaint: str, saved_model: SavedModel
) -> None:
    spec = quantized(saved_model("model"), **config)
    with pytest.raises(LoadError, match=f"{complaint}.*; follow this advice, or use the original checkpoint"):
        load_model(spec)


@pytest.mark.parametrize(
    ("config", "named"),
    [({"quant_method": "exl2"}, "exl2"), ({"bits": 4}, "a method that its"), ({"quant_method": 7}, "7")],
)
def test_a_method_that_transformers_does_not_know_is_refused(
    config: dict[str, Any], named: str, saved_model: SavedModel, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(LoadError, match=f"is quantized with {named}.*use the original checkpoint"):
        load_model(quantized(saved_model("model"), **config))
    assert not caplog.text


def test_quantized_weights_are_not_tuned_whole(saved_model: SavedModel, tmp_path: Path) -> None:
    base = quantized(saved_model("model"), quant_method="awq").path
    config = RunConfig(data="nowhere.jsonl", base=base, assistant=[base])
    args = CoLLMConfig(output_dir=str(tmp_path / "run"), use_cpu=True, method="full")
    with pytest.raises(ConfigError, match="the base is quantized with awq, and such weights take no updates"):
        train_collaboration(config, args, quiet=True)
