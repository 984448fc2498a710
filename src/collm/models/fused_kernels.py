"""Norms and rotary embeddings as single Triton kernels, for static passes.

PyTorch runs an RMS norm as eight kernels and a rotary embedding as twelve, and for a few tokens launching them takes
longer than running them. A model uses the kernels here only if their results equal those of its own modules.

Shapes: T tokens, H heads, D head dimension, N normalised dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from collm.models.language_model import LanguageModel

_ROTARY = "apply_rotary_pos_emb"
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@triton.jit
def _rms_norm(
    states, weight, output, row_stride, size, epsilon,
    PLUS_ONE: tl.constexpr, ROUND_FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < size
    values = tl.load(states + row * row_stride + at, mask=inside, other=0.0).to(tl.float32)
    normed = values * tl.rsqrt(tl.sum(values * values) / size + epsilon)
    factor = tl.load(weight + at, mask=inside, other=0.0)
    if ROUND_FIRST:
        normed = normed.to(output.dtype.element_ty).to(tl.float32)
    factor = factor.to(tl.float32)
    if PLUS_ONE:
        factor += 1.0
    tl.store(output + row * size + at, (normed * factor).to(output.dtype.element_ty), mask=inside)


def rms_norm(states: Tensor, weight: Tensor, epsilon: float, *, plus_one: bool, round_first: bool) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight, computed in fp32 (arXiv 1910.07467).

    Args:
        states: shape (..., N).
        weight: shape (N,).
        plus_one: multiply by 1 + weight, as Gemma does.
        round_first: round to the dtype of the states before multiplying, as Llama does.

    Returns:
        Shape (..., N).
    """
    size = states.shape[-1]
    rows = states.reshape(-1, size)
    output = torch.empty(rows.shape, dtype=states.dtype, device=states.device)
    _rms_norm[(len(rows),)](
        rows, weight, output, rows.stride(0), size, epsilon, PLUS_ONE=plus_one, ROUND_FIRST=round_first,
        BLOCK=triton.next_power_of_2(size),
    )  # fmt: skip
    return output.view(states.shape)


@triton.jit
def _rotate(
    states, cos, sin, output, head_stride, token_stride, angle_stride, heads, dim,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK_H)[:, None]
    at = tl.arange(0, BLOCK_D)[None, :]
    half = dim // 2
    inside = (head < heads) & (at < dim)
    other = tl.where(at < half, at + half, at - half)
    start = states + token * token_stride + head * head_stride
    values = tl.load(start + at, mask=inside, other=0.0).to(tl.float32)
    turned = tl.load(start + other, mask=inside, other=0.0).to(tl.float32)
    turned = tl.where(at < half, -turned, turned)
    c = tl.load(cos + token * angle_stride + at, mask=at < dim, other=0.0).to(tl.float32)
    s = tl.load(sin + token * angle_stride + at, mask=at < dim, other=0.0).to(tl.float32)
    rotated = (values * c + turned * s).to(output.dtype.element_ty)
    tl.store(output + (token * heads + head) * dim + at, rotated, mask=inside)


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding that rotates the two halves of each head (arXiv 2104.09864).

    Args:
        states: shape (1, H, T, D), with stride 1 in the last dimension.
        cos, sin: shape (1, T, D).

    Returns:
        Shape (1, H, T, D), stored token by token.
    """
    _, heads, tokens, dim = states.shape
    output = torch.empty(tokens, heads, dim, dtype=states.dtype, device=states.device)
    _rotate[(tokens,)](
        states, cos, sin, output, states.stride(1), states.stride(2), cos.stride(1), heads, dim,
        BLOCK_H=triton.next_power_of_2(heads), BLOCK_D=triton.next_power_of_2(dim),
    )  # fmt: skip
    return output.transpose(0, 1).unsqueeze(0)


class FusedKernels:
    """Replaces a model's norms and rotary embeddings by single kernels where the results are equal.

    Args:
        model: the model, which is modified inside `applied` only.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._norms: list[tuple[nn.Module, Callable[..., Any]]] = []
        self._attentions: list[tuple[nn.Module, Callable[..., Any]]] = []
        equal: dict[Any, bool] = {}
        for module in model.decoder.modules():
            if "forward" in vars(module):
                continue
            plain = _rotary_of(module)
            if type(module).__name__.endswith("RMSNorm") and (fused := _fused_norm(module)) is not None:
                self._norms.append((module, fused))
            elif plain is not None and equal.setdefault(plain, _rotates_halves(plain, model)):
                self._attentions.append((module, _with_rotary(module, _rotary_of_halves(plain))))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Run the model with the kernels inside the block."""
        replaced = [*self._norms, *self._attentions]
        try:
            for module, fused in replaced:
                module.forward = fused
            yield
        finally:
            for module, _ in replaced:
                vars(module).pop("forward", None)


@torch.no_grad()
def _fused_norm(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The norm as one kernel; None if the results differ."""
    weight = getattr(module, "weight", None)
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or weight.ndim != 1 or not isinstance(epsilon, float):
        return None
    states = _random(3, len(weight), like=weight)
    expected = module(states)
    for plus_one, round_first in ((False, True), (False, False), (True, False)):

        def fused(states: Tensor, plus_one: bool = plus_one, round_first: bool = round_first) -> Tensor:
            return rms_norm(states, weight, epsilon, plus_one=plus_one, round_first=round_first)

        if _close(fused(states), expected):
            return fused
    return None


def _rotary_of_halves(plain: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Use the kernel if whole heads are rotated, else the model's own function."""

    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if cos.ndim != 3 or {cos.shape[-1], k.shape[-1]} != {q.shape[-1]}:
            return plain(q, k, cos, sin, *args, **kwargs)
        return rotate(q, cos, sin), rotate(k, cos, sin)

    return apply


def _rotary_of(module: nn.Module) -> Callable[..., Any] | None:
    """The rotary embedding that a layer's forward pass calls; None if it calls none by this name."""
    forward = type(module).forward
    called = _ROTARY in getattr(getattr(forward, "__code__", None), "co_names", ())
    return forward.__globals__.get(_ROTARY) if called else None


def _with_rotary(module: nn.Module, rotary: Callable[..., Any]) -> Callable[..., Any]:
    """A layer's forward pass with another rotary embedding. Other models use that of the modeling file meanwhile."""
    forward: Any = type(module).forward
    names = {**forward.__globals__, _ROTARY: rotary}
    own = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    own.__kwdefaults__ = forward.__kwdefaults__
    return MethodType(own, module)


@torch.no_grad()
def _rotates_halves(apply: Callable[..., Any], model: LanguageModel) -> bool:
    """Whether the rotary embedding of a modeling file equals `rotate`."""
    dim = 16
    weight = model.output_weight
    q, k = (_random(1, heads, 3, dim, like=weight) for heads in (4, 2))
    cos, sin = (_random(1, 3, dim, like=weight) for _ in range(2))
    try:
        expected = apply(q, k, cos, sin)
    except (TypeError, RuntimeError, IndexError):
        return False
    return len(expected) == 2 and all(
        one.shape == states.shape and _close(rotate(states, cos, sin), one)
        for states, one in zip((q, k), expected, strict=True)
    )


def _random(*shape: int, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator).to(like.device, like.dtype)


def _close(actual: Tensor, expected: Tensor) -> bool:
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return False
    tolerance = _TOLERANCE.get(actual.dtype, 1e-5)
    return torch.allclose(actual.float(), expected.float(), atol=tolerance, rtol=tolerance)
