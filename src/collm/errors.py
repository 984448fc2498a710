"""Every error that collm raises on purpose.

    CollmError
    |-- ConfigError        an option is unknown, out of range or without effect
    |-- DataError          a data file, row or template cannot be used
    |-- LoadError         a model or a tokenizer cannot be loaded
    |-- WriteError        the disk refused a write; what was there is untouched
    |-- ArtefactError      a collaboration on disk is missing, half-written or inconsistent
    |-- MismatchError      the models do not fit each other (vocabulary, special tokens, EOS, head shape)
    |-- UnsupportedModel   a model's cache cannot be driven exactly
    |-- RequestError       a prompt or a sampling parameter of one request is not usable
    |-- ModelFailure       a model raised, or returned something that is no distribution (NaN)
    |-- PolicyFailure      a policy raised
    |-- ToolFailure        a program that is an assistant raised, hung or returned no text
    `-- MissingExtra       an optional dependency is not installed

Each message says what came, what was expected and what to do about it.
"""

from __future__ import annotations

DAMAGED = (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError)
"""What reading a file that holds something else raises; a RecursionError where it is nested too deeply."""


class CollmError(Exception):
    """Root of all errors raised on purpose."""


class ConfigError(CollmError):
    """An option is unknown, out of range or would have no effect."""


class DataError(CollmError):
    """A data file, a row or a prompt template cannot be used."""


class LoadError(CollmError):
    """A model or a tokenizer cannot be loaded."""


class WriteError(CollmError):
    """The disk refused a write; what was there before is untouched."""


class ArtefactError(CollmError):
    """A collaboration on disk is missing, half-written, corrupt or inconsistent."""


class MismatchError(CollmError):
    """Models, tokenizers or heads that do not fit each other."""


class UnsupportedModel(CollmError):  # noqa: N818 - reads as the field says it
    """A model whose cache collm cannot drive exactly."""


class RequestError(CollmError):
    """A prompt or a sampling parameter of one request is not usable."""


class ModelFailure(CollmError):  # noqa: N818
    """A model raised, or returned something that is no distribution."""


class PolicyFailure(CollmError):  # noqa: N818
    """A policy raised while it decided one sequence's next token."""


class ToolFailure(CollmError):  # noqa: N818
    """A program that is an assistant raised, hung, or returned something that is no text."""


class MissingExtra(CollmError):  # noqa: N818
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; install it with: pip install 'collm[{extra}]'")
