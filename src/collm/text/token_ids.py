"""Lists of token ids, and the growth of a text when it is tokenised."""

from __future__ import annotations

import json
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

MAX_GROWTH = 10_000
"""Largest factor by which a tokenizer's normaliser may lengthen a text."""


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
    steps = [json.loads(normalizer.__getstate__())] if normalizer is not None else []
    growth = 1
    while steps:
        step = steps.pop()
        steps += step.get("normalizers") or []
        growth *= 1 + len(str(step.get("content", "")))
    return growth
