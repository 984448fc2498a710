"""Tools decode like models: in any company, whatever is read ahead, the tokens are those of the slow loop."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from collm import CoLLM, SamplingParams, ToolSpec
from collm.core.combinations import ContrastivePolicy, MixturePolicy, ProductPolicy
from collm.core.policies import (
    BudgetPolicy,
    ConfidencePolicy,
    JointPolicy,
    OraclePolicy,
    Policy,
    SingleAuthorPolicy,
    ThresholdPolicy,
)
from collm.core.types import Completion
from collm.models.assistant import ModelOutput
from collm.models.tools import ToolModel, ToolRunner
from collm.tools.calls import in_process
from tests.architectures import ARCHITECTURES, EXACT
from tests.engine.slow import slow_decode
from tests.engine.test_engine import prompts_of, random_head
from tests.engine.test_exactness import Plans
from tests.tiny_models import make_model, tiny_config

TOOL = ToolSpec("calculator", eps=0.05)


def knows(text: str) -> str | None:
    """Three words after every word whose number is 0 or 1 modulo 5."""
    word = text.rsplit(" ", 1)[-1]
    number = int(word[1:]) if word[:1] == "w" and word[1:].isdigit() else 2
    return f" w{number * 7 % 94} w{number * 11 % 94} w{number * 13 % 94}" if number % 5 < 2 else None


def knows_always(text: str) -> str:
    """A word after every word."""
    return f" w{len(text) * 7 % 94}"


@pytest.fixture(params=["tool", "model and tool", "tool and model", "two tools"])
def company(request: Any, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> tuple[CoLLM, list]:
    """A collaboration, and what the slow loop runs."""
    monkeypatch.setattr("collm.models.tools.open_tool", lambda spec: in_process(knows))
    members: list[Any] = {
        "tool": [TOOL],
        "model and tool": [make_model(tiny_config(), 1), TOOL],
        "tool and model": [TOOL, make_model(tiny_config(), 1)],
        "two tools": [TOOL, replace(TOOL, eps=0.5, max_answer=4)],
    }[request.param]
    base = make_model(tiny_config(), 0)
    model = CoLLM(base, members, random_head(32, len(members)), tokenizer)
    slow = [m if isinstance(m, PreTrainedModel) else ToolModel(m, tokenizer, name="", vocab_size=97) for m in members]
    return model, [base, *slow]


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> Plans:
    return Plans(monkeypatch, random.Random(0))


def by_hand(
    company: tuple[CoLLM, list], prompts: list, params: SamplingParams, policies: list[Policy], out: list[Completion]
) -> list:
    model, slow = company
    return [
        slow_decode(slow, model.head, prompt, policy, seeded(params, i), guess=completion.token_ids)
        for i, (prompt, policy, completion) in enumerate(zip(prompts, policies, out, strict=True))
    ]


def seeded(params: SamplingParams, i: int) -> SamplingParams:
    return replace(params, seed=i) if params.temperature else params


def of(completions: list[Completion]) -> list:
    return [(completion.token_ids, completion.authors) for completion in completions]


POLICIES: list[Policy] = [
    ThresholdPolicy(-1),
    ThresholdPolicy(0.4),
    BudgetPolicy(0.3, threshold=0.2),
    SingleAuthorPolicy(1),
    JointPolicy(),
    MixturePolicy(),
    ProductPolicy(),
    ContrastivePolicy(),
    ConfidencePolicy(),
    OraclePolicy((7, 8, 9, 10, 11)),
]


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_every_policy_equals_the_slow_loop(company: tuple[CoLLM, list], plans: Plans, temperature: float) -> None:
    params = SamplingParams(max_tokens=20, temperature=temperature, seed=0 if temperature else None)
    prompts = prompts_of(3, len(POLICIES))
    out = company[0].generate(prompts, params, policy=POLICIES, max_batch=4)
    expected = by_hand(company, prompts, params, POLICIES, out)
    assert of(out) == expected
    alone = [
        company[0].generate(prompt, seeded(params, i), policy=policy)[0]
        for i, (prompt, policy) in enumerate(zip(prompts, POLICIES, strict=True))
    ]
    assert of(alone) == expected
    assert any(0 in authors and {1, 2} & set(authors) for _, authors in expected)


def test_a_tool_that_always_knows_is_a_one_hot_language_model(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine sees nothing of it but logits, and samples its eps as any model's."""
    monkeypatch.setattr("collm.models.tools.open_tool", lambda spec: in_process(knows_always))
    model = CoLLM(make_model(tiny_config(), 0), [replace(TOOL, eps=0.5)], random_head(32, 1), tokenizer)
    params = SamplingParams(max_tokens=30, temperature=1.0, seed=3)
    out = of(model.generate(prompts_of(5, 4), params, policy="joint"))
    tool = next(author for author in model.runners if isinstance(author, ToolRunner))
    extend = tool.extend
    monkeypatch.setattr(tool, "may_abstain", False)
    monkeypatch.setattr(tool, "extend", lambda *args: ModelOutput(extend(*args).logits))
    assert of(model.generate(prompts_of(5, 4), params, policy="joint")) == out
    written = [token for token_ids, authors in out for token, author in zip(token_ids, authors, strict=True) if author]
    assert len(set(written)) > 10


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tools_help_any_architecture(name: str, tokenizer: PreTrainedTokenizerFast, plans: Plans) -> None:
    base = make_model(EXACT[name](), 0)
    model = CoLLM(base, [TOOL], random_head(32, 1), tokenizer)
    for runner in model.runners[1:]:
        runner.model._tool = in_process(knows)  # type: ignore[union-attr]
    tool = model.runners[1].model
    params = SamplingParams(max_tokens=16)
    prompts = prompts_of(11, 3)
    policy = ThresholdPolicy(0.5)
    out = model.generate(prompts, params, policy=policy, max_batch=2)
    assert of(out) == [
        slow_decode([base, tool], model.head, prompt, policy, params, guess=completion.token_ids)  # type: ignore[list-item]
        for prompt, completion in zip(prompts, out, strict=True)
    ]


@pytest.mark.slow
def test_calls_are_counted_and_cost_no_forward_pass(company: tuple[CoLLM, list]) -> None:
    model, _ = company
    params = SamplingParams(max_tokens=25)
    out = model.generate(prompts_of(3, 4), params, threshold=-1, lookahead=0)
    written = sum(map(len, (completion.authors for completion in out)))
    tools = [used for name, used in out.usage.items() if name != "base" and not used.forward_passes]
    assert sum(used.calls for used in out.usage.values()) == sum(used.calls for used in tools)
    asked = sum(used.calls - used.abstained + used.tokens_read * 0 for used in tools)
    by_tools = sum(used.tokens_written for used in tools)
    assert asked == by_tools > 0
    abstained = sum(used.abstained for used in tools)
    by_base = sum(author == 0 for completion in out for author in completion.authors)
    assert abstained == by_base == out.usage["base"].tokens_written
    assert written == sum(used.tokens_written for used in out.usage.values())
    assert not any(used.failed for used in out.usage.values())


def test_a_tool_that_fails_leaves_the_text_to_the_base(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    base = make_model(tiny_config(), 0)
    model = CoLLM(base, [ToolSpec("tests.tools.functions:failing")], random_head(32, 1), tokenizer)
    prompt = prompts_of(3, 1)[0]
    out = model.generate([prompt], SamplingParams(max_tokens=6), threshold=-1, lookahead=0)
    alone = model.generate([prompt], SamplingParams(max_tokens=6), threshold=1)
    assert out[0].token_ids == alone[0].token_ids
    assert out.usage["assistant"].failed == 6
    assert "raised ValueError: always" in caplog.text
