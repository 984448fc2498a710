"""Passes of a few fixed shapes, each captured as a CUDA graph on a GPU.

For a few tokens, launching kernels from Python takes longer than running them, while a graph is launched at once. A
graph has fixed addresses and shapes, so the inputs and outputs of a pass lie in a `StaticPass`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from collm.engine.kv_cache import PagedCache
from collm.engine.packed_pass import Mask, Memory, SlotTokens, run_model
from collm.errors import UnsupportedModel
from collm.models.language_model import LanguageModel, to_device

_LOG = logging.getLogger(__name__)

WIDTHS = (1, 2, 4, 8, 16)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
MOST_TOKENS = 256
"""Largest static pass. Larger passes keep a GPU busy without graphs."""


def bucket_of(sizes: Sequence[int]) -> tuple[int, int] | None:
    """The smallest width and batch for rows with `sizes` new tokens; None if no static pass is large enough."""
    width = next((width for width in WIDTHS if width >= max(sizes)), 0)
    batch = next((batch for batch in BATCHES if batch >= len(sizes)), 0)
    return (width, batch) if 0 < width * batch <= MOST_TOKENS else None


class StaticPass:
    """A padded pass of `batch` rows with `width` tokens each. Without a `graph` it runs eagerly.

    Args:
        kinds: attention module -> its mask, as in `mask_kind`, shape (2,). The first pass determines it.

    Attributes:
        token_ids, positions: inputs of the model, (T,).
        places: index of each token among all positions of all pages, (T,); padding is written to page 0.
        queries: positions of the queries for attention, (T,); -1 for padding.
        slots: slot of each row, (batch,).
        last: index of each row's last token, (batch,).
        hidden, logits: hidden states of all tokens, (T, H), and logits after each row, (batch, V).
    """

    num_cached = 0
    hidden: Tensor
    logits: Tensor
    graph: torch.cuda.CUDAGraph | None = None

    def __init__(self, width: int, batch: int, cache: PagedCache, kinds: dict[Any, Tensor]) -> None:
        self._width, self._batch = width, batch
        self._cache = cache
        self._kinds = kinds
        sizes = [width * batch] * 4 + [batch] * 2
        self._inputs = torch.zeros(sum(sizes), dtype=torch.long, device=cache.table.device)
        parts = torch.split(self._inputs, sizes)
        self.token_ids, self.positions, self.places, self.queries, self.slots, self.last = parts
        self.fill([])

    def fill(self, chunks: Sequence[SlotTokens]) -> None:
        """Set all inputs with one copy to the device. There are at most `batch` chunks, each of a row."""
        missing = self._batch - len(chunks)
        positions = [chunk.positions for chunk in chunks]
        inputs = self._padded([chunk.token_ids for chunk in chunks], 0)
        inputs += self._padded(positions, 0)
        inputs += self._padded([self._cache.places(chunk.slot, chunk.positions) for chunk in chunks], 0)
        inputs += self._padded(positions, -1)
        inputs += [chunk.slot for chunk in chunks] + [len(self._cache.table) - 1] * missing
        inputs += [i * self._width + len(row) - 1 for i, row in enumerate(positions)] + [0] * missing
        self._inputs.copy_(to_device(inputs, self._inputs.device))

    def _padded(self, rows: Sequence[Sequence[int]], value: int) -> list[int]:
        rows = [*rows, *[()] * (self._batch - len(rows))]
        return [each for row in rows for each in (*row, *[value] * (self._width - len(row)))]

    def attend(self, module: Any, query: Tensor, memory: Memory, mask: Mask, scale: float, **caps: Any) -> Tensor:
        """Attention of queries (H, T, D) over a layer's keys and values in pages: (T, H, D_v)."""
        from collm.engine.paged_attention import paged_attention  # requires Triton, which PyTorch for GPUs includes

        if module not in self._kinds:
            kind = mask_kind(*mask, query.device)
            self._kinds[module] = torch.tensor(kind, dtype=torch.int32, device=query.device)
        rows = self._cache.table, self.slots, self.queries
        return paged_attention(query.transpose(0, 1), *memory, *rows, self._kinds[module], scale=scale, **caps)

    def outputs(self, chunks: Sequence[SlotTokens]) -> tuple[Tensor, Tensor | None]:
        """Copy the hidden states to keep, (R, H), and logits (R, V) if only the last token of each chunk is kept."""
        if all(chunk.keep == 1 for chunk in chunks):
            return self.hidden[self.last[: len(chunks)]], self.logits[: len(chunks)].clone()
        ends = [i * self._width + len(chunk.positions) for i, chunk in enumerate(chunks)]
        kept = [at for end, chunk in zip(ends, chunks, strict=True) for at in range(end - chunk.keep, end)]
        return self.hidden[to_device(kept, self.hidden.device)], None


class StaticPasses:
    """The static passes of one model, captured on first use or by `prepare`.

    Args:
        model: a model on one device.
        cache: the KV cache that the passes read and write.
    """

    def __init__(self, model: LanguageModel, cache: PagedCache) -> None:
        self._model = model
        self._cache = cache
        self._passes: dict[tuple[int, int], StaticPass] = {}
        self._kinds: dict[Any, Tensor] = {}
        self._captures = model.device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if self._captures else None

    def prepare(self, most_rows: int) -> None:
        """Capture all passes of up to `most_rows` rows, the largest first so that the others reuse its memory."""
        start, free = time.perf_counter(), self._free_bytes()
        rows = next((batch for batch in BATCHES if batch >= most_rows), BATCHES[-1])
        wanted = [(w, b) for w in WIDTHS for b in BATCHES if b <= rows and w * b <= MOST_TOKENS]
        missing = sorted(set(wanted) - set(self._passes), key=lambda shape: -shape[0] * shape[1])
        for width, batch in missing:
            self._pass(width, batch)
        if missing:
            seconds, taken = time.perf_counter() - start, (free - self._free_bytes()) / 1e9
            _LOG.info("%s: %d CUDA graphs in %.1f s, %.2f GB", self._model.name, len(missing), seconds, taken)

    def _free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self._model.device)[0] if self._captures else 0

    def run(self, shape: tuple[int, int], chunks: Sequence[SlotTokens]) -> tuple[Tensor, Tensor | None]:
        """Run one pass of the shape that `bucket_of` returns. Returns what `StaticPass.outputs` does."""
        static = self._pass(*shape)
        static.fill(chunks)
        if static.graph is None:
            self._forward(static)
        else:
            static.graph.replay()
        return static.outputs(chunks)

    def _pass(self, width: int, batch: int) -> StaticPass:
        if (width, batch) not in self._passes:
            static = StaticPass(width, batch, self._cache, self._kinds)
            self._forward(static)
            if self._captures:
                self._capture(static)
            self._passes[width, batch] = static
        return self._passes[width, batch]

    def _forward(self, static: StaticPass) -> None:
        static.hidden = run_model(self._model, self._cache, static)
        static.logits = self._model.logits(static.hidden[static.last])

    def _capture(self, static: StaticPass) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            # Allow other threads to use the device during the capture.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                self._forward(static)
        except RuntimeError as error:  # the model synchronises, or its shapes depend on its values
            raise UnsupportedModel(f"{self._model.name} cannot be captured as a CUDA graph: {error}") from error
        static.graph = graph


def mask_kind(mask_function: Callable[..., Tensor], size: int | None, device: torch.device) -> tuple[int, int]:
    """Classify a mask function by evaluating it. Returns the sliding window and the chunk size, 0 for none."""
    step = size or 16
    at = sorted({0, 1, 2, 1 << 20} | {multiple * step + off for multiple in (1, 2, 3, 10) for off in (-1, 0, 1)})
    near = {query + off - back for query in at for off in (-1, 0, 1) for back in (0, step)}
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


def can_run_static(model: LanguageModel) -> bool:
    """Whether the model lies on a single device that Triton supports."""
    devices = {parameter.device for parameter in model.module.parameters()}
    if len(devices) > 1 or find_spec("triton") is None:
        return False
    import triton

    return model.device.type == "cuda" or bool(triton.knobs.runtime.interpret)
