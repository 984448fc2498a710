"""What `collm export gguf` writes runs in llama.cpp, exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedTokenizerFast

from collm import CoLLM, SamplingParams
from collm.errors import UnsupportedModel
from collm.models import gguf_export
from collm.models.gguf_export import GgufType, write_gguf
from collm.models.llama import LlamaContext, LlamaModel, LlamaToken
from collm.models.loading import ModelSpec, load_model
from collm.tools.spec import ToolSpec
from tests.architectures import LLAMA3_ROPE
from tests.engine.test_engine import random_head
from tests.models.test_gguf_export import SIZES, WRITTEN, export, random_model
from tests.tiny_models import make_model, tiny_config
from tests.tokenizers import merging_tokenizer, sentencepiece_tokenizer

pytestmark = pytest.mark.llama

RUN: dict[str, Any] = {
    **WRITTEN,
    "llama3": lambda: transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE),
    "mistral-window": lambda: transformers.MistralConfig(**SIZES, sliding_window=24),
    "qwen3-narrow-heads": lambda: transformers.Qwen3Config(**SIZES, head_dim=8),
}


@torch.no_grad()
def error_of(path: Path, model: Any, length: int) -> float:
    """The relative error of llama.cpp's logits."""
    ids = torch.randint(250, (length,), generator=torch.Generator().manual_seed(0))
    expected = model(ids[None], use_cache=False).logits[0]
    context = LlamaContext(LlamaModel(path, name="file", device="cpu"), positions=length)
    found, _ = context.decode([LlamaToken(0, at, one, True) for at, one in enumerate(ids.tolist())])
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("kind", "most"), [("f32", 1e-5), ("bf16", 0.05), ("q8_0", 0.1)])
@pytest.mark.parametrize("name", RUN)
def test_logits_are_those_of_the_model(
    name: str, kind: GgufType, most: float, byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model, path = random_model(RUN[name]()), tmp_path / "model.gguf"
    write_gguf(model, byte_tokenizer, path, kind)
    length = min(LlamaModel(path, name="file").max_length or 0, 100)
    assert length == (24 if name == "mistral-window" else 100)
    assert error_of(path, model, length) < most


def test_a_file_with_other_logits_does_not_appear(
    byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_export, "_turned", lambda name, values, config: values)
    with pytest.raises(UnsupportedModel, match="logits of the file have a relative error of"):
        write_gguf(random_model(WRITTEN["llama"]()), byte_tokenizer, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


TEXTS = ("the cat sat on the mat", " 12 mats,  the\n\ncat's é 日本 🦊", "it's")


@pytest.mark.parametrize("make", [merging_tokenizer, sentencepiece_tokenizer])
def test_llama_cpp_splits_text_as_the_tokenizer_does(make: Any, tmp_path: Path) -> None:
    options = {"across_words": False} if make is merging_tokenizer else {}
    tokenizer = make(TEXTS[0], **options)
    write_gguf(make_model(tiny_config(vocab_size=400), 0), tokenizer, tmp_path / "model.gguf")
    model = LlamaModel(tmp_path / "model.gguf", name="file")
    vocab = model.library.llama_model_get_vocab(model.weights)
    for text in TEXTS:
        data, found = text.encode(), (model.library.llama_token * 200)()
        count = model.library.llama_tokenize(vocab, data, len(data), found, 200, True, True)
        assert list(found[:count]) == tokenizer(text)["input_ids"]


def test_a_tuned_collaboration_runs_in_llama_cpp(byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    make_model(WRITTEN["llama"](), 0).save_pretrained(tmp_path / "base")
    byte_tokenizer.save_pretrained(tmp_path / "base")
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    base: Any = get_peft_model(load_model(ModelSpec(str(tmp_path / "base"))), config)  # type: ignore[arg-type]
    made = CoLLM(base, [ToolSpec("calculator")], random_head(32, 1), byte_tokenizer)
    made.save_pretrained(tmp_path / "made")
    export(tmp_path / "made", tmp_path / "out", "--type", "f32")
    loaded = CoLLM.from_pretrained(tmp_path / "out")
    assert loaded.base == ModelSpec(str(tmp_path / "out" / "gguf" / "base.gguf"))
    assert isinstance(loaded.members[0], LlamaModel)
    params = SamplingParams(max_tokens=16)
    expected = made.generate(["the cat", "on"], params, threshold=0.5)
    found = loaded.generate(["the cat", "on"], params, threshold=0.5)
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    assert [one.authors for one in found] == [one.authors for one in expected]
