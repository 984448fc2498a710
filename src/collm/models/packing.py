"""Linear layers in the layout that a CPU's matrix kernels want, for models that only decode."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """An `nn.Linear` run by oneDNN from a weight reordered once.

    The default kernels walk a plain weight in an order that suits neither one token nor a handful; from the blocked
    order a few tokens cost little more than one. The plain weight is not kept, so the layer can be neither trained
    nor saved.
    """

    weight: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.register_buffer("weight", packed, persistent=False)
        self.bias = linear.bias

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, "none", [], "")
        return outputs


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
