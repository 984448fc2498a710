"""Checks of the configs of checkpoints: what transformers would download and run, misread, or allocate without end."""

from __future__ import annotations

from importlib.util import find_spec

from transformers import PretrainedConfig
from transformers.integrations.gguf import GGUF_ARCHS, read_gguf_metadata
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_kernels_available
from transformers.utils.quantization_config import QuantizationMethod

from collm.errors import LoadError
from collm.models.language_model import ropes_of

ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
"""Attention implementations of transformers itself. Given a name with a slash, or one of flash attention without its
package, it would download and run a kernel."""

EXPERTS = ("eager", "batched_mm", "grouped_mm")
"""Implementations of mixtures of experts that are part of transformers. Others are kernels from the Hub."""

KERNELS = ("eetq", "fbgemm_fp8", "fp8", "metal", "mxfp4", "nvfp4")
"""Quantization methods for which transformers downloads and runs kernels where the package kernels is installed."""

MAX_LAYERS = 1000
"""Largest accepted number of layers, because layers are allocated before the weights are read."""

_ROPE_TENSORS = ("rope_freqs.", "rope_factors_")  # of a GGUF file, scale the frequencies of a rotary embedding


def quantized_with(config: PretrainedConfig) -> str | None:
    """The quantization method of a checkpoint ("awq", "gptq", "fp8", ..); None if it is not quantized."""
    for part in (config, config.get_text_config()):
        settings = getattr(part, "quantization_config", None)
        if isinstance(settings, dict):
            by_bitsandbytes = settings.get("load_in_4bit") or settings.get("load_in_8bit")
            unnamed = "bitsandbytes" if by_bitsandbytes else "a method that its config.json does not name"
            return str(settings.get("quant_method", unnamed))
    return None


def check_config(config: PretrainedConfig, path: str, attention: str | None) -> None:
    """Check the config of the model at `path`, for which an attention implementation may be given."""
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers > MAX_LAYERS:
        raise LoadError(f"the config of {path!r} has num_hidden_layers {layers}, expected at most {MAX_LAYERS}")
    method = quantized_with(config)
    if method is not None and method not in {one.value for one in QuantizationMethod}:  # read as plain weights
        advice = "use the original checkpoint, or one quantized with bitsandbytes, awq, gptq or fp8"
        raise LoadError(f"{path!r} is quantized with {method}, which transformers does not support; {advice}")
    if method in KERNELS and is_kernels_available():
        advice = "use the original checkpoint, or uninstall the package kernels"
        raise LoadError(f"{path!r} is quantized with {method}, which would run kernels from the Hub; {advice}")
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]
    attentions = [getattr(part, "_attn_implementation", None) for part in parts]
    experts = [getattr(part, "_experts_implementation", None) for part in parts]
    kinds = (("attention", "attn", attentions, ATTENTIONS), ("experts", "experts", experts, EXPERTS))
    for what, option, named, known in kinds:
        for one in (one for one in named if one not in (None, *known)):
            advice = f"remove {option}_implementation from its config.json"
            reason = "which is not part of transformers"
            raise LoadError(f"the config of {path!r} requires the {what} {one!r}, {reason}; {advice}")
    installed = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}
    for one in [attention] if attention else attentions:
        if one in installed and not installed[one]():
            reason = "whose package is not installed or not for this machine"
            raise LoadError(f"{path!r} requires the attention {one!r}, {reason}; install it, or choose another")


def check_gguf(name: str, file: str, config: PretrainedConfig) -> None:
    """Check that the config which transformers made of a GGUF file is complete, and that no remote code is needed."""
    metadata, tensors = read_gguf_metadata(file)
    architecture = metadata["general.architecture"]
    if architecture in GGUF_ARCHS and find_spec("kernels") is not None:
        reason = f"for {name!r} of the architecture {architecture}, transformers would run code from the Hub"
        raise LoadError(f"{reason}; uninstall the package kernels, or use the original checkpoint")
    scaled = metadata.get(f"{architecture}.rope.scaling.type", "none") != "none"
    kinds = {rope.get("rope_type", "default") for rope in ropes_of(config.get_text_config())}
    if (scaled or any(one.startswith(_ROPE_TENSORS) for one in tensors)) and kinds == {"default"}:
        reason = f"which transformers does not read from a GGUF file of the architecture {architecture}"
        raise LoadError(f"{name!r} scales its rotary embedding, {reason}; use the original checkpoint")
