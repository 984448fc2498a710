"""What each server of a machine gets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import BloomConfig, GPT2Config, LlamaConfig, MambaConfig, MptConfig, PretrainedConfig
from transformers import PreTrainedTokenizerFast as Tokenizer

from collm import CoLLM, DeferralHead, ModelSpec
from collm.errors import ConfigError, LoadError
from collm.tools.spec import ToolSpec
from collm.vllm.launch import ServerProcess
from collm.vllm.placement import (
    BLOCK_TOKENS,
    OVERHEAD_BYTES,
    USABLE,
    Machine,
    ModelMemory,
    fits_in_one,
    placed,
    placed_in_one,
)

GIB = 1 << 30
SIZES = st.builds(ModelMemory, st.integers(0, 40 * GIB), st.integers(1, 1 << 20), st.just(4096), st.just("float32"))
Saved = Callable[..., Path]


def flag(server: ServerProcess, name: str) -> str:
    return server.flags[list(server.flags).index(name) + 1]


def test_memory_is_read_from_the_config_alone(saved_model: Saved) -> None:
    path = saved_model("model", 0)
    weights = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    next(path.glob("*.safetensors")).unlink()
    size = ModelMemory.of(ModelSpec(str(path)))
    assert 0 <= weights - size.weights < 8192  # the file's header
    assert size == ModelMemory(size.weights, 2 * 2 * 32 // 4 * 2 * 4, 128, "float32")  # layers, kv heads x width, fp32
    half = ModelMemory.of(ModelSpec(str(path), dtype="bfloat16"))
    assert (half.weights, half.kv_per_token) == (size.weights // 2, size.kv_per_token // 2)


@pytest.mark.parametrize(
    ("config", "length"),
    [
        (BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4), None),
        (MptConfig(vocab_size=97, d_model=32, n_layers=2, n_heads=4, max_seq_len=256), 256),
        (GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64), 64),
        (LlamaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, seq_length=9), 2048),
    ],
    ids=["bloom", "mpt", "gpt2", "llama"],
)
def test_a_config_may_lack_a_length(config: PretrainedConfig, length: int | None, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    spec = ModelSpec(str(tmp_path))
    assert ModelMemory.of(spec).max_length == length
    for wanted in (None, 16):
        (plan,) = placed({"base": spec}, Machine([], 64 * GIB, 2), max_batch=2, max_length=wanted)
        assert flag(plan, "--max-model-len") == str(wanted or min(length or 8192, 8192))


def test_a_model_without_attention_is_refused(tmp_path: Path) -> None:
    MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2).save_pretrained(tmp_path)
    with pytest.raises(LoadError, match="is a MambaForCausalLM without attention"):
        ModelMemory.of(ModelSpec(str(tmp_path)))


def test_models_of_unknown_memory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="could not load the config"):
        ModelMemory.of(ModelSpec(str(tmp_path)))
    with pytest.raises(ConfigError, match=r"quantized \(nf4\).*--servers"):
        ModelMemory.of(ModelSpec("anywhere", quantization="nf4"))


@given(st.lists(SIZES, min_size=1), st.integers(0, 400 * GIB), st.integers(1, 64), st.integers(1, 1 << 14))
def test_all_that_share_a_memory_fit_into_it(models: list[ModelMemory], memory: int, batch: int, length: int) -> None:
    def needed(tokens: int) -> int:
        return sum(m.weights + OVERHEAD_BYTES + tokens * m.kv_per_token for m in models)

    try:
        tokens = Machine([], memory, 1).kv_tokens("base", models, batch, length)
    except ConfigError:
        assert needed(length + BLOCK_TOKENS) > USABLE * memory
        return
    assert length + BLOCK_TOKENS <= tokens <= batch * (length + BLOCK_TOKENS)
    assert needed(tokens) <= USABLE * memory
    assert tokens == batch * (length + BLOCK_TOKENS) or needed(tokens + 1) > USABLE * memory


@given(st.integers(1, 16), st.integers(2, 5))
def test_every_server_has_gpus_and_only_a_lack_makes_them_share(num_gpus: int, num_servers: int) -> None:
    parts = Machine(range(1, num_gpus + 1), GIB, 1).divided(num_servers)
    groups = [part.environment["CUDA_VISIBLE_DEVICES"].split(",") for part in parts]
    used = [int(gpu) for group in groups for gpu in group]
    assert [size for part in parts for size in part.gpu_bytes] == [gpu + 1 for gpu in used]
    assert len(groups) == num_servers
    assert all(len(group) & (len(group) - 1) == 0 < len(group) for group in groups)
    assert set(used) <= set(range(num_gpus))
    assert (len(used) == len(set(used))) == (num_gpus >= num_servers)


@pytest.fixture
def models(saved_model: Saved) -> dict[str, ModelSpec]:
    return {name: ModelSpec(str(saved_model(name, seed))) for seed, name in enumerate(("base", "assistant"))}


def test_servers_on_cores(models: dict[str, ModelSpec]) -> None:
    flags = {"base": ["--seed", "1"]}
    base, assistant = placed(models, Machine([], 64 * GIB, 5), max_batch=3, max_length=100, flags=flags)
    assert base.environment == {"OMP_NUM_THREADS": "2", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    assert assistant.environment == base.environment
    (crowded, *_) = placed(models, Machine([], 64 * GIB, 1), max_batch=3)
    assert crowded.environment["OMP_NUM_THREADS"] == "1"
    assert base.flags[-2:] == ["--seed", "1"]
    size = ModelMemory.of(models["base"])
    assert int(flag(base, "--kv-cache-memory-bytes")) == 3 * (100 + BLOCK_TOKENS) * size.kv_per_token
    assert flag(base, "--dtype") == "float32"  # vLLM's auto would halve it
    assert (flag(base, "--max-model-len"), flag(base, "--max-num-seqs")) == ("100", "3")


def test_servers_on_one_gpu_share_it(models: dict[str, ModelSpec]) -> None:
    plans = placed(models, Machine([24 * GIB], 64 * GIB, 1), max_batch=1 << 20)
    assert [plan.environment for plan in plans] == [{"CUDA_VISIBLE_DEVICES": "0"}] * 2
    shares = [float(flag(plan, "--gpu-memory-utilization")) for plan in plans]
    assert sum(shares) == pytest.approx(USABLE, abs=2e-3)
    kv = [int(flag(plan, "--kv-cache-memory-bytes")) for plan in plans]
    assert kv[0] == kv[1]  # models of one shape hold the same sequences
    assert flag(plans[0], "--max-model-len") == "128"


def test_servers_on_many_gpus_are_parallel(models: dict[str, ModelSpec]) -> None:
    base, assistant = placed(models, Machine([24 * GIB] * 6, 64 * GIB, 1), max_batch=4)
    assert [one.environment["CUDA_VISIBLE_DEVICES"] for one in (base, assistant)] == ["0", "1,2,3,4"]
    assert flag(assistant, "--tensor-parallel-size") == "4"
    size, tokens = ModelMemory.of(models["assistant"]), 4 * (128 + BLOCK_TOKENS)
    assert int(flag(assistant, "--kv-cache-memory-bytes")) == tokens * size.kv_per_token // 4


def test_a_memory_that_holds_no_sequence_is_refused(models: dict[str, ModelSpec]) -> None:
    with pytest.raises(
        ConfigError, match=r"beside its weights, the base has memory for .* 0 tokens, expected at least 128"
    ):
        placed(models, Machine([GIB], 64 * GIB, 1), max_batch=4)


def test_a_revision_is_served(models: dict[str, ModelSpec]) -> None:
    given = {**models, "assistant": ModelSpec(models["assistant"].path, revision="v2")}
    assert flag(placed(given, Machine([], 64 * GIB, 1), max_batch=1)[1], "--revision") == "v2"


def test_one_engine_has_memory_for_both_models(saved_model: Saved, tokenizer: Tokenizer, tmp_path: Path) -> None:
    base, assistant = saved_model("base", 0), saved_model("assistant", 1)
    head = DeferralHead(32)
    pair = CoLLM(ModelSpec(str(base)), [ModelSpec(str(assistant))], head, tokenizer)
    pair.save_pretrained(tmp_path / "pair")
    machine = Machine([], 8 * GIB, 2)
    plan = placed_in_one(str(tmp_path / "pair"), machine, max_batch=4, drafts=7, flags=["--seed", "3"])
    assert plan.model == str(assistant)
    assert json.loads(flag(plan, "--speculative-config"))["num_speculative_tokens"] == 7
    settings = json.loads(flag(plan, "--additional-config"))["collm"]
    assert settings["collaboration"] == str(tmp_path / "pair")
    tokens = 4 * (128 + BLOCK_TOKENS)
    assert settings["cache_memory"] == tokens * ModelMemory.of(ModelSpec(str(base))).kv_per_token
    assert int(flag(plan, "--kv-cache-memory-bytes")) == tokens * ModelMemory.of(ModelSpec(str(assistant))).kv_per_token
    assert plan.environment["VLLM_USE_V2_MODEL_RUNNER"] == "0"
    assert list(plan.flags)[-2:] == ["--seed", "3"]
    on_gpus = placed_in_one(str(tmp_path / "pair"), Machine([80 * GIB] * 3, 8 * GIB, 2), max_batch=4)
    assert on_gpus.environment["CUDA_VISIBLE_DEVICES"] == "0,1"  # tensor parallelism wants a power of two
    with pytest.raises(ConfigError, match="has memory for the keys and values of"):
        placed_in_one(str(tmp_path / "pair"), Machine([], 1, 2), max_batch=4)


def test_one_engine_holds_one_language_model_as_assistant(
    saved_model: Saved, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    base, others = ModelSpec(str(saved_model("base", 0))), [ModelSpec(str(saved_model(str(n), n))) for n in (1, 2)]
    CoLLM(base, others, DeferralHead(32, 2), tokenizer).save_pretrained(tmp_path / "two")
    CoLLM(base, [ToolSpec("calculator")], DeferralHead(32), tokenizer).save_pretrained(tmp_path / "tool")
    for name in ("two", "tool"):
        assert not fits_in_one(str(tmp_path / name))
        with pytest.raises(ConfigError, match="one engine holds a base and one language model"):
            placed_in_one(str(tmp_path / name), Machine([], 8 * GIB, 2), max_batch=4)
