"""Linear layers in the layout that a CPU's matrix kernels want, for models that only decode."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LONGEST = 256
"""Rows that a packed layer multiplies at once."""


class PackedLinear(nn.Module):
    """An `nn.Linear` run by oneDNN from a weight reordered once.

    The default kernels walk a plain weight in an order that suits neither one token nor a handful; from the blocked
    order a few tokens cost little more than one. The plain weight is not kept, so the layer can be neither trained
    nor saved.

    oneDNN keeps a program for each number of rows it ever saw, about a megabyte each, so rows come in few numbers:
    more than `LONGEST` in parts, the rest filled up with zeros to the next of `fitting_rows`.
    """

    weight: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.register_buffer("weight", packed, persistent=False)
        self.bias = linear.bias

    def forward(self, inputs: Tensor) -> Tensor:
        count = inputs.numel() // inputs.shape[-1]
        if 0 < count <= LONGEST and count == fitting_rows(count):
            return self._multiply(inputs)
        parts = [self._part(part) for part in torch.split(inputs.reshape(-1, inputs.shape[-1]), LONGEST)]
        outputs = parts[0] if len(parts) == 1 else torch.cat(parts)
        return outputs.view(*inputs.shape[:-1], outputs.shape[-1])

    def _part(self, rows: Tensor) -> Tensor:
        count = len(rows)
        return self._multiply(F.pad(rows, (0, 0, 0, fitting_rows(count) - count)))[:count]

    def _multiply(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, "none", [], "")
        return outputs


def fitting_rows(count: int) -> int:
    """The least number of rows, not below `count`, that layers run with: up to 16 any, up to 64 multiples of 8, then
    of 32."""
    step = 1 if count <= 16 else 8 if count <= 64 else 32
    return -(-count // step) * step


def packing_pays(module: nn.Module) -> bool:
    """Whether `pack_linears` makes the module faster: all of it on a CPU, in a dtype that its oneDNN multiplies."""
    if not cast(Any, torch.backends.mkldnn).is_available():
        return False
    dtypes = {torch.float32} | ({torch.bfloat16} if torch.ops.mkldnn._is_mkldnn_bf16_supported() else set())
    kinds = {(parameter.device.type, parameter.dtype) for parameter in module.parameters()}
    return len(kinds) == 1 and kinds <= {("cpu", dtype) for dtype in dtypes}


def pack_linears(module: nn.Module) -> None:
    """Replace every `nn.Linear` below `module`, in place. Subclasses stay: they may do more than multiply."""
    for name, child in module.named_children():
        if type(child) is nn.Linear:
            setattr(module, name, PackedLinear(child))
        else:
            pack_linears(child)
