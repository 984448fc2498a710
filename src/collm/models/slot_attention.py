"""Attention over KV slots: the packed row meets each slot's own keys, under the model's own mask.

Shapes: T packed tokens, S slots, n slots of one group, width its queries per slot, H heads, L cached positions, D head
dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from collm.errors import UnsupportedModel
from collm.models.slots import PackedPass, StaticPass

ATTENTION_NAME = "collm_slots"


def slot_mask(
    q_length: int, kv_length: int, q_offset: Tensor | None, mask_function: Any, **kwargs: Any
) -> Tensor | None:
    """The model's own mask function at the position of every packed token: (1, 1, T, L), true where visible."""
    if q_offset is None:
        return None
    zero = q_offset.new_zeros(1, 1, 1, 1)  # to the model the packed row is a batch of one
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
    slot_pass: PackedPass | StaticPass | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a packed row (1, H, T, D) over slots (S, H_kv, L, D), group by group: (1, T, H, D_v)."""
    if slot_pass is None or position_bias is not None:
        missing = "no slot layout" if slot_pass is None else "a position bias"
        raise UnsupportedModel(f"{type(module).__name__} calls attention with {missing}; collm cannot run it exactly")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    outputs = []
    for group in slot_pass.groups:
        keys = key[group.slots, :, : group.kv_length]
        values = value[group.slots, :, : group.kv_length]
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


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    batch, heads, length, _ = query.shape
    shared = heads // key.shape[1]
    if mask is None and length > 1:  # a whole prefix, causal from position 0
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=shared > 1)
    # Query heads that share a key head become further queries of it, so that keys are read, not copied.
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
    """Attention with capped scores (Gemma 2) or per-head sinks (GPT-OSS), which the fused kernels lack."""
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
    """Make `ATTENTION_NAME` known to transformers; repeating it changes nothing."""
    AttentionInterface.register(ATTENTION_NAME, slot_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, slot_mask)


@contextmanager
def slot_attention_of(config: Any) -> Iterator[None]:
    """Run the model of `config` with slot attention inside the block, and leave the model as it was found."""
    before = config._attn_implementation
    config._attn_implementation = ATTENTION_NAME
    try:
        yield
    finally:
        config._attn_implementation = before
