"""Attention of a packed row over the keys of each token's slot, with the model's own mask.

Shapes: T packed tokens, S slots, n slots of a group, width queries per slot of a group, H heads, L cached positions, D
head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from collm.engine.slots import PackedPass, StaticPass
from collm.errors import UnsupportedModel

ATTENTION_NAME = "collm_slots"
STATIC_ATTENTION_NAME = "collm_static"


def slot_mask(
    q_length: int, kv_length: int, q_offset: Tensor | None, mask_function: Any, **kwargs: Any
) -> Tensor | None:
    """Evaluate the model's mask function at the position of every packed token: (1, 1, T, L), true where visible."""
    if q_offset is None:
        return None
    zero = q_offset.new_zeros(1, 1, 1, 1)  # the packed row is a batch of one
    keys = torch.arange(kv_length, device=q_offset.device)[None, None, None, :]
    mask = mask_function(zero, zero, q_offset[None, None, :, None], keys)
    return cast(Tensor, mask.expand(1, 1, q_length, kv_length))


def slot_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    slot_pass: PackedPass | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a packed row (1, H, T, D) over the cached positions of slots, group by group: (1, T, H, D_v)."""
    slot_pass = _checked(module, slot_pass, position_bias)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    outputs = []
    for group in slot_pass.groups:
        keys, values = slot_pass.held(key, value, group)
        queries = query[0, :, group.tokens if group.padded is None else group.padded]  # (H, n * width, D)
        queries = queries.reshape(queries.shape[0], keys.shape[0], group.width, -1).transpose(0, 1)  # (n, H, width, D)
        mask = slot_pass.mask_of(group, attention_mask, query.dtype)
        if softcap is None and s_aux is None:
            attended = _fused_attention(queries, keys, values, mask, scale)
        else:
            attended = _plain_attention(queries, keys, values, mask, scale, softcap, s_aux)
        attended = attended.transpose(1, 2).flatten(0, 1)  # (n * width, H, D_v)
        outputs.append(attended if group.kept is None else attended[group.kept])
    return torch.cat(outputs).unsqueeze(0), None


def static_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    slot_pass: StaticPass | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a static pass (1, H, T, D) over pages (N, page, H_kv, D): (1, T, H, D_v)."""
    from collm.engine.paged_attention import paged_attention  # requires Triton, which PyTorch for GPUs includes

    slot_pass = _checked(module, slot_pass, position_bias)
    assert attention_mask is not None
    attended = paged_attention(
        query[0].transpose(0, 1),
        key,
        value,
        slot_pass.table,
        slot_pass.slots,
        slot_pass.queries,
        attention_mask,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap,
        sinks=s_aux,
    )
    return attended.unsqueeze(0), None


Layout = TypeVar("Layout")


def _checked(module: Any, layout: Layout | None, position_bias: Tensor | None) -> Layout:
    if layout is None or position_bias is not None:
        missing = "no slot layout" if layout is None else "a position bias"
        raise UnsupportedModel(f"{type(module).__name__} calls attention with {missing}; collm cannot run it exactly")
    return layout


class MaskKinds:
    """Kinds of the masks that a model creates in each pass, in order, as numbers for the kernel.

    The first pass determines them from the model's mask functions. Later passes reuse them.
    """

    def __init__(self) -> None:
        self._known: list[Tensor] = []
        self._next = 0

    def start(self) -> None:
        """Begin a pass."""
        self._next = 0

    def next(self, mask_function: Callable[..., Tensor], size: int | None, device: torch.device) -> Tensor:
        """Window and chunk size of the next mask, shape (2,), int32.

        Raises:
            UnsupportedModel: the kernel does not support the mask.
        """
        if self._next == len(self._known):
            self._known.append(torch.tensor(mask_kind(mask_function, size, device), dtype=torch.int32, device=device))
        self._next += 1
        return self._known[self._next - 1]


def mask_kind(mask_function: Callable[..., Tensor], size: int | None, device: torch.device) -> tuple[int, int]:
    """Classify a mask function by evaluating it. Returns the sliding window and the chunk size, 0 for none.

    Args:
        mask_function: takes indices of batch, head, queries and keys, as in transformers.
        size: the size of the window or chunk, if any.

    Raises:
        UnsupportedModel: the mask is neither causal, nor a sliding window, nor chunked.
    """
    step = size or 16
    at = sorted({0, 1, 2, 1 << 20} | {multiple * step + off for multiple in (1, 2, 3, 10) for off in (-1, 0, 1)})
    near = {query + off for query in at for off in (-1, 0, 1)} | {
        query - step + off for query in at for off in (-1, 0, 1)
    }
    queries = torch.tensor(at, device=device)[:, None]
    keys = torch.tensor(sorted(key for key in near if key >= 0), device=device)[None, :]
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)
    mask = mask_function(zero, zero, queries[None, None], keys[None, None])[0, 0]
    causal = keys <= queries
    if torch.equal(mask, causal):
        return 0, 0
    if size and torch.equal(mask, causal & (keys > queries - size)):
        return size, 0
    if size and torch.equal(mask, causal & (keys // size == queries // size)):
        return 0, size
    raise UnsupportedModel("the model's attention mask is neither causal, nor a sliding window, nor chunked")


_MASK_KINDS: ContextVar[MaskKinds] = ContextVar("mask kinds of the current static pass")


def static_mask(
    mask_function: Callable[..., Tensor], device: torch.device, local_size: int | None = None, **kwargs: Any
) -> Tensor:
    """Return the kind of a mask, shape (2,), instead of the mask."""
    return _MASK_KINDS.get().next(mask_function, local_size, device)


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    batch, heads, length, _ = query.shape
    shared = heads // key.shape[1]
    if mask is None and length > 1:  # a whole prompt, causal from position 0
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=shared > 1)
    # Fold query heads that share a key head into more queries of that head, so that keys are not copied.
    folded = query.reshape(batch, heads // shared, shared * length, -1)
    if mask is not None and shared > 1 and length > 1:
        mask = mask.repeat(1, 1, shared, 1)
    attended = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scale)
    return attended.reshape(batch, heads, length, -1)


def _plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention with capped scores (Gemma 2) or per-head sinks (GPT-OSS), which fused kernels do not support."""
    shared, length = query.shape[1] // key.shape[1], query.shape[2]
    key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    scores = query @ key.transpose(2, 3) * scale  # (n, H, t, L)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None and length > 1:
        mask = torch.full((length, key.shape[2]), -torch.inf, dtype=scores.dtype, device=query.device).triu(1)
    if mask is not None:
        scores = scores + mask
    if sinks is not None:
        column = sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, length, 1)
        scores = torch.cat([scores, column.to(scores.dtype)], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32)[..., : key.shape[2]].to(query.dtype)
    return weights @ value


def register_attention() -> None:
    """Register both attention implementations with transformers. Repeated calls have no effect."""
    AttentionInterface.register(ATTENTION_NAME, slot_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, slot_mask)
    AttentionInterface.register(STATIC_ATTENTION_NAME, static_attention)
    AttentionMaskInterface.register(STATIC_ATTENTION_NAME, static_mask)


@contextmanager
def slot_attention_of(config: Any, kinds: MaskKinds | None = None) -> Iterator[None]:
    """Run the model of `config` with slot attention inside the block, and restore its attention afterwards.

    Args:
        kinds: mask kinds for a static pass; None for a packed pass.
    """
    before = config._attn_implementation
    config._attn_implementation = ATTENTION_NAME if kinds is None else STATIC_ATTENTION_NAME
    token = None
    if kinds is not None:
        kinds.start()
        token = _MASK_KINDS.set(kinds)
    try:
        yield
    finally:
        config._attn_implementation = before
        if token is not None:
            _MASK_KINDS.reset(token)
