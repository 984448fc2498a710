"""What prefixes of a token list spell, while it grows and is cut."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collm.text.token_text import TokenText
from tests.tokenizers import cut_anywhere, merging_tokenizer

TOKENIZER = merging_tokenizer("the sum of 48 and 2 is 50, 日本 é ")


@settings(deadline=None, max_examples=50)
@given(st.text("ab 48日é🦊\n", max_size=80), st.integers(0, 1000), st.lists(st.integers(0, 80), max_size=4))
def test_every_prefix_spells_what_its_tokens_do_up_to_a_whole_character(text: str, seed: int, cuts: list[int]) -> None:
    token_ids = cut_anywhere(TOKENIZER, text, random.Random(seed))
    read = TokenText(TOKENIZER, token_ids)
    for length in [*cuts, len(token_ids)]:  # forgetting and reading again changes nothing
        read.cut(min(length, len(token_ids)))
        for token_id in token_ids[len(read) :]:
            read.push(token_id)
    assert read.text == text
    assert read.token_ids == token_ids
    spelled = [TOKENIZER.decode(token_ids[:n], clean_up_tokenization_spaces=False) for n in range(len(token_ids) + 1)]
    last = ""
    for n, prefix in enumerate(spelled):
        assert read.whole(n) == (not prefix.endswith("\N{REPLACEMENT CHARACTER}"))
        last = prefix if read.whole(n) else last
        assert text[: read.end(n)] == last


@pytest.mark.parametrize("length", [0, 1, 30, 60])
def test_what_is_read_after_a_cut_is_as_if_read_at_once(length: int) -> None:
    token_ids = [i % 200 for i in range(60)]  # bytes that are no characters, too
    read = TokenText(TOKENIZER, token_ids)
    read.cut(length)
    again = TokenText(TOKENIZER, token_ids[:length])
    for token_id in (70, 71, 72):
        assert read.push(token_id) == again.push(token_id)
    assert read.text == again.text
