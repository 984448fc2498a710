"""The forecast of a run: score some of its rows with every author, and time their passes."""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, cast

from collm.collaboration import CoLLM
from collm.core.head import DeferralHead
from collm.engine.speculation import PassTimes
from collm.evaluation.forecast import Forecast, forecast
from collm.models.tools import ToolRunner
from collm.run.data import Prepared, encode_for, score_run
from collm.run.options import RunConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from collm.engine.llama_runner import LlamaRunner
    from collm.engine.runner import ModelRunner

WIDTHS = (1, 2, 4, 8, 20)  # numbers of tokens in the passes that are timed
REPEATS = 5


def forecast_run(config: RunConfig, *, rows: int, max_length: int, clip: float) -> Forecast:
    """What a collaboration of these models would do, from at most `rows` rows of its data, drawn at random.

    The scores are kept in `config.scores` if that is given. Speeds are those of one sequence on this machine. They are
    not measured if tokenizers differ. Raises a CollmError as `train_collaboration` does.
    """
    given, accept = config.load(config.data, config.data_split), config.accept_differences
    drawn = sorted(random.Random(0).sample(range(len(given)), min(rows, len(given))))
    some = [given[index] for index in drawn]
    prepared = encode_for(config.base_model, config.assistants, [some], config, max_length, accept)
    with tempfile.TemporaryDirectory() as directory:
        ((base, *assistants),) = score_run(config, prepared, Path(directory), [*config.authors])
        if prepared.alignment is not None:
            return forecast(base, assistants, clip=clip, unit="segments")
        assert base.hidden is not None
        head = DeferralHead(base.hidden[0].shape[-1], len(assistants))
        return forecast(base, assistants, clip=clip, times=pass_times(config, prepared, head))


def pass_times(config: RunConfig, prepared: Prepared, head: DeferralHead) -> list[PassTimes | None]:
    """The pass times of each author after half of the longest example, as decoding runs it; None for a tool."""
    parts = config.base_model, config.assistants, head, prepared.tokenizer
    model = CoLLM(*parts, template=prepared.template, accept_differences=config.accept_differences)
    model.engine(max_batch=1).close()  # prepares the runners
    token_ids = max((example.token_ids for example in prepared.sets[0]), key=len)
    read, found = len(token_ids) // 2, list[PassTimes | None]()
    for runner in cast("Sequence[ModelRunner | LlamaRunner | ToolRunner]", model.runners):
        times, slot = PassTimes(), runner.open([])
        runner.extend({slot: token_ids[:read]})
        for width in (width for width in WIDTHS if width <= len(token_ids) - read):
            seconds = []
            for _ in range(REPEATS):
                start = time.perf_counter()
                runner.extend({slot: token_ids[read : read + width]}).logits.argmax(-1).tolist()
                seconds.append(time.perf_counter() - start)
                runner.rollback(slot, read)
            times.record(width, median(seconds))
        runner.close(slot)
        found.append(None if isinstance(runner, ToolRunner) else times)
    return found
