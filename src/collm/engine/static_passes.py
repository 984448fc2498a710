"""Passes of a few fixed shapes, each captured as a CUDA graph on a GPU.

For a few tokens, launching kernels from Python takes longer than running them, while a graph is launched at once. A
graph has fixed addresses and shapes, so the inputs of a pass lie in a `StaticPass`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from collm.engine.kv_cache import PagedCache
from collm.engine.slot_attention import MaskKinds, slot_attention_of
from collm.engine.slots import Row, StaticPass
from collm.errors import UnsupportedModel
from collm.models.language_model import LanguageModel

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


@dataclass
class _Bucket:
    """The static pass of one shape. Without a `graph` it runs eagerly."""

    layout: StaticPass
    hidden: Tensor
    logits: Tensor
    graph: torch.cuda.CUDAGraph | None = None


class StaticPasses:
    """The static passes of one model, captured on first use or by `prepare`.

    Args:
        model: a model on one device.
        cache: the KV cache that the passes read and write.
    """

    def __init__(self, model: LanguageModel, cache: PagedCache) -> None:
        self._model = model
        self._cache = cache
        self._buckets: dict[tuple[int, int], _Bucket] = {}
        self._kinds = MaskKinds()
        self._captures = model.device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if self._captures else None

    def prepare(self, most_rows: int) -> None:
        """Capture all passes of up to `most_rows` rows, the largest first so that the others reuse its memory.

        Raises:
            UnsupportedModel: the model cannot be captured.
        """
        start, free = time.perf_counter(), self._free_bytes()
        rows = next((batch for batch in BATCHES if batch >= most_rows), BATCHES[-1])
        wanted = [(w, b) for w in WIDTHS for b in BATCHES if b <= rows and w * b <= MOST_TOKENS]
        missing = sorted(set(wanted) - set(self._buckets), key=lambda shape: -shape[0] * shape[1])
        for width, batch in missing:
            self._bucket(width, batch)
        if missing:
            seconds, taken = time.perf_counter() - start, (free - self._free_bytes()) / 1e9
            _LOG.info("%s: %d CUDA graphs in %.1f s, %.2f GB", self._model.name, len(missing), seconds, taken)

    def _free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self._model.device)[0] if self._captures else 0

    def run(
        self, rows: Sequence[Row], token_ids: Sequence[Sequence[int]], following: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run one pass over rows for which `bucket_of` returns a shape.

        Args:
            token_ids: the tokens of each row.
            following: tokens on the device that replace `token_ids`, one per row, shape (R,).

        Returns:
            Last hidden states of each row, shape (R, width, H), and logits after its last token, shape (R, V).
        """
        shape = bucket_of([row.size for row in rows])
        assert shape is not None
        bucket = self._bucket(*shape)
        layout = bucket.layout
        self._cache.layout = layout
        layout.fill(rows, token_ids, [self._cache.places(row) for row in rows])
        if following is not None:
            layout.token_ids[0, : len(rows)] = following
        if bucket.graph is None:
            bucket.hidden, bucket.logits = self._forward(layout)
        else:
            bucket.graph.replay()
        hidden = bucket.hidden.view(layout.batch, layout.width, -1)[: len(rows)].clone()
        return hidden, bucket.logits[: len(rows)].clone()

    def _bucket(self, width: int, batch: int) -> _Bucket:
        if (width, batch) not in self._buckets:
            layout = self._cache.layout = StaticPass(width, batch, table=self._cache.table)
            layout.fill([], [], [])
            bucket = _Bucket(layout, *self._forward(layout))
            if self._captures:
                self._capture(bucket)
            self._buckets[width, batch] = bucket
        return self._buckets[width, batch]

    def _forward(self, layout: StaticPass) -> tuple[Tensor, Tensor]:
        """Run the model. Returns hidden states of all tokens (T, H) and logits after each row (batch, V)."""
        with slot_attention_of(self._model.config, self._kinds):
            hidden = self._model.hidden_states(
                layout.token_ids,
                position_ids=layout.positions.unsqueeze(0),
                use_cache=True,
                slot_pass=layout,
                **self._cache.as_argument,
            )[0]
        return hidden, self._model.logits(hidden[layout.last])

    def _capture(self, bucket: _Bucket) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            # Allow other threads to use the device during the capture.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                bucket.hidden, bucket.logits = self._forward(bucket.layout)
        except RuntimeError as error:  # the model synchronises, or its shapes depend on its values
            raise UnsupportedModel(f"{self._model.name} cannot be captured as a CUDA graph: {error}") from error
        bucket.graph = graph


def can_run_static(model: LanguageModel) -> bool:
    """Whether the model lies on a single device that Triton supports."""
    devices = {parameter.device for parameter in model.module.parameters()}
    if len(devices) > 1:
        return False
    try:
        import triton
    except ImportError:
        return False
    return model.device.type == "cuda" or bool(triton.knobs.runtime.interpret)
