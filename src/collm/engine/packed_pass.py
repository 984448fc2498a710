"""Forward passes of unmodified transformers models over KV slots.

The new tokens of all sequences form a single row (1, T) with explicit positions, so that only attention distinguishes
sequences. A `PackedPass` has no padding. A `StaticPass` (`static_passes`) is padded to one of a few shapes.

Shapes: T tokens, n slots of a group, width queries per slot of a group, H heads, H_kv key heads, L cached positions, D
and D_v head dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any, NamedTuple

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from collm.engine.kv_cache import KVCache, PagedCache
from collm.errors import UnsupportedModel
from collm.models.language_model import LanguageModel, to_device

ATTENTION_NAME = "collm_slots"
_CACHE_ARGUMENT = "cache" if Version(transformers.__version__).release >= (5, 24) else "past_key_values"
"""The argument by which a model takes its cache; transformers renamed it in 5.24."""
_MAX_GROUP_WIDTH = 16  # longer rows have an attention call of their own
_SMALL_CALL = 4096  # number of scores below which a call's overhead dominates

Memory = tuple[Tensor, Tensor]
"""Keys and values of a layer, as the cache holds them."""
Mask = tuple[Callable[..., Tensor], int | None]
"""A mask function of transformers, which takes indices of batch, head, queries and keys; and its window, if any."""


class SlotTokens(NamedTuple):
    """New tokens of one slot in a pass.

    Attributes:
        positions: their positions, which follow the cached ones.
        keep: number of the last tokens whose output is wanted.
    """

    slot: int
    positions: range
    token_ids: Sequence[int]
    keep: int


@dataclass
class Group:
    """Neighbouring slots that share an attention call, padded to the same number of new tokens.

    Attributes:
        slots: from the first to the last; idle ones between them take part and are ignored.
        tokens: the packed tokens, or with padding the index of one for each slot and query, (n * width,).
        width: largest number of new tokens of a slot.
        kv_length: largest length of a slot after this pass.
        masked: whether a mask is needed, as some query does not see all keys up to its own, or sees others.
        kept: index of each token among the padded queries; None without padding.
    """

    slots: slice
    tokens: slice | Tensor
    width: int
    kv_length: int
    masked: bool
    kept: Tensor | None = None


class PackedPass:
    """Layout of a pass without padding.

    Args:
        chunks: the new tokens of each slot.
        window: the model's smallest attention window, None without one.

    Attributes:
        chunks: ordered by slot, with those that may share an attention call next to each other.
        token_ids, positions: of each packed token, (T,).
        places: the index of each packed token among all positions of all pages, or its slot without pages, (T,).
        kept: the packed tokens whose output is wanted, in the order of the given chunks; None for all.
        num_cached: number of cached tokens of the longest sequence.
        cache: the cache that the pass reads and writes.
    """

    def __init__(self, chunks: Sequence[SlotTokens], cache: KVCache, device: torch.device, window: int | None) -> None:
        self.chunks = sorted(chunks, key=lambda chunk: (len(chunk.positions) > _MAX_GROUP_WIDTH, chunk.slot))
        sizes = [len(chunk.positions) for chunk in self.chunks]
        *starts, size = accumulate(sizes, initial=0)
        start_of = {chunk.slot: start for chunk, start in zip(self.chunks, starts, strict=True)}
        kept = [start_of[slot] + i for slot, new, _, keep in chunks for i in range(len(new) - keep, len(new))]
        if isinstance(cache, PagedCache):
            places = [place for chunk in self.chunks for place in cache.places(chunk.slot, chunk.positions)]
        else:
            places = [chunk.slot for chunk in self.chunks for _ in chunk.positions]
        by_chunk = [*[chunk.token_ids for chunk in self.chunks], *[chunk.positions for chunk in self.chunks]]
        inputs = to_device([*chain.from_iterable(by_chunk), *places, *kept], device)
        self.token_ids, self.positions, self.places, *_ = torch.split(inputs, size)
        self.kept = None if kept == list(range(size)) else inputs[3 * size :]
        longest = max([chunk.positions.stop for chunk in self.chunks])
        self.num_cached = longest - max(sizes)
        self._groups = _groups(self.chunks, start_of, window is not None and longest > window, device)
        self.cache = cache
        self._masks: dict[tuple[Callable[..., Tensor], int, torch.device], Tensor] = {}

    def attend(self, module: Any, query: Tensor, memory: Memory, mask: Mask, scale: float, **caps: Any) -> Tensor:
        """Attention of queries (H, T, D) over a layer's keys and values, group by group: (T, H, D_v)."""
        outputs = []
        for i, group in enumerate(self._groups):
            keys, values = [self.cache.view(each, group.slots, group.kv_length) for each in memory]
            queries = query[:, group.tokens]  # (H, n * width, D)
            queries = queries.reshape(len(query), len(keys), group.width, -1).transpose(0, 1)  # (n, H, width, D)
            bias = self._bias(i, mask[0], query) if group.masked else None
            if caps["softcap"] is None and caps["sinks"] is None:
                attended = _fused_attention(queries, keys, values, bias, scale)
            else:
                attended = _plain_attention(queries, keys, values, bias, scale, **caps)
            attended = attended.transpose(1, 2).flatten(0, 1)  # (n * width, H, D_v)
            outputs.append(attended if group.kept is None else attended[group.kept])
        return torch.cat(outputs)

    def _bias(self, i: int, mask_function: Callable[..., Tensor], query: Tensor) -> Tensor:
        """Mask of a group, (n, 1, width, L): 0 where visible, else -inf. Layers of one kind share a mask function."""
        key = mask_function, i, query.device
        if key not in self._masks:
            group = self._groups[i]
            positions = self.positions[group.tokens].to(query.device)
            zero = positions.new_zeros(1, 1, 1, 1)  # the packed row is a batch of one
            keys = torch.arange(group.kv_length, device=query.device)
            visible = mask_function(zero, zero, positions[None, None, :, None], keys[None, None, None])
            visible = visible.expand(1, 1, len(positions), len(keys)).reshape(-1, 1, group.width, len(keys))
            self._masks[key] = torch.zeros_like(visible, dtype=query.dtype).masked_fill_(~visible, -torch.inf)
        return self._masks[key]


def _groups(
    chunks: Sequence[SlotTokens], start_of: Mapping[int, int], windowed: bool, device: torch.device
) -> list[Group]:
    """Form groups of neighbouring chunks. Each slot's first packed token is at `start_of[slot]`."""
    members: list[list[SlotTokens]] = []
    for chunk in chunks:
        if members and _may_share([*members[-1], chunk]):
            members[-1].append(chunk)
        else:
            members.append([chunk])
    groups = []
    for rows in members:
        first, size = start_of[rows[0].slot], sum([len(row.positions) for row in rows])
        width, ends = max([len(row.positions) for row in rows]), {row.positions.stop for row in rows}
        slots = slice(rows[0].slot, rows[-1].slot + 1)
        ragged = len(ends) > 1 or (width > 1 and (len(rows) > 1 or rows[0].positions.start > 0))
        group = Group(slots, slice(first, first + size), width, max(ends), windowed or ragged)
        if size < (slots.stop - slots.start) * width:
            group.tokens, group.kept = _padding(rows, first, width, device)
        groups.append(group)
    return groups


def _may_share(rows: Sequence[SlotTokens]) -> bool:
    """Whether at most half of a shared attention call would be padding."""
    width, longest = max([len(row.positions) for row in rows]), max([row.positions.stop for row in rows])
    scores = (rows[-1].slot - rows[0].slot + 1) * width * longest
    needed = sum([len(row.positions) * row.positions.stop for row in rows])
    return width <= _MAX_GROUP_WIDTH and scores <= max(_SMALL_CALL, 2 * needed)


def _padding(rows: Sequence[SlotTokens], at: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices `Group.tokens` and `Group.kept`. Padding repeats a real token of the group."""
    first, last = rows[0].slot, rows[-1].slot
    padded = [at] * ((last - first + 1) * width)
    kept: list[int] = []
    for row in rows:
        place, size = (row.slot - first) * width, len(row.positions)
        padded[place : place + width] = [at + min(i, size - 1) for i in range(width)]
        kept += range(place, place + size)
        at += size
    tokens, queries = torch.split(to_device([*padded, *kept], device), [len(padded), len(kept)])
    return tokens, queries


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
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


def _plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Like `_fused_attention`, with capped scores (Gemma 2) or a sink per head (GPT-OSS)."""
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


def run_model(model: LanguageModel, cache: KVCache, layout: Any) -> Tensor:
    """Run a `PackedPass` or `StaticPass`. Returns last hidden states (T, H). The model's own attention is restored."""
    cache.layout = layout
    before = model.config._attn_implementation
    model.config._attn_implementation = ATTENTION_NAME
    try:
        return model.hidden_states(
            layout.token_ids.unsqueeze(0),
            position_ids=layout.positions.unsqueeze(0),
            use_cache=True,
            slot_pass=layout,
            **{_CACHE_ARGUMENT: cache},
        )[0]
    finally:
        model.config._attn_implementation = before


def _slot_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask,
    scaling: float | None = None,
    slot_pass: Any = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of a packed row (1, H, T, D) over the slots of its tokens: (1, T, H, D_v)."""
    if slot_pass is None or options.get("position_bias") is not None:
        missing = "no slot layout" if slot_pass is None else "a position bias"
        raise UnsupportedModel(f"{type(module).__name__} calls attention with {missing}; collm cannot run it exactly")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    caps = {"softcap": options.get("softcap"), "sinks": options.get("s_aux")}
    return slot_pass.attend(module, query[0], (key, value), attention_mask, scale, **caps).unsqueeze(0), None


def _deferred_mask(mask_function: Callable[..., Tensor], local_size: int | None = None, **options: Any) -> Mask:
    """Give attention the model's mask function instead of a mask, as only the pass knows which queries need one."""
    return mask_function, local_size


def register_attention() -> None:
    """Make the attention over slots known to transformers."""
    AttentionInterface.register(ATTENTION_NAME, _slot_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, _deferred_mask)
