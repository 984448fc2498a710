"""Whatever is read ahead, grouped, waited for or shared: the tokens are those of the slow loop."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from collm import CoLLM, SamplingParams
from collm.core.combinations import ContrastivePolicy, MixturePolicy, ProductPolicy, ProxyTuningPolicy
from collm.core.judges import BlendJudge, ExactJudge, JointJudge, JudgedPolicy, RegretJudge
from collm.core.policies import (
    BudgetPolicy,
    ConfidencePolicy,
    JointPolicy,
    OraclePolicy,
    Policy,
    RandomPolicy,
    ScheduledPolicy,
    SingleAuthorPolicy,
    ThresholdPolicy,
)
from collm.core.types import Completion
from collm.engine import planner as planner_module
from collm.engine.request import Request
from tests.architectures import ARCHITECTURES, EXACT, VOCAB_SIZE
from tests.engine.slow import slow_decode
from tests.engine.test_engine import prompts_of, random_head
from tests.tiny_models import DEVICES, make_model, tiny_config


def relative_of(
    model: PreTrainedModel, config: Any, seed: int, distance: float, device: str = "cpu"
) -> PreTrainedModel:
    """A model that often agrees with another: the same weights and some noise."""
    other = make_model(config, seed, device)
    with torch.no_grad():
        for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
            mine.copy_((1 - distance) * theirs + distance * mine)
    return other


def facts(completion: Completion) -> tuple[object, ...]:
    """All of a completion but its probabilities, which may differ by rounding."""
    return completion.token_ids, completion.token_texts, completion.authors, completion.finish_reason


class Plans:
    """Plans drawn at random in place of those that measured times would suggest."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rng: random.Random) -> None:
        self.rng = rng
        monkeypatch.setattr(planner_module, "pays", lambda *rest: rng.random() < 0.7)
        for name, lowest in (
            ("lookup_length", 0),
            ("assistant_draft_length", 0),
            ("guess_depth", 1),
            ("wait_steps", 0),
        ):
            monkeypatch.setattr(planner_module, name, lambda *rest, least=lowest: self._plan(least, rest[-1]))

    def _plan(self, least: int, longest: int) -> int:
        return self.rng.randint(least, max(least, min(longest, 5)))


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> Plans:
    return Plans(monkeypatch, random.Random(0))


EVERYWHERE = [JudgedPolicy(ThresholdPolicy(0.6), RegretJudge(0.5)), JudgedPolicy(ThresholdPolicy(0.9), ExactJudge())]
"""Rules that read the assistant where the base writes."""


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_reading_ahead_changes_nothing_on_any_architecture(
    name: str, device: str, tokenizer: PreTrainedTokenizerFast, plans: Plans
) -> None:
    base = make_model(EXACT[name](), 0, device)
    assistant = relative_of(base, EXACT[name](), 1, 0.1, device)
    model = CoLLM(base, [assistant], random_head(32, 1), tokenizer)
    params = SamplingParams(max_tokens=24)
    out = model.generate(prompts_of(7, 4), params, threshold=0.5, max_batch=3)
    alone = model.generate(prompts_of(8, 1), params, threshold=0.4)
    judged = model.generate(prompts_of(9, 2), params, policy=EVERYWHERE, max_batch=2)
    policies = [*[ThresholdPolicy(0.5)] * 4, ThresholdPolicy(0.4), *EVERYWHERE]
    for completion, policy in zip([*out, *alone, *judged], policies, strict=True):
        prompt, guess = completion.prompt_token_ids, completion.token_ids
        expected = slow_decode([base, assistant], model.head, prompt, policy, params, guess=guess)
        assert (completion.token_ids, completion.authors) == expected
    written = sum(len(completion.token_ids) for completion in out)
    assert out.usage["base"].forward_passes < written  # some drafts held


RULES: list[Policy] = [
    ThresholdPolicy(0.5),
    ScheduledPolicy(0.2, 0.8, 10),
    BudgetPolicy(0.3, 0.4, burst=2),
    JointPolicy(),
    RandomPolicy(0.4),
    SingleAuthorPolicy(2),
    ConfidencePolicy(),
    MixturePolicy(),
    MixturePolicy(0.5),
    ProductPolicy(0.4),
    ContrastivePolicy(0.1, 0.5),
    ContrastivePolicy(0.1, 0.5, expert=2, amateur=1),
    ProxyTuningPolicy(1, 0, 2),
    OraclePolicy(tuple(range(2, 40))),
    JudgedPolicy(ThresholdPolicy(0.5), ExactJudge()),
    JudgedPolicy(ThresholdPolicy(1.0), ExactJudge(), every=3),
    JudgedPolicy(ThresholdPolicy(0.5), BlendJudge(0.6)),
    JudgedPolicy(ThresholdPolicy(0.7), JointJudge()),
    JudgedPolicy(ThresholdPolicy(0.6), RegretJudge(0.7)),
    JudgedPolicy(BudgetPolicy(0.3, 0.4, burst=2), RegretJudge(2.0, budget=4.0)),
    JudgedPolicy(RandomPolicy(0.3), ExactJudge()),
]


@pytest.fixture(scope="module")
def trio() -> list[PreTrainedModel]:
    base = make_model(tiny_config(), 0)
    return [base, relative_of(base, tiny_config(), 1, 0.1), relative_of(base, tiny_config(), 2, 0.2)]


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("policy", RULES, ids=lambda policy: type(policy).__name__)
def test_every_rule_equals_the_slow_loop_in_company_and_alone(
    policy: Policy, temperature: float, trio: list[PreTrainedModel], tokenizer: PreTrainedTokenizerFast, plans: Plans
) -> None:
    model = CoLLM(trio[0], trio[1:], random_head(32, 2), tokenizer)
    seed = 3 if temperature or policy.draws else None
    params = SamplingParams(max_tokens=16, temperature=temperature, seed=seed)
    prompts = prompts_of(9, 3)
    out = model.generate(prompts, params, policy=policy, max_batch=2)
    for i, (prompt, completion) in enumerate(zip(prompts, out, strict=True)):
        seeded = params if seed is None else SamplingParams(max_tokens=16, temperature=temperature, seed=seed + i)
        expected = slow_decode(trio, model.head, prompt, policy, seeded, guess=completion.token_ids)
        assert (completion.token_ids, completion.authors) == expected


@pytest.mark.soak
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10**6),
    max_batch=st.integers(1, 6),
    lookahead=st.integers(0, 9),
    max_wait=st.integers(0, 5),
    temperature=st.sampled_from([0.0, 0.0, 0.7, 1.3]),
)
def test_random_schedules_of_mixed_requests(
    seed: int,
    max_batch: int,
    lookahead: int,
    max_wait: int,
    temperature: float,
    trio: list[PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Requests of every rule join at random times, some are cancelled; what is left equals the slow loop."""
    rng = random.Random(seed)
    Plans(monkeypatch, rng)
    model = CoLLM(trio[0], trio[1:], random_head(32, 2), tokenizer)
    engine = model.engine(max_batch, lookahead, max_wait)
    shared = [rng.randrange(2, VOCAB_SIZE) for _ in range(20)]
    requests: dict[int, Any] = {}
    came: dict[int, tuple[list[int], list[int]]] = {}
    finished: set[int] = set()
    to_come = 6
    while engine.has_work or to_come:
        while to_come and rng.random() < 0.5:
            to_come -= 1
            policy = rng.choice([*RULES[:3], ThresholdPolicy(rng.random()), *RULES])
            prompt = shared[: rng.choice([0, 17, 20])] + [
                rng.randrange(2, VOCAB_SIZE) for _ in range(rng.randint(1, 9))
            ]
            drawing = temperature or policy.draws
            params = SamplingParams(rng.randint(1, 18), temperature, seed=rng.randrange(99) if drawing else None)
            number = engine.add(Request(prompt, params, policy))
            requests[number], came[number] = (prompt, params, policy), ([], [])
        for output in engine.step() if engine.has_work else []:
            assert output.failure is None
            assert output.step is not None
            came[output.number][0].append(output.step.token_id)
            came[output.number][1].append(output.step.author)
            if output.completion is not None:
                assert output.completion.token_ids == came[output.number][0]
                finished.add(output.number)
        if requests and rng.random() < 0.03:
            engine.cancel(rng.choice(list(requests)))
    for number, (prompt, params, policy) in requests.items():
        token_ids, authors = slow_decode(trio, model.head, prompt, policy, params, guess=came[number][0])
        written = len(came[number][0])
        assert came[number] == (token_ids[:written], authors[:written])
        assert written == len(token_ids) or number not in finished
    assert [author.open_slots for author in model.runners] == [0, 0, 0]


@pytest.mark.slow
def test_stop_strings_streaming_and_limits_hold_while_reading_ahead(
    trio: list[PreTrainedModel], tokenizer: PreTrainedTokenizerFast, plans: Plans
) -> None:
    model = CoLLM(trio[0], trio[1:2], random_head(32, 1), tokenizer)
    whole = model.generate([[5, 6]], SamplingParams(max_tokens=30), threshold=0.5, lookahead=0)[0]
    for stop in {text.strip() for text in whole.token_texts if text.strip()}:
        params = SamplingParams(max_tokens=30, stop=stop)
        plain = model.generate([[5, 6]], params, threshold=0.5, lookahead=0)[0]
        assert facts(model.generate([[5, 6]], params, threshold=0.5)[0]) == facts(plain)
        assert "".join(step.text for step in model.stream([5, 6], params, threshold=0.5)) == plain.text
    for limit in range(1, 12):
        out = model.generate([[5, 6]], SamplingParams(max_tokens=limit), threshold=0.5)[0]
        assert out.token_ids == whole.token_ids[:limit]


@pytest.mark.slow
def test_the_end_of_the_context_holds_while_reading_ahead(tokenizer: PreTrainedTokenizerFast, plans: Plans) -> None:
    config = tiny_config(max_position_embeddings=24, eos_token_id=None)
    base = make_model(config, 0)
    model = CoLLM(base, [relative_of(base, config, 1, 0.1)], random_head(32, 1), tokenizer)
    for length in (1, 10, 22, 23):
        out = model.generate([[5] * length], SamplingParams(max_tokens=60), threshold=0.5)[0]
        plain = model.generate([[5] * length], SamplingParams(max_tokens=60), threshold=0.5, lookahead=0)[0]
        assert facts(out) == facts(plain)
        assert length + len(out.token_ids) == 24 or out.finish_reason == "eos"
