"""Prompt lookup against its definition, while the text grows."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from collm.engine.lookup import PromptLookup


def followed_last_time(text: list[int], length: int) -> list[int]:
    """What came after the most recent earlier occurrence of the last 3 tokens, else of the last 2."""
    for n in (3, 2):
        earlier = [end for end in range(n, len(text)) if text[end - n : end] == text[len(text) - n :]]
        if earlier:
            return text[earlier[-1] : earlier[-1] + length]
    return []


@settings(deadline=None, max_examples=50)
@given(
    tokens=st.lists(st.integers(0, 3), max_size=40),
    prompt=st.integers(0, 20),
    every=st.integers(1, 5),
    length=st.integers(1, 6),
)
def test_drafts_are_what_followed_the_ending_last_time_however_the_text_grows(
    tokens: list[int], prompt: int, every: int, length: int
) -> None:
    text = tokens[:prompt]
    lookup = PromptLookup(text)
    for added, token in enumerate([*tokens[prompt:], 0]):
        if added % every == 0:
            expected = followed_last_time(text, length)
            assert lookup.draft(length) == expected
            assert lookup.next_token() == (expected[0] if expected else None)
        text.append(token)


def test_a_draft_changes_neither_the_text_nor_the_next_draft() -> None:
    text = [1, 2, 3, 4, 5, 1, 2, 3]
    lookup = PromptLookup(text)
    lookup.draft(4).append(99)
    assert text == [1, 2, 3, 4, 5, 1, 2, 3]
    assert [lookup.draft(length) for length in (0, 1, 2, 9)] == [[], [4], [4, 5], [4, 5, 1, 2, 3]]
    assert lookup.draft(4) == [4, 5, 1, 2]


def test_three_tokens_go_before_two_and_the_latest_occurrence_before_earlier_ones() -> None:
    assert PromptLookup([1, 2, 3, 7, 9, 2, 3, 8, 1, 2, 3]).draft(1) == [7]
    assert PromptLookup([1, 2, 3, 7, 9, 2, 3, 8, 5, 2, 3]).draft(1) == [8]
    assert PromptLookup([1, 2, 3, 7, 1, 2, 3, 8, 1, 2, 3]).draft(1) == [8]


def test_an_occurrence_may_overlap_the_ending() -> None:
    assert PromptLookup([4, 4, 4]).draft(5) == [4]
    assert PromptLookup([4, 4, 4, 4]).draft(5) == [4]
    assert PromptLookup([1, 2, 1, 2, 1, 2]).draft(5) == [1, 2]


def test_a_text_shorter_than_what_is_looked_up_has_no_draft() -> None:
    for text in ([], [5], [5, 5]):
        assert PromptLookup(text).draft(3) == []
        assert PromptLookup(text).next_token() is None


def test_token_zero_is_a_prediction_like_any_other() -> None:
    assert PromptLookup([7, 8, 0, 7, 8]).next_token() == 0
