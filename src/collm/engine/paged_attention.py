"""Triton kernels for attention of a few new tokens per sequence over a paged KV cache.

Lengths are read on the device, so one CUDA graph serves texts of any length, and the cost does not depend on the
cache's capacity. Programs attend to splits of a sequence's keys in parallel, and a second kernel combines them
(Flash-Decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html).

Shapes: B rows (sequences), W queries per row, T = B * W, H heads, H_kv key heads, D and D_v head dimensions, N pages of
`page` positions.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_N = 32
"""Number of keys that a program loads at once."""
MOST_SPLITS = 32


@triton.jit
def _attend_split(
    query, key, value, table, slots, positions, mask_kind,
    partial, highest, total,
    scale, softcap,
    query_token, query_head, key_position, key_head, value_position, value_head, table_slot,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, TILES: tl.constexpr, SPLITS: tl.constexpr, PAGE: tl.constexpr,
    HEADS: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Attend from one tile of queries that share a key head to one split of the keys."""
    row = tl.program_id(0) // TILES
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    member = tl.program_id(0) % TILES * BLOCK_M + tl.arange(0, BLOCK_M)  # queries of the row, token by token
    token = row * WIDTH + member // GROUP
    head = kv_head * GROUP + member % GROUP
    real = member < WIDTH * GROUP
    position = tl.load(positions + token, mask=real, other=-1)  # -1: padding, which attends to nothing
    window, chunk = tl.load(mask_kind), tl.load(mask_kind + 1)
    first = tl.min(tl.where(position < 0, 2147483647, position))
    start = tl.where(window > 0, tl.maximum(first - window + 1, 0), 0)
    begin = tl.where(chunk > 0, first // tl.maximum(chunk, 1) * chunk, start) // BLOCK_N
    end = tl.max(position) + 1
    share = tl.cdiv(tl.cdiv(end, BLOCK_N) - begin, SPLITS)
    dims, dims_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    queries = tl.load(
        query + token[:, None] * query_token + head[:, None] * query_head + dims[None, :],
        mask=real[:, None] & (dims[None, :] < DIM), other=0.0,
    )  # fmt: skip
    pages = table + tl.load(slots + row) * table_slot
    best = tl.full([BLOCK_M], -float("inf"), tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    attended = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for block in range(begin + split * share, tl.minimum(begin + (split + 1) * share, tl.cdiv(end, BLOCK_N))):
        places = block * BLOCK_N + tl.arange(0, BLOCK_N)
        at = tl.load(pages + places // PAGE, mask=places < end, other=0).to(tl.int64) * PAGE + places % PAGE
        best, weight, attended = _attend_block(
            queries, position, places, key + at * key_position + kv_head * key_head,
            value + at * value_position + kv_head * value_head, best, weight, attended, end, window, chunk,
            scale, softcap, DIM, DIM_V, BLOCK_D, BLOCK_V, SOFTCAP,
        )  # fmt: skip
    place = (token * HEADS + head) * SPLITS + split
    tl.store(highest + place, best, mask=real)
    tl.store(total + place, weight, mask=real)
    tl.store(
        partial + place[:, None] * DIM_V + dims_v[None, :], attended, mask=real[:, None] & (dims_v[None, :] < DIM_V)
    )


@triton.jit
def _attend_block(
    queries, position, places, key, value, best, weight, attended, end, window, chunk, scale, softcap,
    DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Attend to one block of keys, and return the highest scores, the weights and the weighted values so far."""
    dims, dims_v, held = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V), places < end
    keys = tl.load(key[None, :] + dims[:, None], mask=held[None, :] & (dims[:, None] < DIM), other=0.0)
    scores = tl.dot(queries, keys, input_precision="ieee") * scale
    if SOFTCAP:
        scores = softcap * (1 - 2 / (tl.exp(2 * (scores / softcap)) + 1))  # tanh
    seen = (places[None, :] <= position[:, None]) & held[None, :]
    seen = seen & ((window <= 0) | (places[None, :] > position[:, None] - window))
    seen = seen & ((chunk <= 0) | (places[None, :] >= position[:, None] // tl.maximum(chunk, 1) * chunk))
    scores = tl.where(seen, scores, -float("inf"))
    higher = tl.maximum(best, tl.max(scores, 1))
    safe = tl.where(higher == -float("inf"), 0.0, higher)  # no visible key so far
    weights = tl.exp(scores - safe[:, None])
    kept = tl.exp(best - safe)
    values = tl.load(value[:, None] + dims_v[None, :], mask=held[:, None] & (dims_v[None, :] < DIM_V), other=0.0)
    attended = attended * kept[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
    return higher, weight * kept + tl.sum(weights, 1), attended


@triton.jit
def _join_splits(
    partial, highest, total, sinks, output,
    SPLITS: tl.constexpr, BLOCK_S: tl.constexpr, HEADS: tl.constexpr, DIM_V: tl.constexpr, BLOCK_V: tl.constexpr,
    SINKS: tl.constexpr,
):  # fmt: skip
    """Combine the splits of one head of one token."""
    place = tl.program_id(0)
    splits = tl.arange(0, BLOCK_S)
    dims = tl.arange(0, BLOCK_V)
    present = splits < SPLITS
    best = tl.load(highest + place * SPLITS + splits, mask=present, other=-float("inf"))
    weight = tl.load(total + place * SPLITS + splits, mask=present, other=0.0)
    top = tl.max(best)
    if SINKS:
        sink = tl.load(sinks + place % HEADS).to(tl.float32)
        top = tl.maximum(top, sink)
    top = tl.where(top == -float("inf"), 0.0, top)
    factor = tl.exp(best - top)
    whole = tl.sum(weight * factor)
    if SINKS:
        whole += tl.exp(sink - top)
    parts = tl.load(
        partial + (place * SPLITS + splits[:, None]) * DIM_V + dims[None, :],
        mask=present[:, None] & (dims[None, :] < DIM_V), other=0.0,
    )  # fmt: skip
    attended = tl.sum(parts * factor[:, None], 0) / tl.where(whole == 0, 1.0, whole)
    tl.store(output + place * DIM_V + dims, attended.to(output.dtype.element_ty), mask=dims < DIM_V)


def paged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    slots: Tensor,
    positions: Tensor,
    mask_kind: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend from W consecutive queries of each row to the cached keys of its slot: (T, H, D_v).

    Args:
        query: shape (T, H, D), row by row, with stride 1 in the last dimension.
        key, value: shape (N, page, H_kv, D) and (N, page, H_kv, D_v).
        table, slots: the pages of each slot, in order, shape (S, P), int32; and the slot of each row, shape (B,).
        positions: position of each query, shape (T,); -1 for padding, whose output is 0.
        mask_kind: sliding window and chunk size, 0 for none, shape (2,), int32.
        softcap: scores x become softcap * tanh(x / softcap).
        sinks: a logit per head that takes part in the softmax without a value, shape (H,).
    """
    tokens, heads, dim = query.shape
    rows, (_, page, kv_heads, dim_v) = len(slots), value.shape
    width, group = tokens // rows, heads // kv_heads
    block_m = min(64, max(16, triton.next_power_of_2(width * group)))
    tiles = triton.cdiv(width * group, block_m)
    processors = torch.cuda.get_device_properties(query.device).multi_processor_count if query.is_cuda else 4
    # The programs should fill the device about twice.
    splits = min(MOST_SPLITS, triton.next_power_of_2(triton.cdiv(2 * processors, rows * tiles * kv_heads)))
    partial = query.new_empty(tokens, heads, splits, dim_v, dtype=torch.float32)
    highest, total = (query.new_empty(tokens, heads, splits, dtype=torch.float32) for _ in range(2))
    output = query.new_empty(tokens, heads, dim_v)
    blocks: dict[str, Any] = {"HEADS": heads, "DIM_V": dim_v, "BLOCK_V": max(16, triton.next_power_of_2(dim_v))}
    _attend_split[(rows * tiles, kv_heads, splits)](
        query, key, value, table, slots, positions, mask_kind, partial, highest, total, scale, softcap or 0.0,
        query.stride(0), query.stride(1), key.stride(1), key.stride(2), value.stride(1), value.stride(2),
        table.stride(0), WIDTH=width, GROUP=group, TILES=tiles, SPLITS=splits, PAGE=page, DIM=dim,
        BLOCK_D=max(16, triton.next_power_of_2(dim)), BLOCK_M=block_m, BLOCK_N=BLOCK_N, SOFTCAP=softcap is not None,
        **blocks,
    )  # fmt: skip
    _join_splits[(tokens * heads,)](
        partial, highest, total, output if sinks is None else sinks, output, SPLITS=splits,
        BLOCK_S=triton.next_power_of_2(splits), SINKS=sinks is not None, **blocks,
    )  # fmt: skip
    return output
