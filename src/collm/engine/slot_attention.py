"""Attention of a few new tokens per slot over the slots' keys.

Shapes: n slots, width queries per slot, H heads, H_kv key heads, L keys per slot, D and D_v head dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def fused_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of queries (n, H, width, D) over keys (n, H_kv, L, D): (n, H, width, D_v).

    Args:
        mask: added to the scores, shape (n, 1, width, L); None if each query sees the keys up to its own.
    """
    batch, heads, width, _ = query.shape
    shared = heads // key.shape[1]
    if mask is None and width > 1:  # a whole prompt, causal from position 0
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=shared > 1)
    # Fold query heads that share a key head into more queries of that head, so that keys are not copied.
    folded = query.reshape(batch, heads // shared, shared * width, -1)
    if mask is not None and shared > 1 and width > 1:
        mask = mask.repeat(1, 1, shared, 1)
    attended = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scale)
    return attended.reshape(batch, heads, width, -1)


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Like `fused_attention`, with capped scores (Gemma 2) or a sink per head (GPT-OSS)."""
    shared, width = query.shape[1] // key.shape[1], query.shape[2]
    key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    scores = query @ key.transpose(2, 3) * scale  # (n, H, width, L)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None and width > 1:
        mask = torch.full((width, key.shape[2]), -torch.inf, dtype=scores.dtype, device=query.device).triu(1)
    if mask is not None:
        scores = scores + mask
    if sinks is not None:
        column = sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, width, 1)
        scores = torch.cat([scores, column.to(scores.dtype)], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32)[..., : key.shape[2]].to(query.dtype)
    return weights @ value
