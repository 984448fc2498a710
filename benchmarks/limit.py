"""The time of a collaboration if only the models' own forward passes took time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
from transformers import DynamicCache, PreTrainedModel

SUFFIXES = (1, 2, 4, 8, 16, 32)


def seconds(run: Callable[[], object], repeats: int = 1) -> float:
    """Least time of a call, in seconds. The device is synchronised before and after each call."""
    times = []
    for _ in range(repeats):
        _synchronize()
        start = time.perf_counter()
        run()
        _synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@torch.inference_mode()
def pass_seconds(model: PreTrainedModel, batch: int, length: int, suffixes: Sequence[int]) -> dict[int, float]:
    """Median time of a forward pass over each number of new tokens per row, after `length` cached ones.

    Uses transformers' own cache.

    Returns:
        Number of new tokens -> seconds.
    """
    cache, device = DynamicCache(), model.device
    if length:
        prefix = torch.full((batch, length), 5, device=device)
        model(prefix, past_key_values=cache, use_cache=True, logits_to_keep=1)
    taken = {}
    for suffix in suffixes:
        ids, times = torch.full((batch, suffix), 7, device=device), []
        for _ in range(6 if length else 1):
            times.append(seconds(lambda: model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)))  # noqa: B023
            cache.crop(-suffix)
        taken[suffix] = statistics.median(times)
    return taken


class PassTable:
    """Time t(rows, suffix, length) of one model's forward pass, interpolated between measured points.

    Args:
        model: the model.
        batch: largest number of rows. Powers of 4 up to it are measured.
        prompt, new: lengths are between `prompt` and `prompt + new`.
    """

    def __init__(self, model: PreTrainedModel, batch: int, prompt: int, new: int) -> None:
        self.prompt, self.new = prompt, new
        rows = sorted({min(4**i, batch) for i in range(batch.bit_length())})
        ends = (prompt, prompt + new)
        self.prefills = {n: pass_seconds(model, n, 0, [prompt])[prompt] for n in rows}
        self.table = {n: [pass_seconds(model, n, end, SUFFIXES) for end in ends] for n in rows}

    def at(self, rows: float, suffix: float, length: float) -> float:
        """Seconds of one pass over `suffix` tokens after `length` cached ones in each row."""
        share = (length - self.prompt) / self.new

        def of_rows(n: int) -> float:
            early, late = self.table[n]
            return _between({m: early[m] + (late[m] - early[m]) * share for m in SUFFIXES}, suffix)

        return _between({n: of_rows(n) for n in self.table}, rows)

    def prefill(self, rows: float) -> float:
        """Seconds to read the prompts of this many rows."""
        return _between(self.prefills, rows)


def _between(points: Mapping[int, float], x: float) -> float:
    """Interpolate linearly between points. Beyond the last point, use the line from the origin through it."""
    listed = sorted(points.items())
    for (x0, y0), (x1, y1) in pairwise(listed):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    last, y = listed[-1]
    return y * max(1.0, x / last)


def limit_seconds(authors: list[list[int]], base: PassTable, assistant: PassTable) -> float:
    """Seconds of decoding in lockstep: N t_base + the sum over steps of t_assistant(deferring rows, unread tokens)."""
    prompt, batch = base.prompt, len(authors)
    total = base.prefill(batch) + sum(base.at(batch, 1, prompt + i) for i in range(1, len(authors[0])))
    seen = dict.fromkeys(range(batch), 0)
    for i, written in enumerate(zip(*authors, strict=True)):
        deferring = [row for row, author in enumerate(written) if author]
        new = [row for row in deferring if not seen[row]]
        total += assistant.prefill(len(new)) if new else 0.0
        unread = [prompt + i - (seen[row] or prompt) for row in deferring]
        if sum(unread):
            total += assistant.at(len(deferring), sum(unread) / len(deferring), prompt + i)
        seen.update(dict.fromkeys(deferring, prompt + i))
    return total
