"""A training run: options -> data -> scores -> training -> calibration. Public names are imported on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collm.run.options import RunConfig
    from collm.run.train import RunResult, train_collaboration, tune_model

__all__ = ["RunConfig", "RunResult", "train_collaboration", "tune_model"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'collm.run' has no attribute {name!r}")
    return getattr(import_module("collm.run.train"), name)
