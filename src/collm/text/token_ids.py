"""Tokenisation with untrusted tokenizers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from collm.errors import RequestError
from collm.text.chats import check_unicode

MAX_CHARACTERS = 10_000_000
"""Largest number of characters that are tokenised. Longer texts take gigabytes and exceed any context."""

MAX_GROWTH = 10_000
"""Largest factor by which a tokenizer's normaliser may lengthen a text."""


def token_ids_of(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> list[int]:
    """Tokenise a text. `special` adds the tokenizer's special tokens around it.

    Raises:
        RequestError: the text is not valid Unicode or is too long, or the tokenizer fails.
    """
    try:
        check_unicode(text)
    except RequestError as error:
        raise RequestError(f"the text cannot be read{error}") from error
    if len(text) > MAX_CHARACTERS:
        raise RequestError(f"the text has {len(text)} characters, expected at most {MAX_CHARACTERS}; shorten it")
    try:
        # verbose=False: lengths are checked against the models, not against the tokenizer's limit
        return cast("list[int]", tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # a Rust panic, which is not an Exception
            raise
        raise RequestError(f"the tokenizer fails on the text {text!r:.60}: {error!s:.200}") from error


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the common prefix of two sequences of one type."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def normalizer_growth(tokenizer: PreTrainedTokenizerBase) -> int:
    """Upper bound of the factor by which the tokenizer's normaliser lengthens a text."""
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    growth = 1
    for step in _steps(json.loads(normalizer.__getstate__()) if normalizer is not None else {}):
        growth *= 1 + len(str(step.get("content", "")))
    return growth


def _steps(normalizer: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for inner in normalizer.get("normalizers") or []:
        yield from _steps(inner)
    yield normalizer
