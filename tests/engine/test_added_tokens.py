"""Grammars whose literals hold tokens that were added to a tokenizer, special or not, as in Qwen."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from collm import CoLLM, SamplingParams, StructuredOutputs
from tests.engine.test_engine import random_head
from tests.engine.test_exactness import Plans
from tests.tiny_models import make_model, tiny_config
from tests.tokenizers import merging_tokenizer


@pytest.fixture(scope="module")
def model() -> CoLLM:
    tokenizer: PreTrainedTokenizerFast = merging_tokenizer('{"name": "weather"}', "the cat sat on a mat")
    added = [AddedToken(text, special=False, normalized=False) for text in ("<tool_call>", "</tool_call>")]
    tokenizer.add_tokens([*added, AddedToken("<|mark|>", special=True, normalized=False)])
    config = tiny_config(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    return CoLLM(make_model(config, 0), [make_model(config, 1)], random_head(32, 1), tokenizer)


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ({"choice": ["<tool_call>x</tool_call>"]}, "<tool_call>x</tool_call>"),
        ({"regex": "<tool_call>[x]</tool_call>"}, "<tool_call>x</tool_call>"),
        ({"json": {"enum": ["a<tool_call>b"]}}, json.dumps("a<tool_call>b")),
        ({"grammar": 'start: "<tool_call>" "x" "</tool_call>"'}, "<tool_call>x</tool_call>"),
        ({"grammar": 'root ::= "<tool_call>" "x"'}, "<tool_call>x"),
        ({"choice": ["the <|mark|> cat"]}, "the <|mark|> cat"),
        ({"regex": "<eos>!"}, "<eos>!"),
        ({"choice": ["é ü 🦊 <tool_call>"]}, "é ü 🦊 <tool_call>"),
    ],
)
def test_literals_are_written(form: dict[str, Any], expected: str, model: CoLLM) -> None:
    params = SamplingParams(60, structured_outputs=StructuredOutputs(**form))
    (completion,) = model.generate(["the cat"], params, threshold=0.5)
    assert completion.text == expected
    names = model.tokenizer.convert_ids_to_tokens(completion.token_ids)
    assert ("<tool_call>" in names) == ("<tool_call>" in expected)  # as one token, which the model knows
    assert not {"<|mark|>", "<eos>"} & set(names[:-1])


def test_a_special_token_is_named_and_another_one_has_an_id(model: CoLLM) -> None:
    call = model.tokenizer.convert_tokens_to_ids("<tool_call>")
    grammar = f'start: <|mark|> "x" <[{call}]>'
    params = SamplingParams(60, structured_outputs=StructuredOutputs(grammar=grammar))
    (completion,) = model.generate(["the cat"], params, threshold=0.5)
    assert model.tokenizer.convert_ids_to_tokens(completion.token_ids)[:3] == ["<|mark|>", "x", "<tool_call>"]


@pytest.mark.parametrize("seed", range(8))
def test_tokens_that_a_grammar_names_are_taken_back_with_drafts(
    seed: int, model: CoLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = model.tokenizer.convert_tokens_to_ids("<tool_call>")
    grammar = f'start: (<|mark|> "x" <[{call}]> /[a-c]+/)~3'
    params = SamplingParams(40, structured_outputs=StructuredOutputs(grammar=grammar))
    (expected,) = model.generate(["the cat"], params, threshold=0.5, lookahead=0)
    Plans(monkeypatch, random.Random(seed))
    (completion,) = model.generate(["the cat"], params, threshold=0.5)
    assert completion.token_ids == expected.token_ids


def test_thousands_of_choices_are_allowed(model: CoLLM) -> None:
    choices = [f"choice number {i}" for i in range(4000)]
    params = SamplingParams(60, structured_outputs=StructuredOutputs(choice=choices))
    assert model.generate(["the cat"], params, threshold=0.5)[0].text in choices
