"""Checks and corrections of what transformers reads from GGUF files."""

from __future__ import annotations

import json
from importlib.util import find_spec
from typing import Any, cast

from tokenizers import Tokenizer
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.integrations.gguf import GGUF_ARCHS, read_gguf_metadata

from collm.errors import LoadError
from collm.models.language_model import ropes_of

_ROPE_TENSORS = ("rope_freqs.", "rope_factors_")  # scale the frequencies of a rotary embedding


def check_gguf(name: str, file: str, config: PretrainedConfig) -> None:
    """Check that the config which transformers made of a GGUF file is complete, and that no remote code is needed."""
    metadata, tensors = read_gguf_metadata(file)
    architecture = metadata["general.architecture"]
    if architecture in GGUF_ARCHS and find_spec("kernels") is not None:
        raise LoadError(
            f"for {name!r} of the architecture {architecture}, transformers would run code from the Hub; uninstall "
            "the package kernels, or use the original checkpoint"
        )
    scaled = metadata.get(f"{architecture}.rope.scaling.type", "none") != "none"
    kinds = {rope.get("rope_type", "default") for rope in ropes_of(config.get_text_config())}
    if (scaled or any(one.startswith(_ROPE_TENSORS) for one in tensors)) and kinds == {"default"}:
        raise LoadError(
            f"{name!r} scales its rotary embedding, which transformers does not read from a GGUF file of the "
            f"architecture {architecture}; use the original checkpoint"
        )


def drop_additions(tokenizer: PreTrainedTokenizerBase, file: str) -> None:
    """Remove tokens that the GGUF file does not have, such as the <|endoftext|> that transformers adds."""
    size = read_gguf_metadata(file)[0]["tokenizer.ggml.tokens"]
    if len(tokenizer) > size:
        content = json.loads(cast(Any, tokenizer).backend_tokenizer.to_str())
        content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < size]
        cast(Any, tokenizer)._tokenizer = Tokenizer.from_str(json.dumps(content))
