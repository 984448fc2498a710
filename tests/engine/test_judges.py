"""Judges in decoding: from the threshold rule to the assistant's own text, in fewer passes than it needs alone."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from collm import CoLLM, SamplingParams, ToolSpec
from collm.core.combinations import MixturePolicy
from collm.core.policies import Policy, SingleAuthorPolicy
from collm.errors import ConfigError
from tests.engine.test_engine import prompts_of, random_head
from tests.engine.test_exactness import relative_of
from tests.tiny_models import make_model, tiny_config
from tests.two_tokenizers import two_tokenizers, writing_model

PARAMS = SamplingParams(max_tokens=24)


@pytest.fixture(scope="module")
def pair(tokenizer: PreTrainedTokenizerFast) -> CoLLM:
    """The assistant often writes what the base would write."""
    config = tiny_config(eos_token_id=None)
    base = make_model(config, 0)
    return CoLLM(base, [relative_of(base, config, 1, 0.1)], random_head(32, 1), tokenizer)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 1.0])
def test_exact_writes_what_the_assistant_writes_alone(pair: CoLLM, threshold: float) -> None:
    alone = pair.generate(prompts_of(3, 3), PARAMS, policy=SingleAuthorPolicy(1), lookahead=0)
    found = pair.generate(prompts_of(3, 3), PARAMS, threshold=threshold, judge="exact")
    assert [one.token_ids for one in found] == [one.token_ids for one in alone]


@pytest.mark.parametrize("judge", ["blend:weight=0", "regret:nats=inf"])
@pytest.mark.slow
def test_what_keeps_everything_is_the_threshold_rule(pair: CoLLM, judge: str) -> None:
    plain = pair.generate(prompts_of(3, 3), PARAMS, threshold=0.5)
    found = pair.generate(prompts_of(3, 3), PARAMS, threshold=0.5, judge=judge)
    assert [(one.token_ids, one.authors) for one in found] == [(one.token_ids, one.authors) for one in plain]
    assert not any(one.rejected for one in found)


def test_a_rejected_token_is_the_bases_and_the_assistants_stands_there(pair: CoLLM) -> None:
    (found,) = pair.generate(prompts_of(3, 1), PARAMS, threshold=1.0, judge="exact")
    assert found.rejected
    assert {i for i, author in enumerate(found.authors) if author} == set(found.rejected)
    for i, token_id in found.rejected.items():
        (of_base,) = pair.generate([found.prompt_token_ids + found.token_ids[:i]], SamplingParams(1), threshold=1.0)
        assert of_base.token_ids == [token_id] != [found.token_ids[i]]
    steps = list(pair.stream(found.prompt_token_ids, PARAMS, threshold=1.0, judge="exact"))
    assert {i: step.rejected[0] for i, step in enumerate(steps) if step.rejected is not None} == found.rejected


@pytest.mark.slow
def test_a_budget_of_regret_is_kept(pair: CoLLM) -> None:
    for budget in (0.0, 0.5, 2.0):
        judge = f"regret:nats=1,budget={budget}"
        (found,) = pair.generate(prompts_of(3, 1), PARAMS, threshold=0.7, judge=judge)
        lost = 0.0
        for i, author in enumerate(found.authors):
            text = [*found.prompt_token_ids, *found.token_ids[: i + 1]]
            regret = pair.prompt_logprobs(text, 1, policy=SingleAuthorPolicy(1))[-1]
            assert regret is not None
            lost += 0 if author else regret.top[0][1] - regret.logprob
        assert lost <= budget + 1e-4


def test_a_call_of_the_assistant_judges_several_tokens(pair: CoLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("collm.engine.planner.guess_depth", lambda *arguments: arguments[-1])
    monkeypatch.setattr("collm.engine.planner.pays", lambda *arguments: True)
    for policy in ("threshold:threshold=1,judge=exact", "mixture", "single:writer=1"):
        out = pair.generate(prompts_of(3, 1), PARAMS, policy=policy)
        assert out.usage["assistant"].forward_passes < 24


def test_one_call_judges_the_drafts_of_a_whole_batch(pair: CoLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences draft differently many tokens before it."""
    rng = random.Random(0)
    monkeypatch.setattr("collm.engine.planner.pays", lambda *arguments: rng.random() < 0.7)
    engine, policy = pair.engine(6), pair.policy(threshold=1.0, judge="exact")
    for prompt in prompts_of(3, 6):
        engine.add(pair.request(prompt, PARAMS, policy))
    running = set(range(6))
    while engine.has_work:
        outputs = engine.step()
        assert {output.number for output in outputs} in (set(), running)
        running -= {output.number for output in outputs if output.completion is not None}


def test_a_draft_does_not_keep_a_sequence_from_the_call_that_serves_the_others(
    pair: CoLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("collm.engine.planner.guess_depth", lambda *arguments: arguments[-1])
    monkeypatch.setattr("collm.engine.planner.wait_steps", lambda *arguments: 0)
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    ways = [pair.generate(prompts_of(3, 6), params, policy="single:writer=1", lookahead=most) for most in (0, None)]
    plain, drafted = (out.usage["assistant"].forward_passes for out in ways)
    assert drafted == plain


def test_text_lags_by_at_most_as_many_tokens_as_wait(pair: CoLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("collm.engine.planner.pays", lambda *arguments: True)
    for every in (1, 3):
        engine = pair.engine(1)
        engine.add(pair.request([5, 6], PARAMS, pair.policy(threshold=1.0, judge=f"exact:every={every}")))
        longest = 0
        while engine.has_work:
            longest = max(longest, len([one for one in engine.step() if one.step is not None]))
        assert longest == every


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule", ["threshold:threshold=0.65,judge=exact", "threshold:threshold=1,judge=joint", "mixture"]
)
def test_two_tokens_are_distributed_as_the_law_says(pair: CoLLM, rule: str) -> None:
    """All pairs of the likeliest tokens, sampled at a low temperature, against their probabilities."""
    params = SamplingParams(max_tokens=2, temperature=0.25, seed=3)
    policy: Policy = pair.policy(rule)
    done = pair.generate([[5, 6]] * 1500, params, policy=policy, max_batch=250)
    whole = MixturePolicy() if "exact" not in rule else SingleAuthorPolicy(1)

    def law(text: list[int]) -> torch.Tensor:
        found = pair.prompt_logprobs([*text, 0], 97, policy=whole)[-1]
        assert found is not None
        logprobs = torch.full((97,), -torch.inf)
        for token, logprob in (*found.top, (0, found.logprob)):
            logprobs[token] = logprob
        return (logprobs / params.temperature).softmax(-1)

    first = law([5, 6])
    likely = [token for token in range(97) if first[token] > 0.02]
    probs = {}
    for token in likely:
        second = law([5, 6, token])
        probs |= {(token, other): float(first[token] * second[other]) for other in range(97)}
    cells = [pair_of for pair_of, prob in probs.items() if prob * len(done) >= 5]
    counts = Counter(tuple(one.token_ids) for one in done)
    rest = 1 - sum(probs[cell] for cell in cells)
    expected = [probs[cell] * len(done) for cell in cells] + [rest * len(done)]
    seen = [counts[cell] for cell in cells]
    seen.append(len(done) - sum(seen))
    chi = sum((k - e) ** 2 / e for k, e in zip(seen, expected, strict=True))
    assert len(cells) >= 5
    assert chi < len(cells) + 4 * (2 * len(cells)) ** 0.5  # four standard deviations


def test_judges_that_the_models_cannot_have_are_refused(pair: CoLLM) -> None:
    tooled = CoLLM(pair.base, [ToolSpec("calculator")], pair.head, pair.tokenizer)
    with pytest.raises(ConfigError, match="a tool cannot; use blend, joint, regret"):
        tooled.generate([[5]], threshold=0.5, judge="exact")
    base, assistant = two_tokenizers()
    models = writing_model(base, 1), writing_model(assistant, 2, hidden_size=48)
    apart = CoLLM(models[0], [models[1]], random_head(32, 1), base, tokenizers=[assistant])
    for judge in ("exact", "joint"):
        with pytest.raises(ConfigError, match="these have different tokenizers"):
            apart.generate(["so"], threshold=0.5, judge=judge)
    with pytest.raises(ConfigError, match="judge have no effect beside policies for each prompt"):
        pair.generate([[5]], policy=[SingleAuthorPolicy(1)], judge="exact")
