"""Read a given text in chunks between the steps of other requests, which need the KV cache too."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import TypeVar

import torch

from collm.engine.llama_runner import LlamaRunner
from collm.engine.request import check_cache
from collm.engine.runner import ModelRunner
from collm.models.assistant import ModelOutput
from collm.models.tools import ToolRunner

T = TypeVar("T")
Chunks = Generator[list[T], None, None]
"""One item for each token of a text, chunk by chunk."""
Runner = ModelRunner | LlamaRunner | ToolRunner
Runners = Sequence[Runner]

MAX_POSITIONS = 256  # of a chunk
_MAX_LOGITS = 1 << 25  # of a chunk, 128 MiB in fp32


def chunks(start: int, end: int, vocab_size: int) -> Iterator[tuple[int, int]]:
    """Split the positions from `start` to before `end`. The logits of a chunk are bounded."""
    size = min(MAX_POSITIONS, max(_MAX_LOGITS // vocab_size, 1))
    for first in range(start, end, size):
        yield first, min(first + size, end)


@torch.inference_mode()
def read_chunk(runner: Runner, text: Sequence[int], start: int, end: int) -> ModelOutput:
    """Read what precedes each of the tokens [start, end) of a text, shape (end - start, V). `start` is at least 1.

    No slot is open afterwards. The runner remembers what it has read until running requests need the space.
    """
    text = text[: end - 1]
    check_cache([runner], text)
    slot = runner.open(text)
    try:
        runner.rollback(slot, min(runner.length(slot), start - 1))
        return runner.extend({slot: text[runner.length(slot) :]}, keep={slot: end - start})
    finally:
        runner.close(slot)
