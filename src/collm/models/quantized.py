"""Checkpoints whose weights are quantized: with what, as their config says."""

from __future__ import annotations

from transformers import PretrainedConfig
from transformers.utils.quantization_config import QuantizationMethod

from collm.errors import LoadError

UNNAMED = "a method that its config.json does not name"
KNOWN = {method.value for method in QuantizationMethod}


def quantized_with(config: PretrainedConfig) -> str | None:
    """The method that quantized a checkpoint's weights ("awq", "gptq", "fp8", ..); None if they are not quantized."""
    for part in (config, config.get_text_config()):
        said = getattr(part, "quantization_config", None)
        if isinstance(said, dict):
            by_bitsandbytes = said.get("load_in_4bit") or said.get("load_in_8bit")
            return str(said.get("quant_method", "bitsandbytes" if by_bitsandbytes else UNNAMED))
    return None


def check_known(path: str, config: PretrainedConfig) -> None:
    """Raise a LoadError for a method that transformers does not know: it would read such weights as plain ones."""
    method = quantized_with(config)
    if method is not None and method not in KNOWN:
        raise LoadError(
            f"{path!r} is quantized with {method}, which transformers does not read; name the original "
            "checkpoint, or one quantized with bitsandbytes, awq, gptq or fp8"
        )
