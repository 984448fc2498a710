"""Progress bars of transformers are for models that take time."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn
from transformers.utils import logging as transformers_logging

SMALL_BYTES = 1 << 30
"""Models below this are read and written in an instant: no progress bar."""


@contextmanager
def quiet_if_small(model: str | nn.Module) -> Iterator[None]:
    """No progress bars of transformers while a small model is read from a directory, or written.

    peft's question for an old name, of which transformers warns, is not passed on either.
    """
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


def _num_bytes(model: str | nn.Module) -> int:
    if isinstance(model, nn.Module):
        return sum(parameter.nbytes for parameter in model.parameters())
    if not Path(model).is_dir():
        return SMALL_BYTES  # on the Hub: a download may take its time
    return sum(file.stat().st_size for file in Path(model).iterdir() if file.is_file())
