"""Rows become examples: what is a target, what truncation does, and what identifies a set."""

from __future__ import annotations

import logging

import pytest
from transformers import PreTrainedTokenizerFast

from collm.errors import ConfigError, DataError
from collm.text.template import PromptTemplate
from collm.training.data import Row
from collm.training.examples import Example, encode, fingerprint
from tests.training.conftest import random_examples

CHAT = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} <eos> w9 {% endfor %}"
TEMPLATE = PromptTemplate("w1 {prompt}", chat=CHAT + "{% if add_generation_prompt %}assistant {% endif %}")


def row(prompt: str, completion: str) -> Row:
    return Row(prompt, completion, None, "rows.jsonl:1")


def chat_row(*turns: str) -> Row:
    roles = ("user", "assistant") * len(turns)
    messages = [{"role": role, "content": content} for role, content in zip(roles, turns, strict=False)]
    return Row(messages[:-1], turns[-1], messages, "rows.jsonl:2")


def test_completions_and_all_assistant_turns_are_targets(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [row("w2 w3", "w4 w5"), chat_row("w2", "w3 w4", "w5", "w6")]
    examples = encode(rows, TEMPLATE, tokenizer, max_length=50)
    targets = [
        tokenizer.convert_ids_to_tokens([t for t, hit in zip(one.token_ids, one.is_target, strict=True) if hit])
        for one in examples
    ]
    assert targets == [["w4", "w5", "<eos>"], ["w3", "w4", "<eos>", "w6", "<eos>"]]


def test_truncation_cuts_from_the_right_and_drops_what_has_no_target(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [row("w2 w3", "w4"), row("w2 w3", "w4 w5 w6 w7"), row("w2 w3 w4 w5 w6", "w7")]
    with caplog.at_level(logging.WARNING):
        examples = encode(rows, TEMPLATE, tokenizer, max_length=5)
    assert [len(example.token_ids) for example in examples] == [5, 5]
    assert [example.num_targets for example in examples] == [2, 2]
    assert examples[1].token_ids == encode(rows[1:2], TEMPLATE, tokenizer, max_length=9)[0].token_ids[:5]
    assert "2 of 3 examples exceed max_length 5" in caplog.text
    assert "1 had no target token left" in caplog.text


def test_no_target_left_at_all_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [row("w2 w3", "w4"), row("w2 w3 w4 w5 w6", "w7")]
    with pytest.raises(DataError, match=r"max_length 3 leaves no target token in any of 2 .* up to 6 tokens"):
        encode(rows, TEMPLATE, tokenizer, max_length=3)
    assert len(encode(rows, TEMPLATE, tokenizer, max_length=4)) == 1
    with pytest.raises(ConfigError, match="max_length is 1"):
        encode(rows, TEMPLATE, tokenizer, max_length=1)


def test_a_row_the_template_refuses_names_its_place(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"^rows.jsonl:2: .*no chat template"):
        encode([chat_row("w2", "w3")], PromptTemplate(), tokenizer, max_length=9)


def test_an_example_needs_marks_for_its_tokens_and_a_target() -> None:
    with pytest.raises(DataError, match="3 token ids but 2 target marks"):
        Example([1, 2, 3], [True, True])
    with pytest.raises(DataError, match="no target token after its first"):
        Example([1, 2], [True, False])


def test_the_fingerprint_sees_tokens_marks_order_and_borders() -> None:
    base = [Example([1, 2, 3], [False, True, True]), Example([4, 5], [False, True])]
    changes = [
        [Example([1, 2, 4], [False, True, True]), base[1]],
        [Example([1, 2, 3], [False, False, True]), base[1]],
        [base[1], base[0]],
        [Example([1, 2, 3, 4, 5], [False, True, True, False, True])],
        base[:1],
    ]
    prints = {fingerprint(examples) for examples in [base, *changes]}
    assert len(prints) == 6
    assert fingerprint(random_examples(9)) == fingerprint(random_examples(9))
