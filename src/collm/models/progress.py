"""Control of transformers' terminal output while loading: progress bars and reports about weights."""

from __future__ import annotations

import logging
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
_REPORTS = logging.getLogger("transformers.modeling_utils")


@contextmanager
def quiet_if_small(model: str | nn.Module) -> Iterator[None]:
    """Disable transformers' progress bars while a small local model is read or written.

    Also suppresses a deprecation warning that peft causes in transformers, and tables of weights that do not fit, which
    `load_model` raises as an error. One thread is inside at a time, because these settings, and others that
    transformers changes while it loads, are those of the process.
    """
    with _LOADING, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        shown = transformers_logging.is_progress_bar_enabled()
        if _num_bytes(model) < SMALL_BYTES:
            transformers_logging.disable_progress_bar()
        _REPORTS.addFilter(_is_no_error)
        try:
            yield
        finally:
            _REPORTS.removeFilter(_is_no_error)
            if shown:
                transformers_logging.enable_progress_bar()


def _is_no_error(record: logging.LogRecord) -> bool:
    return not any(word in record.getMessage() for word in ("MISSING:", "MISMATCH:"))


def _num_bytes(model: str | nn.Module) -> int:
    if isinstance(model, nn.Module):
        return sum(parameter.nbytes for parameter in model.parameters())
    path = Path(model)
    if not path.exists():
        return SMALL_BYTES  # on the Hub, where a download may take long
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()))
