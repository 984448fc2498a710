"""What libraries say of themselves when they are imported, and no reader can act on, is not shown."""

from __future__ import annotations

import logging

_HIDDEN = {
    "DeepSpeed": "Setting accelerator to",  # on stdout, where a command's result belongs
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",  # an optional kernel from the Hub
}


def _is_shown(record: logging.LogRecord) -> bool:
    return _HIDDEN[record.name] not in record.getMessage()


def hush_libraries() -> None:
    """Filter these messages, in whatever order the libraries are imported."""
    for name in _HIDDEN:
        logging.getLogger(name).addFilter(_is_shown)
