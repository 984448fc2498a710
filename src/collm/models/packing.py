"""Linear layers in the memory layout of a CPU's matrix kernels, for inference only."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LONGEST = 256
"""Largest number of rows that a packed layer multiplies at once."""


class PackedLinear(nn.Module):
    """An `nn.Linear` that oneDNN runs with a reordered weight.

    With the blocked order a few tokens cost little more than one. The plain weight is dropped, so the layer can be
    neither trained nor saved.

    oneDNN caches a program of about a megabyte for each number of rows. To limit these numbers, inputs are split into
    parts of at most `LONGEST` rows and padded with zeros to `fitting_rows`.
    """

    weight: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.register_buffer("weight", packed, persistent=False)
        self.bias = linear.bias

    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.shape[:-1].numel() in _FITTING:
            outputs: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, "none", [], "")
            return outputs
        parts = []
        for rows in torch.split(inputs.reshape(-1, inputs.shape[-1]), LONGEST):
            padded = F.pad(rows, (0, 0, 0, fitting_rows(len(rows)) - len(rows)))
            parts.append(self(padded)[: len(rows)])
        return torch.cat(parts).view(*inputs.shape[:-1], parts[0].shape[-1])


def fitting_rows(count: int) -> int:
    """Round a number of rows up: any number up to 16, multiples of 8 up to 64, then multiples of 32."""
    step = 1 if count <= 16 else 8 if count <= 64 else 32
    return -(-count // step) * step


_FITTING = {fitting_rows(count) for count in range(LONGEST + 1)}


def can_pack(module: nn.Module) -> bool:
    """Whether `pack_linears` supports the module: all parameters on a CPU, in one dtype that oneDNN supports."""
    if not cast(Any, torch.backends.mkldnn).is_available():
        return False
    dtypes = {torch.float32} | ({torch.bfloat16} if torch.ops.mkldnn._is_mkldnn_bf16_supported() else set())
    kinds = {(parameter.device.type, parameter.dtype) for parameter in module.parameters()}
    return len(kinds) == 1 and kinds <= {("cpu", dtype) for dtype in dtypes}


@torch.inference_mode()
def pack_linears(module: nn.Module) -> None:
    """Replace each `nn.Linear` below `module` by a packed layer if that is faster here, timed for each shape.

    Subclasses of `nn.Linear` are not replaced, as they may do more than multiply.
    """
    by_shape: dict[torch.Size, list[tuple[nn.Module, str, nn.Linear]]] = {}
    for parent in module.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                by_shape.setdefault(child.weight.shape, []).append((parent, name, child))
    for places in by_shape.values():
        if packing_pays([layer for _, _, layer in places]):
            for parent, name, layer in places:
                setattr(parent, name, PackedLinear(layer))


def packing_pays(layers: Sequence[nn.Linear]) -> bool:
    """Whether layers of one shape are faster packed, on average of 1 and 16 rows, with weights not in any cache."""
    weight = layers[0].weight
    if len(layers) * weight.nbytes < _LEAST_BYTES:
        return False
    plain = layers[: -(-_COLD_BYTES // weight.nbytes)]
    packed = [PackedLinear(layer) for layer in plain]
    total = 0.0
    for count in (1, 16):
        inputs, end = weight.new_ones(count, weight.shape[1]), time.perf_counter() + _TIMED_S
        rounds: list[tuple[float, float]] = []
        while len(rounds) <= _LEAST_ROUNDS or time.perf_counter() < end:
            rounds.append((_seconds(plain, inputs), _seconds(packed, inputs)))
        of_plain, of_packed = map(min, zip(*rounds[1:], strict=True))  # the first round compiles programs
        total += of_packed / of_plain / 2
    return total < 1


_LEAST_BYTES = 1 << 20
"""Smaller layers are fast in either form, and calling a plain layer costs less."""
_COLD_BYTES = 64 << 20
_TIMED_S = 0.05
_LEAST_ROUNDS = 5


def _seconds(layers: Sequence[nn.Module], inputs: Tensor) -> float:
    start = time.perf_counter()
    for layer in layers:
        layer(inputs)
    return time.perf_counter() - start
