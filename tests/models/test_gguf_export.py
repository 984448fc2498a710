"""A model written as a GGUF file is the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.integrations.gguf import read_gguf_metadata
from typer.testing import CliRunner

from collm import CoLLM, DeferralHead, SamplingParams
from collm.cli.main import app
from collm.core.calibration import Calibration, CalibrationPoint
from collm.errors import ArtefactError, CollmError, ConfigError, MismatchError, UnsupportedModel
from collm.models.gguf_export import GgufType, write_gguf
from collm.models.loading import ModelSpec, load_model, load_tokenizer
from collm.tools.spec import ToolSpec
from tests.architectures import COMMON, EXACT, LLAMA3_ROPE
from tests.engine.test_engine import random_head
from tests.tiny_models import make_model, tiny_config
from tests.tokenizers import merging_tokenizer, sentencepiece_tokenizer

SIZES = {**COMMON, "vocab_size": 272, "intermediate_size": 64}  # more rows than tokens
WRITTEN: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "llama-tied": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama-wide-heads": lambda: transformers.LlamaConfig(**SIZES, head_dim=16),
    "llama-narrow": lambda: transformers.LlamaConfig(**{**SIZES, "intermediate_size": 48}),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=None),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=128, tie_word_embeddings=True),
}
"""Configs of which transformers reads the files."""


def random_model(config: Any) -> PreTrainedModel:
    """Norms and biases are random too."""
    model = make_model(config, 0)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.3)
    return model


@torch.no_grad()
def error_of(path: Path, model: Any) -> float:
    """The relative error of the logits of the file, dequantized."""
    ids = torch.randint(250, (2, 24), generator=torch.Generator().manual_seed(0))
    expected = model(ids).logits
    found = load_model(ModelSpec(str(path), dtype="float32", device="cpu"))(ids).logits
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("kind", "most"), [("f32", 1e-6), ("bf16", 0.05), ("q8_0", 0.1)])
@pytest.mark.parametrize("name", WRITTEN)
def test_it_is_read_back(
    name: str, kind: GgufType, most: float, byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = random_model(WRITTEN[name]())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    write_gguf(model, byte_tokenizer, tmp_path / "model.gguf", kind)
    assert error_of(tmp_path / "model.gguf", model) < most
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    tensors = read_gguf_metadata(str(tmp_path / "model.gguf"))[1]
    assert ("output.weight" in tensors) == (not model.config.tie_word_embeddings)


def test_an_adapter_is_merged(byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model: Any = get_peft_model(random_model(WRITTEN["llama"]()), LoraConfig(target_modules=["q_proj", "v_proj"]))  # type: ignore[arg-type]
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.3)
    write_gguf(model, byte_tokenizer, tmp_path / "model.gguf", "f32")
    assert error_of(tmp_path / "model.gguf", model.eval()) < 1e-5
    assert hasattr(model, "peft_config")


def test_a_sentencepiece_tokenizer_is_read_back(tmp_path: Path) -> None:
    tokenizer = sentencepiece_tokenizer("the cat sat on the mat")
    write_gguf(make_model(tiny_config(vocab_size=400), 0), tokenizer, tmp_path / "model.gguf")
    found = load_tokenizer(ModelSpec(str(tmp_path / "model.gguf")))
    for text in ("the cat", "sat on the mat, 12 é"):
        assert found(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (found.bos_token, found.eos_token) == (tokenizer.bos_token, tokenizer.eos_token)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (EXACT["gemma2"], "of the type gemma2 cannot be written as GGUF, expected one of llama, mistral, qwen2, qwen3"),
        (lambda: tiny_config(hidden_act="gelu"), "has hidden_act gelu, expected silu"),
        (lambda: transformers.Qwen3Config(**SIZES, head_dim=8, attention_bias=True), "has attention_bias True"),
        (lambda: tiny_config(mlp_bias=True), "has mlp_bias True, expected False"),
        (lambda: transformers.Qwen2Config(**SIZES, rope_parameters=LLAMA3_ROPE), "rotary positions of the type llama3"),
        (
            lambda: tiny_config(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
            "rotary positions of the type linear",
        ),
    ],
)
def test_what_a_file_cannot_hold_is_refused(
    config: Any, complaint: str, byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModel, match=complaint):
        write_gguf(make_model(config(), 0), byte_tokenizer, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_tokenizers_that_cannot_be_written_are_refused(
    tokenizer: PreTrainedTokenizerFast, byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    across = merging_tokenizer("the cat sat on the mat", vocab_size=264)
    cases: list[tuple[Any, int, type[CollmError], str]] = [
        (tokenizer, 300, UnsupportedModel, "a WordLevel tokenizer cannot be written, expected BPE"),
        (across, 300, UnsupportedModel, "splits text in another way than gpt-2, smollm"),
        (byte_tokenizer, 97, MismatchError, r"the tokenizer has \d+ tokens, but the model only 97"),
    ]
    for one, rows, kind, complaint in cases:
        with pytest.raises(kind, match=complaint):
            write_gguf(make_model(tiny_config(vocab_size=rows), 0), one, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


# The command


def export(*arguments: str | Path) -> str:
    return CliRunner().invoke(app, ["export", "gguf", *map(str, arguments)], catch_exceptions=False).stdout


@pytest.fixture
def base(byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> ModelSpec:
    model = make_model(WRITTEN["llama"](), 0)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = [5, byte_tokenizer.eos_token_id]  # type: ignore[list-item]
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer.save_pretrained(tmp_path / "base")
    return ModelSpec(str(tmp_path / "base"))


def test_a_model_becomes_a_file(base: ModelSpec, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    assert "use it as --base or --assistant" in export(base.path, out, "--type", "f32")
    assert error_of(out, load_model(base)) < 1e-6
    assert read_gguf_metadata(str(out))[0]["collm.source.weights"] == base.identity()["weights"]
    with pytest.raises(ArtefactError, match=r"model.gguf exists; choose another name"):
        export(base.path, out)
    with pytest.raises(ConfigError, match="is a GGUF file already"):
        export(out, tmp_path / "again.gguf")
    with pytest.raises(ConfigError, match=r"the output is .*again, expected a name that ends in .gguf"):
        export(base.path, tmp_path / "again")


@pytest.mark.parametrize("tuned", ["frozen", "full", "lora"])
@pytest.mark.slow
def test_a_collaboration_keeps_all_but_its_weights(
    tuned: str, base: ModelSpec, byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    module: Any = load_model(base)
    if tuned == "lora":
        module = get_peft_model(module, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    calibration = Calibration([CalibrationPoint(0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5)], "exact_match", 20, {})
    head: DeferralHead = random_head(32, 1)
    given = base if tuned == "frozen" else module
    made = CoLLM(given, [ToolSpec("calculator")], head, byte_tokenizer, calibration=calibration)
    made.save_pretrained(tmp_path / "made")
    text = export(tmp_path / "made", tmp_path / "out", "--type", "f32")
    assert f"collm calibrate {tmp_path / 'out'}" in text
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    loaded = CoLLM.from_pretrained(moved, engine="transformers")
    expected = CoLLM.from_pretrained(tmp_path / "made")
    assert loaded.base == ModelSpec(str(moved / "gguf" / "base.gguf")).dequantized()
    assert loaded.identity == expected.identity
    assert torch.equal(loaded.head.weight, expected.head.weight)
    assert loaded.calibration == expected.calibration
    assert loaded.assistants == expected.assistants
    assert set(loaded.template.turn_ends) == {5, byte_tokenizer.eos_token_id}
    params = SamplingParams(max_tokens=12)
    outputs = [model.generate("the cat", params, threshold=0.5)[0].token_ids for model in (loaded, expected)]
    assert outputs[0] == outputs[1]
    loaded.save_pretrained(tmp_path / "saved again")
    again = CoLLM.from_pretrained(tmp_path / "saved again", engine="transformers")
    assert again.base == ModelSpec(str(tmp_path / "saved again" / "gguf" / "base.gguf")).dequantized()
    with pytest.raises(ConfigError, match="is a GGUF file already"):
        export(moved, tmp_path / "exported again")
    with pytest.raises(ConfigError, match=r"expected a directory for a collaboration"):
        export(tmp_path / "made", tmp_path / "out.gguf")
    assert not (tmp_path / "exported again").exists()
