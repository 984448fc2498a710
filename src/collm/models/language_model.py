"""A transformers causal LM as a decoder that gives hidden states and an output layer that gives logits."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from collm.errors import LoadError, UnsupportedModel


class LanguageModel:
    """A transformers causal LM (plain or PEFT-wrapped), split at its last hidden state.

    Its weights may change and move to another device at any time. Everything else is read once.

    Args:
        module: a `PreTrainedModel` with a language-modelling head, or a `PeftModel` around one.
        name: name in error messages and usage counts.
        vocab_size: keep only logits of token ids below this, as models pad their vocabularies; None keeps all.

    Attributes:
        inner: the module without its PEFT wrapper.
        hidden_size: H.
        padded_vocab_size: rows of the output layer, which may exceed the tokenizer's vocabulary.
        vocab_size: V, the number of logits.
        max_length: largest number of tokens in a sequence, None if the config has no limit.

    Raises:
        UnsupportedModel: the module has no decoder or no output layer, or holds an adapter that no `PeftModel` wraps.
    """

    def __init__(self, module: nn.Module, *, name: str, vocab_size: int | None = None) -> None:
        self.module = module
        self.name = name
        inner = self.inner = without_adapter(module)
        decoder: Any = inner.get_decoder() if hasattr(inner, "get_decoder") else None
        if decoder is inner:  # Llama 4 returns itself
            decoder = getattr(inner, "model", None)
        if decoder is None:
            raise UnsupportedModel(f"{name} ({type(inner).__name__}) has no decoder; expected a causal LM")
        self.decoder, self.config = decoder, decoder.config
        self._output_layer = inner.get_output_embeddings()
        if self._output_layer is None:
            raise UnsupportedModel(f"{name} ({type(inner).__name__}) has no output layer; expected a causal LM")
        weight = self.output_weight
        self.padded_vocab_size, self.hidden_size = map(int, getattr(weight, "ds_shape", weight.shape))  # of ZeRO-3
        self.vocab_size = min(vocab_size or self.padded_vocab_size, self.padded_vocab_size)
        self.max_length = _max_length(self.config.get_text_config())
        text_config = inner.config.get_text_config()
        self.softcap = getattr(text_config, "final_logit_softcapping", None)
        divisor = getattr(text_config, "logits_scaling", None) or 1
        self.scale = getattr(text_config, "logit_scale", None) or 1 / divisor
        self._has_plain_logits = (self.scale, self.softcap, self.vocab_size) == (1, None, self.padded_vocab_size)

    @property
    def weights_per_token(self) -> int:
        """Number of weights in matrix products per token: all but the input embedding, with inactive experts."""
        embedding = self.decoder.get_input_embeddings().weight
        tied = embedding is self.output_weight
        return int(self.inner.num_parameters()) - (0 if tied else embedding.numel())

    @property
    def device(self) -> torch.device:
        return self.output_weight.device

    @property
    def input_device(self) -> torch.device:
        """Device of the embedding. It differs from `device` in a model split over several devices."""
        return cast(torch.device, self.decoder.get_input_embeddings().weight.device)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """EOS token ids of the generation config; empty if it has none."""
        return eos_set(getattr(getattr(self.module, "generation_config", None), "eos_token_id", None), self.name)

    @property
    def output_weight(self) -> Tensor:
        """Weight of the output layer, shape (padded V, H)."""
        return cast(Tensor, self._output_layer.weight)

    @property
    def output_bias(self) -> Tensor | None:
        """Bias of the output layer, shape (padded V,), or None."""
        return cast("Tensor | None", getattr(self._output_layer, "bias", None))

    def hidden_states(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        """Last hidden states after the final norm, shape (B, T, H). `inputs` are further ones of the decoder."""
        return cast(Tensor, self.decoder(input_ids=input_ids, **inputs).last_hidden_state)

    def logits(self, hidden: Tensor) -> Tensor:
        """Map hidden states (..., H) to next-token logits (..., V), scaled and capped like the model's own."""
        layer = self._output_layer
        values: Tensor = layer(hidden.to(layer.weight.device))
        return values if self._has_plain_logits else self.shape_logits(values)

    def shape_logits(self, values: Tensor) -> Tensor:
        """Scale, cap and truncate outputs of the output layer, shape (..., padded V). May return the same tensor."""
        if self.scale != 1:
            values = values * self.scale
        if self.softcap is not None:
            values = torch.tanh(values / self.softcap) * self.softcap
        return values if self.vocab_size == self.padded_vocab_size else values[..., : self.vocab_size]


def without_adapter(module: nn.Module) -> Any:
    """The model inside a `PeftModel`; any other module unchanged."""
    if hasattr(module, "get_base_model"):
        return cast(Any, module).get_base_model()
    if hasattr(module, "peft_config"):
        what = f"the {type(module).__name__} holds an adapter that is no PeftModel"
        raise UnsupportedModel(f"{what}; load the model without it and wrap it with peft.PeftModel.from_pretrained")
    return module


def merged(module: nn.Module) -> Any:
    """The model inside a `PeftModel` with the adapter merged into its weights; any other module unchanged."""
    return module if without_adapter(module) is module else cast(Any, module).merge_and_unload()


def context_length(config: PretrainedConfig) -> int | None:
    """Number of positions that a text config states; None if it states none, as with ALiBi."""
    names = ("max_position_embeddings", "max_seq_len", "seq_length")
    return next((found for name in names if isinstance(found := getattr(config, name, None), int)), None)


def ropes_of(config: PretrainedConfig) -> list[dict[str, Any]]:
    """The RoPE parameters of a text config, for each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [kind for kind in rope.values() if isinstance(kind, dict)] or [rope]


def _max_length(config: PretrainedConfig) -> int | None:
    """The context length, or the original one of a RoPE that changes beyond it, which would invalidate cached keys."""
    longest = context_length(config)
    changing = [rope for rope in ropes_of(config) if rope.get("rope_type") in ("dynamic", "longrope")]
    limits = [longest, *(rope.get("original_max_position_embeddings") for rope in changing)]
    return min((limit for limit in limits if limit), default=None)


def eos_set(eos: Any, name: str) -> frozenset[int]:
    """Convert the EOS setting of a generation config (None, one id or a list) to a set."""
    ids = eos if isinstance(eos, list | tuple) else [] if eos is None else [eos]
    if not all(type(one) is int and one >= 0 for one in ids):
        raise LoadError(f"the generation config of {name!r} has eos_token_id {eos!r:.80}, expected token ids")
    return frozenset(ids)


def to_device(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Copy (nested) lists of numbers to the device as a tensor, without waiting for the device's pending work."""
    cuda = device.type == "cuda"
    return torch.tensor(values, dtype=dtype, pin_memory=cuda).to(device, non_blocking=True)
