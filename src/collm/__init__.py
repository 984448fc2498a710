"""Token-level collaboration between language models. Public names are imported on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from collm.noise import hush_libraries
from collm.version import __version__

if TYPE_CHECKING:
    from collm.collaboration import CoLLM
    from collm.core.head import DeferralHead
    from collm.core.params import SamplingParams, StructuredOutputs
    from collm.core.types import Completion, TokenStep
    from collm.models.loading import ModelSpec
    from collm.tools.spec import ToolSpec
    from collm.training.config import CoLLMConfig
    from collm.training.trainer import CoLLMTrainer

_HOME = {
    "CoLLM": "collm.collaboration",
    "CoLLMConfig": "collm.training.config",
    "CoLLMTrainer": "collm.training.trainer",
    "Completion": "collm.core.types",
    "DeferralHead": "collm.core.head",
    "ModelSpec": "collm.models.loading",
    "SamplingParams": "collm.core.params",
    "StructuredOutputs": "collm.core.params",
    "TokenStep": "collm.core.types",
    "ToolSpec": "collm.tools.spec",
}

__all__ = [
    "CoLLM",
    "CoLLMConfig",
    "CoLLMTrainer",
    "Completion",
    "DeferralHead",
    "ModelSpec",
    "SamplingParams",
    "StructuredOutputs",
    "TokenStep",
    "ToolSpec",
    "__version__",
]


hush_libraries()  # before anything imports them


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'collm' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
