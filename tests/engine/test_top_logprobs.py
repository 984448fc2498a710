"""The likeliest tokens of every step against each law worked out from scratch."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from collm import CoLLM, SamplingParams, ToolSpec
from collm.core.combinations import CombiningPolicy, ContrastivePolicy, MixturePolicy, ProductPolicy
from collm.core.head import author_logprobs
from collm.core.policies import ConfidencePolicy, JointPolicy, Policy, ThresholdPolicy
from collm.errors import ConfigError
from collm.models.tools import ToolModel
from collm.tools.calls import in_process
from tests.engine.slow import Reading
from tests.engine.test_engine import prompts_of, random_head
from tests.engine.test_tools import knows
from tests.tiny_models import make_model, tiny_config

MOST = 5


@pytest.fixture
def company(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> CoLLM:
    """A base, a model and a tool."""
    monkeypatch.setattr("collm.models.tools.open_tool", lambda spec: in_process(knows))
    members = [make_model(tiny_config(), 1), ToolSpec("calculator", eps=0.05)]
    return CoLLM(make_model(tiny_config(), 0), members, random_head(32, 2, scale=1.0), tokenizer)


def law_of_next(model: CoLLM, ids: Sequence[int], author: int, policy: Policy) -> torch.Tensor:
    """Log-probabilities (V,) that the token after `ids` was drawn from, before temperature and truncation."""
    tool = ToolModel(ToolSpec("calculator", eps=0.05), model.tokenizer, name="", vocab_size=97)
    with torch.no_grad():
        base, *assistants = (
            Reading(one, list(ids), torch.device("cpu"))  # type: ignore[arg-type]
            for one in (model.base, model.assistants[0], tool)
        )
        said = [reading.logits(list(ids)) for reading in (base, *assistants)]
        logits = [said[0] if each is None else each for each in said]
        if not isinstance(policy, CombiningPolicy):
            return logits[author][0].log_softmax(-1)
        asked = [0, *policy.consults(2)]
        by_author = author_logprobs(model.head(base.hidden(list(ids))))
        return policy.combine({one: logits[one].log_softmax(-1) for one in asked}, by_author)[0].log_softmax(-1)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "policy",
    [ThresholdPolicy(0.5), JointPolicy(), ConfidencePolicy(), MixturePolicy(), ProductPolicy(), ContrastivePolicy()],
    ids=lambda policy: type(policy).__name__,
)
def test_the_likeliest_tokens_are_those_of_the_law_that_was_drawn_from(
    company: CoLLM, policy: Policy, temperature: float
) -> None:
    top_p, seed = (0.9, 3) if temperature else (1.0, None)
    params = SamplingParams(8, temperature, top_p, seed=seed, logprobs=MOST)
    for prompt, completion in zip(
        prompts_of(3, 3), company.generate(prompts_of(3, 3), params, policy=policy), strict=True
    ):
        assert len(completion.top_logprobs) == len(completion.token_ids)
        for i, top in enumerate(completion.top_logprobs):
            law = law_of_next(company, [*prompt, *completion.token_ids[:i]], completion.authors[i], policy)
            assert [logprob for _, logprob in top] == pytest.approx(
                [value for value in law.topk(MOST).values.tolist() if value > -torch.inf], abs=1e-4
            )
            assert [law[token_id].item() for token_id, _ in top] == pytest.approx([p for _, p in top], abs=1e-4)
            assert completion.logprobs[i] == pytest.approx(law[completion.token_ids[i]].item(), abs=1e-4)


@pytest.mark.slow
def test_they_change_no_token_and_stay_away_unasked(company: CoLLM) -> None:
    params = SamplingParams(12, 1.0, seed=1)
    plain = company.generate(prompts_of(4, 3), params, threshold=0.5)
    asked = company.generate(prompts_of(4, 3), SamplingParams(12, 1.0, seed=1, logprobs=2), threshold=0.5)
    assert [one.token_ids for one in plain] == [one.token_ids for one in asked]
    assert all(one.top_logprobs == [] for one in plain)
    (prompt, *_) = prompts_of(4, 3)
    steps = company.stream(prompt, SamplingParams(12, 1.0, seed=1, logprobs=2), threshold=0.5)
    likeliest = [[token_id for token_id, _ in top] for top in asked[0].top_logprobs]
    assert [[token_id for token_id, _ in step.top_logprobs] for step in steps] == likeliest
    assert all(step.top_logprobs == () for step in company.stream(prompt, params, threshold=0.5))


@pytest.mark.parametrize("most", [-1, 21])
def test_the_number_is_from_0_to_20(most: int) -> None:
    with pytest.raises(ConfigError, match=f"logprobs is {most}, expected 0 to 20"):
        SamplingParams(logprobs=most)
