"""The devices of models."""

from __future__ import annotations

import torch

from collm.errors import ConfigError


def check_device(device: str | None) -> None:
    """Raise a ConfigError if a device is a GPU that torch does not have here."""
    kind, _, index = (device or "").partition(":")
    if kind != "cuda":
        return
    count = torch.cuda.device_count()
    if not count:
        raise ConfigError(f"device is {device}, but torch finds no CUDA GPU here; use cpu, or leave the device out")
    if index.isdigit() and int(index) >= count:
        raise ConfigError(f"device is {device}, but torch finds {count} CUDA GPUs here; count them from cuda:0")
