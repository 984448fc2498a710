"""Control of transformers' terminal output while loading: progress bars and reports about weights."""

from __future__ import annotations

import logging
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn
from transformers.utils import logging as transformers_logging

SMALL_BYTES = 1 << 30
"""Size below which no progress bar is shown."""

_LOADING = threading.RLock()
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@contextmanager
def quiet_if_small(model: str | nn.Module) -> Iterator[None]:
    """Disable transformers' progress bars while a small local model is read or written.

    Also suppresses a deprecation warning that peft causes in transformers. One thread is inside at a time, because
    these settings, and others that transformers changes while it loads, are those of the process.
    """
    with _LOADING:
        shown = transformers_logging.is_progress_bar_enabled()
        if _num_bytes(model) < SMALL_BYTES:
            transformers_logging.disable_progress_bar()
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
                yield
        finally:
            if shown:
                transformers_logging.enable_progress_bar()


class LoadReport(logging.Filter):
    """Keeps transformers' table of mismatched weights off the terminal and extracts the first mismatch.

    Attributes:
        reason: the first tensor that does not match the config, with the reason; None if all match.
    """

    reason: str | None = None

    def __init__(self, level: int) -> None:
        super().__init__()
        self._level = level

    def filter(self, record: logging.LogRecord) -> bool:
        text = _COLOURS.sub("", record.getMessage())
        wrong = [line for line in text.splitlines() if "| MISMATCH" in line or "| CONVERSION" in line]
        if wrong:
            name, _, why = (part.strip() for part in wrong[0].split("|")[:3])
            self.reason = f"{name} does not fit its config.json ({why.partition(' - ')[2] or why})"
        return not wrong and "| MISSING" not in text and record.levelno >= self._level


@contextmanager
def load_report() -> Iterator[LoadReport]:
    """Capture transformers' report about loaded weights, so that mismatches can be raised as errors."""
    logger = logging.getLogger("transformers.modeling_utils")
    before, report = logger.level, LoadReport(logger.getEffectiveLevel())
    logger.addFilter(report)
    if not logger.isEnabledFor(logging.WARNING):  # otherwise there would be no report
        logger.setLevel(logging.WARNING)
    try:
        yield report
    finally:
        logger.setLevel(before)
        logger.removeFilter(report)


def _num_bytes(model: str | nn.Module) -> int:
    if isinstance(model, nn.Module):
        return sum(parameter.nbytes for parameter in model.parameters())
    if Path(model).is_file():
        return Path(model).stat().st_size
    if not Path(model).is_dir():
        return SMALL_BYTES  # on the Hub, where a download may take long
    return sum(file.stat().st_size for file in Path(model).iterdir() if file.is_file())
