"""Log-probabilities of prompts are those of the trained joint model, or of one author, read in any chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from collm import CoLLM, SamplingParams, ToolSpec
from collm.core.head import author_logprobs, doubt_of
from collm.core.policies import SingleAuthorPolicy
from collm.engine import chunks
from collm.errors import ConfigError, RequestError
from collm.evaluation.gold import gold_views
from collm.evaluation.harness import _log_likelihood
from collm.tools.calls import in_process
from collm.training.examples import Example, Examples
from tests.engine.test_engine import prompts_of, random_head
from tests.engine.test_tools import knows
from tests.tiny_models import make_model, tiny_config

PROMPT = [token for prompt in prompts_of(2, 4) for token in prompt]


@pytest.fixture(scope="module")
def trio() -> list[PreTrainedModel]:
    return [make_model(tiny_config(), seed) for seed in range(3)]


def laws(trio: list[PreTrainedModel], model: CoLLM, text: list[int], author: int | None) -> torch.Tensor:
    """Log-probabilities (T - 1, V), each model reading the whole text once."""
    with torch.no_grad():
        read = [one(torch.tensor([text]), output_hidden_states=True) for one in trio]
        each = torch.stack([one.logits[0, :-1].log_softmax(-1) for one in read])
        by_author = author_logprobs(model.head(read[0].hidden_states[-1][0, :-1], doubt_of(read[0].logits[0, :-1])))
    return each[author] if author is not None else (each + by_author.T.unsqueeze(-1)).logsumexp(0)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 7, 256])
@pytest.mark.parametrize("author", [None, 0, 2])
def test_they_are_the_sum_over_authors(
    author: int | None,
    chunk: int,
    trio: list[PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chunks, "MAX_POSITIONS", chunk)
    model = CoLLM(trio[0], trio[1:], random_head(32, 2, width=8, doubt=True), tokenizer)
    policy = None if author is None else SingleAuthorPolicy(author)
    first, *found = model.prompt_logprobs(PROMPT, 3, policy=policy)
    assert first is None
    expected = laws(trio, model, PROMPT, author)
    for row, token_id, one in zip(expected, PROMPT[1:], found, strict=True):
        assert one is not None
        assert one.token_id == token_id
        assert one.logprob == pytest.approx(row[token_id].item(), abs=1e-4)
        assert one.rank == int((row >= row[token_id]).sum())
        assert [logprob for _, logprob in one.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
    assert [runner.open_slots for runner in model.runners] == [0, 0, 0]


def test_with_completions(trio: list[PreTrainedModel], tokenizer: PreTrainedTokenizerFast) -> None:
    model = CoLLM(trio[0], trio[1:], random_head(32, 2), tokenizer)
    asked, plain = SamplingParams(4, prompt_logprobs=0), SamplingParams(4)
    out = model.generate([PROMPT, [5, 6]], [asked, plain], threshold=0.5)
    assert out[0].prompt_logprobs == model.prompt_logprobs(PROMPT)
    assert out[1].prompt_logprobs == []
    assert out[1].token_ids == model.generate([[5, 6]], plain, threshold=0.5)[0].token_ids
    with pytest.raises(ConfigError, match="no effect on a stream"):
        model.stream(PROMPT, asked, threshold=0.5)


def test_they_are_the_likelihoods_of_the_harness(
    trio: list[PreTrainedModel], tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("collm.models.tools.open_tool", lambda spec: in_process(knows))
    members: list[Any] = [trio[1], ToolSpec("calculator", eps=0.05)]
    model = CoLLM(trio[0], members, random_head(32, 2), tokenizer)
    views = gold_views(model, Examples([Example(PROMPT, [place > 0 for place in range(len(PROMPT))])]))
    total = sum(one.logprob for one in model.prompt_logprobs(PROMPT)[1:] if one)
    assert total == pytest.approx(_log_likelihood(views), abs=1e-4)


def test_where_a_tool_abstains_the_base_speaks_for_it(
    trio: list[PreTrainedModel], tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("collm.models.tools.open_tool", lambda spec: in_process(lambda text: None))
    model = CoLLM(trio[0], [ToolSpec("calculator", eps=0.05)], random_head(32, 1), tokenizer)
    alone = model.prompt_logprobs(PROMPT, policy=SingleAuthorPolicy(1))
    assert alone == model.prompt_logprobs(PROMPT, policy=SingleAuthorPolicy(0))


def test_texts_that_fill_the_context_are_read_and_longer_ones_refused(
    trio: list[PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    model = CoLLM(trio[0], trio[1:2], random_head(32, 1), tokenizer)
    assert len(model.prompt_logprobs([5] * 128)) == 128
    assert model.prompt_logprobs([5]) == [None]
    with pytest.raises(RequestError, match="has 129 tokens"):
        model.prompt_logprobs([5] * 129)
