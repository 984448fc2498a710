"""Linear layers in the layout that a CPU's matrix kernels want, for models that only decode."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """An fp32 `nn.Linear` run by oneDNN from a weight converted once.

    The default kernel reads a weight again for each of a handful of tokens; this one takes up to about 16 tokens in
    little more than the time of one. The plain weight is not kept, so the layer can be neither trained nor saved.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", linear.weight.detach().to_mkldnn(), persistent=False)
        self.bias = linear.bias

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, "none", [], "")
        return outputs


def packing_pays(module: nn.Module) -> bool:
    """Whether the module is one that `pack_linears` makes faster: all of it fp32 on a CPU with oneDNN."""
    kinds = {(parameter.device.type, parameter.dtype) for parameter in module.parameters()}
    return kinds == {("cpu", torch.float32)} and torch._C.has_mkldnn


def pack_linears(module: nn.Module) -> None:
    """Replace every `nn.Linear` below `module`, in place. Subclasses stay: they may do more than multiply."""
    for name, child in module.named_children():
        if type(child) is nn.Linear:
            setattr(module, name, PackedLinear(child))
        else:
            pack_linears(child)
