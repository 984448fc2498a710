"""GGUF files of tiny Llamas, as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import quantize
from transformers import PreTrainedModel, PreTrainedTokenizerFast

NAMES = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 99)


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    architecture: str = "llama",
    tensors: dict[str, np.ndarray] | None = None,
) -> Path:
    """Write a Llama with its byte-level tokenizer and chat template, the matrices in Q8_0.

    Args:
        tensors: others to write beside its own.
    """
    writer = gguf.GGUFWriter(path, architecture)
    _add_config(writer, model.config)
    _add_tokenizer(writer, tokenizer)
    for name, tensor in model.state_dict().items():
        values = _turned(name, tensor.float().numpy(), model.config)
        stored = NAMES.get_name(name, try_suffixes=(".weight",))
        if values.ndim == 2:
            writer.add_tensor(stored, quantize(values, gguf.GGMLQuantizationType.Q8_0), raw_dtype=_Q8)
        else:
            writer.add_tensor(stored, values)
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


_Q8 = gguf.GGMLQuantizationType.Q8_0


def _add_config(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = set(tokenizer.all_special_ids)
    kinds = [gguf.TokenType.CONTROL if one in special else gguf.TokenType.NORMAL for one in range(len(tokens))]
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(tokenizer.eos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_unk_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)


def _turned(name: str, values: np.ndarray, config: Any) -> np.ndarray:
    """Rows of queries and keys in the order in which llama.cpp turns them."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return values
    pairs = values.reshape(heads, 2, len(values) // heads // 2, -1)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(values.shape))
