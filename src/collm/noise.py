"""What libraries say of themselves when they are imported, and no reader can act on, is not shown."""

from __future__ import annotations

import logging

_HUSHED = {
    "DeepSpeed": "Setting accelerator to",  # on stdout, where a command's result belongs
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",  # an optional kernel from the Hub
}


class _Hush(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return _HUSHED[record.name] not in record.getMessage()


def hush_libraries() -> None:
    """Filter these messages, in whatever order the libraries are imported."""
    for name in _HUSHED:
        logger = logging.getLogger(name)
        if not any(isinstance(one, _Hush) for one in logger.filters):
            logger.addFilter(_Hush())
