"""A tiny configuration of every architecture that decoding must be exact on, windows short enough to matter."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

VOCAB_SIZE = 97
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
"""Scaled rotary positions, as in Llama 3.1."""
_NO_GQA = {key: value for key, value in COMMON.items() if key != "num_key_value_heads"}
_GEMMA = {**COMMON, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}
_GPT2 = {
    "vocab_size": VOCAB_SIZE,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "initializer_range": 0.3,
}

EXACT: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**COMMON),
    "qwen2": lambda: transformers.Qwen2Config(**COMMON),
    "qwen3": lambda: transformers.Qwen3Config(**COMMON, head_dim=8),
    "mistral-window": lambda: transformers.MistralConfig(**COMMON, sliding_window=8),
    "gemma2": lambda: transformers.Gemma2Config(**_GEMMA),
    "gemma3": lambda: transformers.Gemma3TextConfig(**_GEMMA),
    "phi3": lambda: transformers.Phi3Config(**COMMON),
    "gpt-neox": lambda: transformers.GPTNeoXConfig(**_NO_GQA),
    "gpt2": lambda: transformers.GPT2Config(**_GPT2, bos_token_id=None, eos_token_id=1),
    "mixtral": lambda: transformers.MixtralConfig(**COMMON, num_local_experts=4),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(
        **COMMON, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
    "gpt-oss-sinks": lambda: transformers.GptOssConfig(**COMMON, head_dim=8, num_local_experts=4, sliding_window=8),
    "llama4-chunks": lambda: transformers.Llama4TextConfig(
        **COMMON, head_dim=8, num_local_experts=2, attention_chunk_size=8, intermediate_size_mlp=48
    ),
    "cohere": lambda: transformers.CohereConfig(**COMMON, logit_scale=0.5),
    "granite": lambda: transformers.GraniteConfig(**COMMON, logits_scaling=2.0),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        init_std=0.3,
        word_embed_proj_dim=32,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    ),
}

INNER_LOOP = ("llama", "mistral-window", "gemma3", "gpt-neox", "gpt2", "qwen3-moe", "gpt-oss-sinks", "llama4-chunks")
"""Each way of attending, of telling positions and of mixing experts at least once."""

ARCHITECTURES = [pytest.param(name, marks=[] if name in INNER_LOOP else pytest.mark.slow) for name in EXACT]
"""The names of `EXACT`, for tests of each."""

REFUSED: dict[str, Any] = {
    "bloom": lambda: transformers.BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=32, n_layer=2, n_head=4),
    "falcon": lambda: transformers.FalconConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    ),
    "mamba2": lambda: transformers.Mamba2Config(
        vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, state_size=8, n_groups=1
    ),
}
