"""Linear layers in the layout that a CPU's matrix kernels want, for models that only decode."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
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


def can_pack(module: nn.Module) -> bool:
    """Whether `pack_linears` can do something for the module: all of it on a CPU, in a dtype that oneDNN multiplies."""
    if not cast(Any, torch.backends.mkldnn).is_available():
        return False
    dtypes = {torch.float32} | ({torch.bfloat16} if torch.ops.mkldnn._is_mkldnn_bf16_supported() else set())
    kinds = {(parameter.device.type, parameter.dtype) for parameter in module.parameters()}
    return len(kinds) == 1 and kinds <= {("cpu", dtype) for dtype in dtypes}


@torch.inference_mode()
def pack_linears(module: nn.Module) -> None:
    """Replace each `nn.Linear` below `module`, in place, where the packed form is faster here.

    Which is faster depends on the processor, the number of threads and the layer's shape. Layers of one shape are timed
    in both forms, for a fraction of a second. Subclasses of `nn.Linear` stay: they may do more than multiply.
    """
    by_shape: dict[torch.Size, list[tuple[nn.Module, str]]] = {}
    for parent in module.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                by_shape.setdefault(child.weight.shape, []).append((parent, name))
    for places in by_shape.values():
        if packing_pays([cast(nn.Linear, getattr(parent, name)) for parent, name in places]):
            for parent, name in places:
                setattr(parent, name, PackedLinear(cast(nn.Linear, getattr(parent, name))))


def packing_pays(layers: Sequence[nn.Linear]) -> bool:
    """Whether layers of one shape are faster packed, a sequence alone and a batch of sixteen counting alike.

    Enough layers are timed in turn that their weights do not stay in the processor's cache, as they would not while a
    model runs.
    """
    weight = layers[0].weight
    if len(layers) * weight.nbytes < _LEAST_BYTES:
        return False
    plain = layers[: -(-_COLD_BYTES // weight.nbytes)]
    packed = [PackedLinear(layer) for layer in plain]
    ratio = 0.0
    for rows in _TIMED_ROWS:
        inputs = weight.new_ones(rows, weight.shape[1])
        best = [min(times) for times in zip(*_rounds(inputs, plain, packed), strict=True)]
        ratio += best[1] / best[0] / len(_TIMED_ROWS)
    return ratio < 1


_TIMED_ROWS = (1, 16)
_LEAST_BYTES = 1 << 20
"""Less is multiplied in no time in either form, and a plain layer is called faster."""
_COLD_BYTES = 64 << 20
_TIMED_S = 0.05
_LEAST_ROUNDS = 5


def _rounds(inputs: Tensor, *forms: Sequence[nn.Module]) -> Iterator[list[float]]:
    """Seconds that each form's layers take, one round after the other; the first, which makes programs, is left out."""
    end, count = time.perf_counter() + _TIMED_S, -1
    while count < _LEAST_ROUNDS or time.perf_counter() < end:
        seconds = []
        for layers in forms:
            start = time.perf_counter()
            for layer in layers:
                layer(inputs)
            seconds.append(time.perf_counter() - start)
        count += 1
        if count:
            yield seconds
