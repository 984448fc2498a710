"""GGUF files are models like others: loaded, tuned, saved and checked; what cannot be read is one sentence."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from collm import CoLLM, DeferralHead, SamplingParams
from collm.errors import CollmError, ConfigError, LoadError, MissingExtra
from collm.models.checks import check_gguf
from collm.models.gguf_export import write_gguf
from collm.models.language_model import LanguageModel
from collm.models.loading import ModelSpec, load_config, load_model, load_tokenizer, saved_eos_ids
from collm.models.members import spec_of, stop_ids
from collm.run.options import RunConfig
from collm.run.train import train_collaboration
from collm.text.guards import TokenizerIdentity
from collm.training.config import CoLLMConfig
from collm.vllm.placement import ModelMemory
from tests.architectures import LLAMA3_ROPE
from tests.tiny_models import make_model, tiny_config

PARAMS = SamplingParams(max_tokens=8)


def head(seed: int = 0) -> DeferralHead:
    made = DeferralHead(32)
    torch.nn.init.normal_(made.weight, std=0.5, generator=torch.Generator().manual_seed(seed))
    return made


def token_ids(model: CoLLM) -> list[list[int]]:
    return [c.token_ids for c in model.generate(["the cat", "on"], PARAMS, threshold=0.5)]


@pytest.fixture
def spec(gguf_path: Path) -> ModelSpec:
    return ModelSpec(str(gguf_path), device="cpu")


@pytest.fixture
def converted(spec: ModelSpec, tmp_path: Path) -> ModelSpec:
    """The same model as safetensors."""
    load_model(spec).save_pretrained(tmp_path / "converted")
    load_tokenizer(spec).save_pretrained(tmp_path / "converted")
    return ModelSpec(str(tmp_path / "converted"), device="cpu")


# Loading


def test_weights_tokenizer_and_template_come_out_of_the_file(
    spec: ModelSpec, byte_model: PreTrainedModel, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    model, tokenizer = load_model(spec), load_tokenizer(spec)
    assert model.dtype == torch.float32
    for name, weight in byte_model.state_dict().items():
        step = weight.abs().max() / 127 if weight.ndim == 2 else 0  # of 8 bits
        torch.testing.assert_close(model.state_dict()[name], weight, atol=float(step), rtol=0)
    assert tokenizer.get_vocab() == byte_tokenizer.get_vocab()
    assert tokenizer("the cat")["input_ids"] == byte_tokenizer("the cat")["input_ids"]
    assert tokenizer.chat_template == byte_tokenizer.chat_template
    eos = {byte_tokenizer.eos_token_id}
    assert stop_ids(tokenizer, spec) == LanguageModel(model, name="base").eos_token_ids == eos
    assert saved_eos_ids(spec) == frozenset()


def test_it_is_loaded_in_the_dtype_that_is_asked_for(gguf_path: Path) -> None:
    assert load_model(ModelSpec(str(gguf_path), dtype="bfloat16", device="cpu")).dtype == torch.bfloat16


def test_what_lies_beside_the_file_is_not_read(spec: ModelSpec, tmp_path: Path) -> None:
    beside = tmp_path / "model.gguf"
    shutil.copy(spec.path, beside)
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json", "adapter_config.json"):
        (tmp_path / name).write_text('{"model_type": "of something else", "chat_template": "not this one"}')
    moved = ModelSpec(str(beside), device="cpu")
    assert TokenizerIdentity.of(load_tokenizer(moved)) == TokenizerIdentity.of(load_tokenizer(spec))
    assert load_config(moved).model_type == "llama"
    assert torch.equal(load_model(moved).lm_head.weight, load_model(spec).lm_head.weight)


def test_its_name_means_the_same_from_every_directory(gguf_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(gguf_path.parent)
    spec = ModelSpec(gguf_path.name)
    assert spec.path == str(gguf_path)
    assert spec_of(load_model(spec)) == spec
    assert ModelSpec.parse(gguf_path.name).path == str(gguf_path)


def test_other_weights_are_other_scores(spec: ModelSpec, tmp_path: Path) -> None:
    copy = tmp_path / Path(spec.path).name
    content = bytearray(Path(spec.path).read_bytes())
    copy.write_bytes(content)
    first = ModelSpec(str(copy)).identity()["weights"]
    assert first == spec.identity()["weights"]
    content[-1] ^= 1
    copy.write_bytes(content)
    assert ModelSpec(str(copy)).identity()["weights"] != first


def test_a_file_on_the_hub_is_fetched(gguf_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repo: str, file: str, revision: str | None) -> str:
        asked.append((repo, file, revision))
        return str(gguf_path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    spec = ModelSpec.parse("some/model-GGUF:Q8/tiny.gguf@abc", device="cpu")
    model = load_model(spec)
    load_tokenizer(spec)
    assert set(asked) == {("some/model-GGUF", "Q8/tiny.gguf", "abc")}
    assert spec_of(model) == ModelSpec("some/model-GGUF:Q8/tiny.gguf", "abc")


# Collaborations


@pytest.mark.slow
def test_a_file_and_the_safetensors_made_from_it_are_one_model(spec: ModelSpec, converted: ModelSpec) -> None:
    tokenizer = load_tokenizer(spec)
    expected = token_ids(CoLLM(spec, [spec], head(), tokenizer))
    for pair in ((spec, converted), (converted, spec)):
        assert token_ids(CoLLM(pair[0], pair[1:], head(), load_tokenizer(pair[0]))) == expected


@pytest.mark.slow
def test_a_file_with_another_vocabulary_is_aligned(
    spec: ModelSpec, byte_model: PreTrainedModel, byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    content = json.loads(byte_tokenizer.backend_tokenizer.to_str())
    first, second = [token for token, at in content["model"]["vocab"].items() if at in (40, 41)]
    vocabulary = content["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    backend = type(byte_tokenizer.backend_tokenizer).from_str(json.dumps(content))
    other = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", chat_template=byte_tokenizer.chat_template
    )
    path = tmp_path / "other.gguf"
    write_gguf(byte_model, other, path)
    assert CoLLM(spec, [spec], head(), load_tokenizer(spec)).alignment is None
    pair = CoLLM(spec, [ModelSpec(str(path))], head(), load_tokenizer(spec))
    assert pair.alignment is not None
    swapped = [pair.alignment.tokenizers[author].token_bytes[40] for author in (0, 1)]
    assert swapped[0] != swapped[1]
    assert len(token_ids(pair)[0]) > 0


@pytest.mark.slow
@pytest.mark.parametrize(("method", "folder"), [("full", "base"), ("lora", "adapter"), ("head", None)])
def test_it_is_tuned_saved_and_loaded_again(method: str, folder: str | None, spec: ModelSpec, tmp_path: Path) -> None:
    rows = [{"prompt": "the cat", "completion": " sat on the mat"}] * 10
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = RunConfig(
        data=str(tmp_path / "rows.jsonl"), base=spec.path, assistant=[spec.path], device="cpu", calibrate=False
    )
    args = CoLLMConfig(output_dir=str(tmp_path / "run"), method=method, warm_start=False, max_steps=2, use_cpu=True)
    trained = train_collaboration(config, args, quiet=True)
    loaded = CoLLM.from_pretrained(trained.directory, device="cpu")
    assert token_ids(loaded) == token_ids(trained.model)
    assert {path.name for path in trained.directory.iterdir() if path.is_dir()} == ({folder} if folder else set())
    assert json.loads((trained.directory / "collm.json").read_text())["base"]["path"] == spec.path
    if folder == "base":
        weights = load_file(trained.directory / "base" / "model.safetensors")
        assert not torch.equal(weights["lm_head.weight"], load_model(spec).lm_head.weight)
        assert "quantization_config" not in json.loads((trained.directory / "base" / "config.json").read_text())


# What cannot be read


def refused(path: str | Path, complaint: str, kind: type[CollmError] = LoadError) -> None:
    for load in (load_model, load_tokenizer):
        with pytest.raises(kind, match=complaint) as caught:
            load(ModelSpec(str(path), device="cpu"))
        assert "\n" not in str(caught.value)


def test_without_the_package_the_extra_is_named(gguf_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(gguf_path, r"gguf is not installed; .*collm\[gguf\]", MissingExtra)


def test_a_file_that_is_not_there_is_named(gguf_path: Path) -> None:
    refused(gguf_path.with_name("tiny.Q8_1.gguf"), r"there is no GGUF file '.*'; did you mean '.*tiny.Q8_0.gguf'\?")
    refused("nothing.gguf", r"expected a path, or repo:file\.gguf on the Hub")
    refused("./nothing:here.gguf", "there is no GGUF file './nothing:here.gguf'")


def test_a_directory_of_gguf_files_is_not_one_of_them(gguf_path: Path) -> None:
    refused(gguf_path.parent, "has GGUF files but no config.json; give the path of a file: '.*tiny.Q8_0.gguf'")


def test_a_file_that_the_hub_does_not_give_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("Cannot reach the Hub.\nMore about it")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    refused("some/repo:tiny.gguf", "could not download the GGUF file 'tiny.gguf' of 'some/repo': Cannot reach the Hub")


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        (lambda content: b"", "could not load"),
        (lambda content: b"PK\x03\x04" + content[4:], "does not start with the GGUF magic bytes"),
        (lambda content: content[:50], "damaged or truncated: download it again"),
        (lambda content: content[:2000], "damaged or truncated: download it again"),
        (lambda content: content[:8] + b"\xff" * 16 + content[24:], "damaged or truncated: download it again"),
    ],
)
def test_a_damaged_file_is_one_sentence(changed: Any, complaint: str, gguf_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(changed(gguf_path.read_bytes()))
    refused(path, complaint)


def test_a_file_that_is_cut_short_is_one_sentence(gguf_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "short.gguf"
    path.write_bytes(gguf_path.read_bytes()[:-200])
    with pytest.raises(LoadError, match="the file is damaged or truncated: download it again"):
        load_model(ModelSpec(str(path)))


def write_header(path: Path, architecture: str) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_an_architecture_that_transformers_does_not_read_is_named(tmp_path: Path) -> None:
    path = write_header(tmp_path / "other.gguf", "rwkv7")
    with pytest.raises(LoadError, match="architecture rwkv7 is not supported yet; use the original checkpoint"):
        load_model(ModelSpec(str(path)))


def test_scaled_positions_are_not_dropped(byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "scaled.gguf"
    config = tiny_config(vocab_size=len(byte_tokenizer), rope_parameters=LLAMA3_ROPE)
    write_gguf(make_model(config, 0), byte_tokenizer, path)
    with pytest.raises(LoadError, match="scales its rotary embedding, which transformers does not read"):
        load_model(ModelSpec(str(path)))


def test_no_code_of_the_hub_is_run_for_it(
    byte_model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_header(tmp_path / "lfm.gguf", "lfm2")
    found = importlib.util.find_spec
    monkeypatch.setattr("collm.models.checks.find_spec", lambda name: name == "kernels" or found(name))
    with pytest.raises(LoadError, match="of the architecture lfm2, transformers would run code from the Hub"):
        check_gguf(path.name, str(path), byte_model.config)


def test_it_is_not_quantized_again(gguf_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a GGUF file, which collm cannot quantize; leave nf4 out"):
        ModelSpec(str(gguf_path), quantization="nf4")


def test_it_is_not_launched(spec: ModelSpec) -> None:
    with pytest.raises(ConfigError, match="is a GGUF file, which launched servers do not support"):
        ModelMemory.of(spec)
