"""GGUF files: what transformers would leave out, add, or fetch code for."""

from __future__ import annotations

import json
from importlib.util import find_spec
from typing import Any, cast

from tokenizers import Tokenizer
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.integrations.gguf import GGUF_ARCHS, read_gguf_metadata

from collm.errors import LoadError

ROPE_TENSORS = ("rope_freqs.", "rope_factors_")
"""Beginnings of the names of tensors that scale a rotary embedding's frequencies."""


def check_gguf(name: str, file: str, config: PretrainedConfig) -> None:
    """Check what a GGUF file holds beside the config that transformers made of it.

    Args:
        name: what errors call it.

    Raises:
        LoadError: it scales its rotary positions and the config does not, or code from the Hub would be run for it.
    """
    metadata, tensors = read_gguf_metadata(file)
    architecture = metadata["general.architecture"]
    if architecture in GGUF_ARCHS and find_spec("kernels") is not None:
        raise LoadError(
            f"for {name!r}, of the architecture {architecture}, transformers would run code from the Hub; uninstall "
            "the package kernels, or name the original checkpoint"
        )
    scaled = metadata.get(f"{architecture}.rope.scaling.type", "none") != "none"
    if (scaled or any(one.startswith(ROPE_TENSORS) for one in tensors)) and _rope_types(config) <= {"default"}:
        raise LoadError(
            f"{name!r} scales its rotary positions, which transformers does not read from a GGUF file of the "
            f"architecture {architecture}; name the original checkpoint"
        )


def drop_additions(tokenizer: PreTrainedTokenizerBase, file: str) -> None:
    """Take out tokens that a GGUF file does not have: transformers gives each byte-level one an <|endoftext|>."""
    size = read_gguf_metadata(file)[0]["tokenizer.ggml.tokens"]
    if len(tokenizer) > size:
        content = json.loads(cast(Any, tokenizer).backend_tokenizer.to_str())
        content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < size]
        cast(Any, tokenizer)._tokenizer = Tokenizer.from_str(json.dumps(content))


def _rope_types(config: PretrainedConfig) -> set[str]:
    """Of all layers, which may differ by their kind."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = [one for one in rope.values() if isinstance(one, dict)] or [rope]
    return {kind.get("rope_type", "default") for kind in kinds}
