"""The exceptions that collm raises. Each message says what was received, what was expected and what to do about it."""

from __future__ import annotations

DAMAGED = (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError)
"""Exceptions that reading a damaged file may raise; a RecursionError if its content is nested too deeply."""


class CollmError(Exception):
    """Base class of all exceptions that collm raises."""


class ConfigError(CollmError):
    """An option is unknown, out of range or would have no effect."""


class DataError(CollmError):
    """A data file, a row or a prompt template cannot be used."""


class LoadError(CollmError):
    """A model or a tokenizer cannot be loaded."""


class WriteError(CollmError):
    """A file could not be written. Its previous content is intact."""


class ArtefactError(CollmError):
    """A collaboration on disk is missing, half-written, corrupt or inconsistent."""


class MismatchError(CollmError):
    """Models, tokenizers or a head do not match."""


class UnsupportedModel(CollmError):  # noqa: N818
    """collm cannot manage a model's KV cache exactly."""


class RequestError(CollmError):
    """A prompt or a sampling parameter of a request is invalid."""


class CacheFull(CollmError):  # noqa: N818
    """Running requests use the KV cache that a request needs. It may succeed later."""


class ModelFailure(CollmError):  # noqa: N818
    """A model raised an exception or returned NaN."""


class PolicyFailure(CollmError):  # noqa: N818
    """A policy raised an exception while choosing an author."""


class ToolFailure(CollmError):  # noqa: N818
    """A tool raised an exception, hung or returned something other than text."""


class MissingExtra(CollmError):  # noqa: N818
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; install it with: pip install 'collm[{extra}]'")
