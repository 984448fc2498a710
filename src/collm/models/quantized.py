"""Quantization methods of checkpoints, as named by their configs."""

from __future__ import annotations

from transformers import PretrainedConfig
from transformers.utils.quantization_config import QuantizationMethod

from collm.errors import LoadError

UNNAMED = "a method that its config.json does not name"
KNOWN = {method.value for method in QuantizationMethod}


def quantized_with(config: PretrainedConfig) -> str | None:
    """The quantization method of a checkpoint ("awq", "gptq", "fp8", ..); None if it is not quantized."""
    for part in (config, config.get_text_config()):
        settings = getattr(part, "quantization_config", None)
        if isinstance(settings, dict):
            by_bitsandbytes = settings.get("load_in_4bit") or settings.get("load_in_8bit")
            return str(settings.get("quant_method", "bitsandbytes" if by_bitsandbytes else UNNAMED))
    return None


def check_known(path: str, config: PretrainedConfig) -> None:
    """Raise a LoadError for an unknown quantization method, whose weights transformers would read as plain ones."""
    method = quantized_with(config)
    if method is not None and method not in KNOWN:
        raise LoadError(
            f"{path!r} is quantized with {method}, which transformers does not support; use the original "
            "checkpoint, or one quantized with bitsandbytes, awq, gptq or fp8"
        )
