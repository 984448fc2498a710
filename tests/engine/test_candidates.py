"""What each author would have written: as its own forward pass says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from collm import CoLLM, DeferralHead, SamplingParams
from collm.tools.spec import ToolSpec


@pytest.fixture
def model(tiny_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast) -> CoLLM:
    return CoLLM(tiny_model(0), [tiny_model(1), tiny_model(2, hidden_size=48)], DeferralHead(32, 2), tokenizer)


def test_candidates_are_what_each_model_says_there(model: CoLLM) -> None:
    prompt_ids = model.tokenizer("w1 w2 w3").input_ids
    token_ids = model.generate([prompt_ids], SamplingParams(max_tokens=5), threshold=0.5)[0].token_ids
    found = model.candidates(prompt_ids, token_ids, most=3)
    for author, member in enumerate(model.members):
        ids = torch.tensor([[*prompt_ids, *token_ids]])
        with torch.no_grad():
            probs = member.module(input_ids=ids).logits[0].softmax(-1)
        for place in range(len(token_ids)):
            expected = probs[len(prompt_ids) + place - 1].topk(3)
            assert [prob for _, prob in found[place][author]] == pytest.approx(expected.values.tolist(), abs=1e-5)
            texts = [text.strip() for text, _ in found[place][author]]
            assert texts == model.tokenizer.convert_ids_to_tokens(expected.indices.tolist())
    assert model.candidates(prompt_ids, []) == []


def test_a_tool_has_candidates_only_where_it_knows(model: CoLLM) -> None:
    pair = CoLLM(model.base, [ToolSpec.parse("tool:calculator")], DeferralHead(32, 1), model.tokenizer)
    found = pair.candidates("w1", pair.tokenizer("w2 w3").input_ids)
    assert [len(of_tool) for _, of_tool in found] == [0, 0]
