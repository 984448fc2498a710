"""Tiny models with random weights, made from configs, and the devices that tests run on."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from tests.architectures import COMMON

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
"""Where exactness is tested: wherever the machine can."""


def tiny_config(**changes: Any) -> LlamaConfig:
    """Weights large enough that the two best logits lie far above rounding apart."""
    return LlamaConfig(**{**COMMON, "max_position_embeddings": 128, **changes})


def make_model(config: Any, seed: int, device: str = "cpu") -> PreTrainedModel:
    """A causal LM with random weights, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).eval().to(device)
