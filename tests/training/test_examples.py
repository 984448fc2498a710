"""Rows become examples: what is a target, what truncation does, and what identifies a set."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from collm.errors import ConfigError, DataError
from collm.models.language_model import LanguageModel
from collm.text.template import PromptTemplate
from collm.training import scoring
from collm.training.data import Row
from collm.training.examples import Example, batches_by_length, collate, encode, fingerprint, shift
from collm.training.scoring import read_gold
from tests.training.conftest import Tiny, random_examples

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


def test_position_t_speaks_of_the_token_after_t() -> None:
    shifted = shift(Example([5, 6, 7, 8], [True, False, True, True]))
    assert shifted["input_ids"].tolist() == [5, 6, 7]
    assert shifted["gold"].tolist() == [6, 7, 8]
    assert shifted["target_mask"].tolist() == [False, True, True]


def test_padding_is_on_the_right_unattended_and_no_target() -> None:
    batch = collate([shift(Example([5, 6], [False, True])), shift(Example([7, 8, 9], [True, True, True]))])
    assert batch["input_ids"].tolist() == [[5, 0], [7, 8]]
    assert batch["attention_mask"].tolist() == [[1, 0], [1, 1]]
    assert batch["target_mask"].tolist() == [[True, False], [True, True]]


@given(st.lists(st.integers(1, 30), max_size=30), st.integers(1, 64))
def test_batches_hold_everything_once_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = batches_by_length(lengths, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= budget


def at_targets(model: LanguageModel, hidden: torch.Tensor, gold: torch.Tensor) -> list[torch.Tensor]:
    """Log-probabilities and correctness where all tokens are targets."""
    batch = {"gold": gold[None], "target_mask": torch.ones_like(gold[None], dtype=torch.bool)}
    return list(read_gold(model, hidden[None], batch).values())


def test_chunks_do_not_change_values(tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel(tiny_model(3), name="model")
    hidden, gold = torch.randn(17, model.hidden_size), torch.randint(0, 97, (17,))
    whole = at_targets(model, hidden, gold)
    monkeypatch.setattr(scoring, "MAX_LOGITS", 97 * 4)
    for mine, theirs in zip(at_targets(model, hidden, gold), whole, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_only_the_shared_vocabulary_counts(tiny_model: Tiny) -> None:
    module = tiny_model(3)
    hidden, gold = torch.randn(5, 32), torch.randint(0, 50, (5,))
    logprob, correct, *_ = at_targets(LanguageModel(module, name="model", vocab_size=50), hidden, gold)
    logits = module.lm_head(hidden)[:, :50]
    torch.testing.assert_close(logprob, logits.log_softmax(-1)[torch.arange(5), gold])
    assert correct.tolist() == (logits.argmax(-1) == gold).tolist()
