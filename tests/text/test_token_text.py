"""Detokenising as tokens arrive and are cut: whole characters, prompt and text join exactly, stop strings."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from collm.text.token_text import TextStream, TokenText
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


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte one token, so that most characters are split over several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)


BYTES = byte_tokenizer()


def pieces_of(tokenizer: PreTrainedTokenizerFast, prompt: str, text: str, stop: tuple[str, ...] = ()) -> list[str]:
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    stream = TextStream(tokenizer, prompt_ids, stop)
    pieces = []
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        pieces.append(stream.push(token))
        if stream.stopped:
            return pieces
    return [*pieces, stream.finish()]


texts = st.text(st.characters(codec="utf-8", exclude_characters="\N{REPLACEMENT CHARACTER}"), max_size=20)


@settings(deadline=None)
@given(texts, texts)
def test_pieces_are_whole_characters_and_join_to_the_text(prompt: str, text: str) -> None:
    pieces = pieces_of(BYTES, prompt, text)
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_a_character_cut_off_at_the_end_is_dropped() -> None:
    stream = TextStream(BYTES, [])
    pieces = [stream.push(token) for token in BYTES("é日")["input_ids"][:-1]]
    assert "".join([*pieces, stream.finish()]) == "é"


def test_invalid_bytes_in_the_middle_show_once_what_follows_is_certain() -> None:
    (invalid,) = [i for i in range(256) if BYTES.convert_ids_to_tokens(i) == "ÿ"]  # byte 0xFF
    stream = TextStream(BYTES, [])
    out = stream.push(invalid) + "".join(stream.push(t) for t in BYTES("ok")["input_ids"]) + stream.finish()
    assert out == "\N{REPLACEMENT CHARACTER}ok"


@settings(deadline=None)
@given(texts, st.lists(st.text("abé ", min_size=1, max_size=4), min_size=1, max_size=3), st.text("abé ", max_size=30))
def test_stop_strings_cut_at_the_first_to_be_complete(prompt: str, stop: list[str], text: str) -> None:
    pieces = pieces_of(BYTES, prompt, text, tuple(stop))
    ends = [(text.index(s) + len(s), s) for s in stop if s in text]
    if not ends:
        assert "".join(pieces) == text
    else:
        first_end = min(end for end, _ in ends)
        start = min(text.index(s) for end, s in ends if end == first_end)
        assert "".join(pieces) == text[:start]


@given(st.text("ab", max_size=12))
def test_nothing_is_emitted_that_may_still_become_a_stop_string(text: str) -> None:
    output = ""
    for length, piece in enumerate(pieces_of(BYTES, "", text, ("aab",))[:-1], start=1):
        output += piece
        for rest in ("aab", "ab", "b"):
            whole = text[:length] + rest
            assert whole[: whole.find("aab")].startswith(output) or "aab" not in whole


def test_words_continue_the_prompt_with_their_space(tokenizer: PreTrainedTokenizerFast) -> None:
    assert pieces_of(tokenizer, "w1 w2", "w3 w4") == [" w3", " w4", ""]
    assert pieces_of(tokenizer, "", "w3 w4") == ["w3", " w4", ""]


@pytest.mark.parametrize("count", [1, 40])
def test_special_tokens_have_no_text(tokenizer: PreTrainedTokenizerFast, count: int) -> None:
    stream = TextStream(tokenizer, [5])
    assert [stream.push(1) for _ in range(count)] == [""] * count
    assert stream.push(6) == " w3"
