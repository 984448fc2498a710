"""Probabilities are those of the law that decodes: they sum to 1, and what is drawn is what is reported."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from collm import CoLLM, SamplingParams, ToolSpec
from collm.core.combinations import MixturePolicy
from collm.core.policies import BudgetPolicy, JointPolicy, Policy, SingleAuthorPolicy, ThresholdPolicy
from collm.evaluation.gold import gold_views, greedy_writes
from collm.evaluation.harness import _log_likelihood
from collm.tools.calls import in_process
from collm.training.examples import Example, Examples, aligned_example
from tests.engine.test_engine import random_head
from tests.tiny_models import make_model, tiny_config
from tests.tokenizers import SEVEN_TOKENS, seven_tokens
from tests.two_tokenizers import two_tokenizers, writing_model

TEXTS = {"silent": "ab", "answers": "bc", "goes on": "bca", "has gone wrong": "bcb"}


def answers_after_c(text: str) -> str | None:
    """Several tokens spell a beginning of the answer."""
    return "abab" if text.endswith("c") else None


@pytest.fixture(scope="module")
def small() -> PreTrainedTokenizerFast:
    return seven_tokens()


@pytest.fixture(scope="module", params=["tool", pytest.param("tool and model", marks=pytest.mark.slow)])
def helped(request: pytest.FixtureRequest, small: PreTrainedTokenizerFast) -> CoLLM:
    """A base with a tool that is silent at most places."""
    config = tiny_config(vocab_size=len(SEVEN_TOKENS), initializer_range=0.5)
    members = [ToolSpec("calculator", eps=0.3), make_model(config, 4)][: 1 + (request.param != "tool")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("collm.models.tools.open_tool", lambda spec: in_process(answers_after_c))
        model = CoLLM(make_model(config, 3), members, random_head(32, len(members)), small)
        assert len(model.runners) == 1 + len(members)
    return model


def law(model: CoLLM, text: list[int], policy: Policy | None) -> list[float]:
    """The probability of every token after a text."""
    found = [model.prompt_logprobs([*text, token], policy=policy)[-1] for token in range(len(SEVEN_TOKENS))]
    return [math.exp(one.logprob) for one in found if one is not None]


def distance(drawn: Counter[int], law: list[float]) -> float:
    """Chi-squared."""
    total = sum(drawn.values())
    return sum((drawn[token] - total * prob) ** 2 / (total * prob) for token, prob in enumerate(law))


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("policy", [JointPolicy(), MixturePolicy(), ThresholdPolicy(-1.0), ThresholdPolicy(1.0)])
@pytest.mark.slow
def test_what_is_drawn_is_what_is_reported(helped: CoLLM, policy: Policy, text: str) -> None:
    ids = helped.tokenizer(text)["input_ids"]
    authors = range(len(helped.assistants) + 1)
    of_author = [law(helped, ids, SingleAuthorPolicy(author)) for author in authors]
    params = SamplingParams(max_tokens=1, temperature=1.0, seed=5)
    done = helped.generate([ids] * 600, params, policy=policy, max_batch=200)
    if isinstance(policy, ThresholdPolicy):
        chosen = helped.generate(ids, SamplingParams(1), policy=policy)[0].authors[0]
        expected = of_author[chosen]
    else:
        expected = law(helped, ids, None)
    for each in (expected, *of_author):
        assert sum(each) == pytest.approx(1, abs=1e-5)
    assert distance(Counter(one.token_ids[0] for one in done), expected) < 22.5  # 0.1 % of 6 degrees of freedom
    for one in done:
        reported = expected if isinstance(policy, MixturePolicy) else of_author[one.authors[0]]
        assert math.exp(one.logprobs[0]) == pytest.approx(reported[one.token_ids[0]], abs=1e-5)


def test_likelihoods_of_texts_are_those_of_the_law(helped: CoLLM) -> None:
    """Also of texts in other tokens than the tokenizer's, of which a tool would write none."""
    texts = [[3, 0, 1], [1, 3, 2, 2, 3, 4], [3, 0, 1, 2, 3, 5, 0], [2, 3, 2, 0, 1, 6]]
    examples = Examples(Example(text, [place > 0 for place in range(len(text))]) for text in texts)
    views = gold_views(helped, examples)
    for text, part in zip(texts, views.split([len(text) - 1 for text in texts]), strict=True):
        read = helped.prompt_logprobs(text)[1:]
        assert _log_likelihood(part) == pytest.approx(sum(one.logprob for one in read if one), abs=1e-4)
        for place, written in enumerate(greedy_writes(part, 0.5).tolist(), start=1):
            (done,) = helped.generate(text[:place], SamplingParams(1), threshold=0.5)
            assert written == (done.token_ids == [text[place]])


@pytest.fixture(scope="module")
def apart() -> CoLLM:
    """Models with different tokenizers, whose segments have several tokens."""
    base, assistant = two_tokenizers()
    models = writing_model(base, 1), writing_model(assistant, 2, hidden_size=48)
    return CoLLM(models[0], [models[1]], random_head(32, 1), base, tokenizers=[assistant])


@pytest.fixture(scope="module")
def together(apart: CoLLM) -> CoLLM:
    """Models with one tokenizer."""
    return CoLLM(apart.base, [writing_model(two_tokenizers()[0], 3)], apart.head, apart.tokenizer)


def test_likelihoods_of_segments_are_those_of_the_law(apart: CoLLM) -> None:
    """A tool writes its answer alone; where it is silent, the base writes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "collm.models.tools.open_tool", lambda spec: in_process(lambda text: "pen" if text.endswith("=") else None)
        )
        members = [apart.assistants[0], ToolSpec("calculator", eps=0.2)]
        tokenizers = [two_tokenizers()[1], apart.tokenizer]
        model = CoLLM(apart.base, members, random_head(32, 2), apart.tokenizer, tokenizers=tokenizers)
        assert model.alignment is not None
        prompt = model.tokenizer("so")["input_ids"]
        prompts = [prompt, *model.alignment.assistant_prompts(prompt)]
        hit, least = 0.8 ** len(model.tokenizer("pen")["input_ids"]), 0.2 / model.identity.vocab_size
        for answer, low, high in ((" 1=pen a", hit, 0.99), (" 1=penzz a", 0, 0), (" 1=7 a", least, 2 * least)):
            examples = aligned_example(model.alignment, prompts, answer)
            starts = model.alignment.boundaries(answer.encode())
            views = gold_views(model, examples)
            assert views.assistant_abstained is not None
            silent = views.assistant_abstained[:, 1]
            assert silent.tolist() == [at != answer.index("=") + 1 for at in starts]
            assert torch.equal(views.assistant_logprobs[silent, 1], views.base_logprob[silent])
            (found,) = views.assistant_logprobs[~silent, 1].exp().tolist()
            assert low <= found <= high


@pytest.mark.slow
@settings(deadline=None, max_examples=30)
@given(st.floats(0, 1), st.integers(0, 3), st.sampled_from([-1.0, 0.2, 0.5]), st.sampled_from([0.0, 1.0]))
def test_no_beginning_of_a_text_exceeds_its_budget(
    together: CoLLM, apart: CoLLM, budget: float, burst: int, threshold: float, temperature: float
) -> None:
    policy = BudgetPolicy(budget, threshold=threshold, burst=burst)
    params = SamplingParams(max_tokens=30, temperature=temperature, seed=1 if temperature else None)
    for model in (together, apart):
        for one in model.generate(["the town", "what is the name", "48 miles"], params, policy=policy):
            for n in range(1, len(one.authors) + 1):
                assert sum(author != 0 for author in one.authors[:n]) <= budget * n + burst
