"""Memory limits of KV caches."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

from collm.engine.slot_table import SlotTable
from collm.errors import ConfigError

SHARES = {"cpu": 0.5, "cuda": 0.8}
"""Default share of the memory that is free after loading the models."""
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def cache_bytes(memory: str | int | None) -> int | float | None:
    """Parse a size (4GiB, 500MB, a number of bytes) to bytes (int) or a share of free memory (50%) to a float.

    Raises:
        ConfigError: `memory` is neither a size nor a share, or more than any device here has.
    """
    size = _parsed(memory)
    gpus = [torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())]
    largest = max([int(psutil.virtual_memory().total), *gpus])
    if isinstance(size, int) and size > largest:
        has = f"no device here has more than {largest / 2**30:.1f}GiB"
        raise ConfigError(f"cache_memory is {memory}, but {has}; give less, or a share of free memory such as 50%")
    return size


def _parsed(memory: str | int | None) -> int | float | None:
    if memory is None or (isinstance(memory, int) and memory > 0):
        return memory
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*|%)\s*", str(memory))
    if found is not None:
        number, unit = float(found[1]), found[2].upper()
        if unit == "%" and 0 < number <= 100:
            return number / 100
        if unit in _UNITS and number * _UNITS[unit] >= 1:
            return int(number * _UNITS[unit])
    raise ConfigError(f"cache_memory is {memory!r}, expected a size such as 4GiB or a share of free memory such as 50%")


def share_cache_memory(models: Sequence[SlotTable], memory: str | int | None) -> None:
    """Allocate each model's cache. Models on one device share its memory and get the same number of positions.

    Args:
        memory: limit per device, as in `cache_bytes`; None for the default share.
    """
    wanted = cache_bytes(memory)
    by_device: dict[torch.device, list[SlotTable]] = {}
    for model in models:
        by_device.setdefault(model.device, []).append(model)
    for device, members in by_device.items():
        share = wanted or SHARES.get(device.type, 0.5)
        limit = share if isinstance(share, int) else int(_free_bytes(device) * share)
        positions = limit // sum(model.bytes_per_position for model in members)
        if wanted is None:
            positions = min([positions, *(one.default_positions for one in members if one.default_positions)])
        for model in members:
            model.set_capacity(positions)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    available = int(psutil.virtual_memory().available)
    try:
        limit, used = (int((Path("/sys/fs/cgroup") / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # outside of a control group, or in one without a limit
        return available
    return max(min(available, limit - used), 0)
