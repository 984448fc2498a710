"""Pairs that do not fit are refused, saying what differs first."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from collm.errors import ConfigError, MismatchError
from collm.models.members import load_members
from collm.text.guards import TokenizerIdentity, check_accepted, check_eos, check_tokenizers


@pytest.fixture
def identity(tokenizer: PreTrainedTokenizerFast) -> TokenizerIdentity:
    return TokenizerIdentity.of(tokenizer)


def test_a_tokenizer_fits_itself(identity: TokenizerIdentity) -> None:
    check_tokenizers(identity, identity, "assistant")


def test_the_first_token_that_differs_is_named(identity: TokenizerIdentity) -> None:
    other = replace(identity, tokens={**identity.tokens, 40: "x40", 50: "x50"})
    with pytest.raises(MismatchError, match="token 40 is 'x40' there and 'w37' in the base"):
        check_tokenizers(identity, other, "assistant")
    shorter = replace(identity, tokens={i: t for i, t in identity.tokens.items() if i < 90})
    with pytest.raises(MismatchError, match=r"token 90 is missing there and 'w87' in the base \(90 and 97 tokens\)"):
        check_tokenizers(identity, shorter, "assistant")


def test_the_same_vocabulary_with_other_merges_is_noticed(identity: TokenizerIdentity) -> None:
    with pytest.raises(MismatchError, match="splits text into other tokens"):
        check_tokenizers(identity, replace(identity, probe_ids=(1, 2)), "assistant")


def test_special_tokens_and_chat_templates_may_be_accepted_by_name(identity: TokenizerIdentity) -> None:
    other = replace(identity, special_tokens={**identity.special_tokens, "eos_token": "w5"})
    with pytest.raises(MismatchError, match="the eos_token of assistant is 'w5', but '<eos>' in the base"):
        check_tokenizers(identity, other, "assistant")
    check_tokenizers(identity, other, "assistant", accept=["special_tokens"])
    ours, theirs = replace(identity, chat_template="{{ a }}"), replace(identity, chat_template="{{ b }}")
    with pytest.raises(MismatchError, match="the chat template of assistant differs from the base's"):
        check_tokenizers(ours, theirs, "assistant")
    check_tokenizers(ours, theirs, "assistant", accept=["chat_template"])
    check_tokenizers(identity, theirs, "assistant")  # only one of them has a template: nothing to disagree on


def test_eos_sets_must_agree_or_be_united() -> None:
    same = [("base", frozenset([1])), ("assistant", frozenset([1]))]
    other = [("base", frozenset([1])), ("assistant", frozenset([1, 7]))]
    assert check_eos(same) == {1}
    assert check_eos([*same, ("unnamed", frozenset())]) == {1}
    with pytest.raises(MismatchError, match=r"assistant ends texts with token ids \[1, 7\], base with \[1\]"):
        check_eos(other)
    assert check_eos(other, accept=["eos"]) == {1, 7}


def test_only_known_differences_can_be_accepted() -> None:
    with pytest.raises(ConfigError, match="cannot accept a difference in vocabulary"):
        check_accepted(["eos", "vocabulary"])


def test_a_model_must_score_every_token_of_the_tokenizer(
    tiny_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    exact, padded = (tiny_model(0, vocab_size=n) for n in (97, 128))
    assert [model.vocab_size for model in load_members([exact, padded], tokenizer, vocab_size=97)] == [97, 97]
    with pytest.raises(MismatchError, match="assistant has logits for 97 token ids, but the tokenizer has 100"):
        load_members([padded, exact], tokenizer, vocab_size=100)


def test_the_hash_speaks_of_content(tokenizer: PreTrainedTokenizerFast, identity: TokenizerIdentity) -> None:
    changed = copy.deepcopy(tokenizer)
    changed.add_tokens(["new"])
    assert TokenizerIdentity.of(copy.deepcopy(tokenizer)).hash == identity.hash
    assert TokenizerIdentity.of(changed).hash != identity.hash
