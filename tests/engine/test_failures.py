"""Requests that fail take nothing with them: no other request, and no slot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from collm import CoLLM, DeferralHead, SamplingParams
from collm.core.combinations import MixturePolicy, ProductPolicy, ProxyTuningPolicy
from collm.core.params import StructuredOutputs
from collm.core.policies import ConfidencePolicy, Policy, StepView, ThresholdPolicy
from collm.engine.decision import Decision, Draw
from collm.engine.engine import Engine
from collm.engine.runner import ModelRunner
from collm.engine.segments import SegmentUnit
from collm.errors import ModelFailure, PolicyFailure, RequestError
from collm.text.grammars import Grammar
from tests.engine.test_batches import POISON, run
from tests.engine.test_engine import random_head
from tests.two_tokenizers import two_tokenizers, writing_model

Model = Callable[..., PreTrainedModel]
PARAMS = SamplingParams(max_tokens=8)
HEALTHY = ([5, 6], [9, 10, 11], [12])


@pytest.fixture
def trio(tiny_model: Model, tokenizer: PreTrainedTokenizerFast) -> CoLLM:
    base, assistants = tiny_model(0, eos_token_id=None), [tiny_model(seed, hidden_size=48) for seed in (1, 2)]
    base.get_output_embeddings().weight.data[POISON] = 0  # never drafted, so that no assistant reads it
    return CoLLM(base, assistants, random_head(32, 2), tokenizer)


def raise_on_poison(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = model.hidden_states

    def fails(input_ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
        if (input_ids == POISON).any():
            raise RuntimeError("device-side assert")
        return plain(input_ids, **inputs)

    monkeypatch.setattr(model, "hidden_states", fails)


def set_nan_on_poison(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.module.get_input_embeddings().weight.data[POISON] = torch.nan


def in_company(model: CoLLM, prompt: Any, policy: Policy, params: SamplingParams = PARAMS) -> Engine:
    """An engine with the healthy prompts around another one, which has number 1."""
    engine = model.engine(max_batch=5)
    for each in (HEALTHY[0], prompt, *HEALTHY[1:]):
        engine.add(model.request(each, params, policy))
    assert isinstance(engine, Engine)
    return engine


def open_slots(model: CoLLM) -> list[int]:
    return [runner.open_slots for runner in model.runners if isinstance(runner, ModelRunner)]


@pytest.mark.slow
@pytest.mark.parametrize("policy", [MixturePolicy(), ConfidencePolicy(), ProductPolicy(), ProxyTuningPolicy()], ids=str)
@pytest.mark.parametrize("failing", [(1,), (2,), (1, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("fail", [raise_on_poison, set_nan_on_poison])
def test_any_authors_that_fail_end_one_request_once(
    trio: CoLLM, failing: tuple[int, ...], fail: Callable[..., None], policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = [c.token_ids for c in trio.generate(HEALTHY, PARAMS, policy=policy)]
    for author in failing:
        fail(trio.runners[author].model, monkeypatch)
    came, failures = run(in_company(trio, [7, POISON, 8], policy))
    assert [came[number] for number in (0, 2, 3)] == good
    assert open_slots(trio) == [0, 0, 0]
    assert isinstance(failures.pop(1), ModelFailure)
    assert not failures
    assert 1 not in came


@dataclass(frozen=True)
class RaisingMixture(MixturePolicy):
    """Raises where the base is certain."""

    def combine(self, logprobs: Any, author_logprobs: torch.Tensor) -> torch.Tensor:
        if (logprobs[0].amax(-1) == 0).any():
            raise KeyError("certain")
        return super().combine(logprobs, author_logprobs)


@dataclass(frozen=True)
class NaNMixture(MixturePolicy):
    """Makes NaN where the base writes with this probability."""

    prob: float = 2.0

    def combine(self, logprobs: Any, author_logprobs: torch.Tensor) -> torch.Tensor:
        combined = super().combine(logprobs, author_logprobs)
        return combined.masked_fill((author_logprobs[:, :1].exp() - self.prob).abs() < 1e-5, torch.nan)


@dataclass(frozen=True)
class RaisingConfidence(ConfidencePolicy):
    """Raises where the base is certain."""

    def author(self, step: StepView) -> int:
        if step.top_probs[0] == 1:
            raise KeyError("certain")
        return super().author(step)


@pytest.mark.slow
@pytest.mark.parametrize("policy", [RaisingMixture(), NaNMixture(), RaisingConfidence()], ids=str)
def test_a_shared_policy_that_breaks_down_for_one_request_ends_that_one(trio: CoLLM, policy: Policy) -> None:
    good = [c.token_ids for c in trio.generate(HEALTHY, PARAMS, policy=policy)]
    if isinstance(policy, NaNMixture):
        policy = NaNMixture(prob=1 - trio.generate([8], PARAMS, policy=policy)[0].defer_probs[0])
    engine = in_company(trio, [7, 8], policy)
    certain = engine.add(trio.request([8], SamplingParams(max_tokens=4, allowed_token_ids=[9]), policy))
    came, failures = run(engine)
    assert [came[number] for number in (0, 2, 3)] == good
    assert list(failures) == [certain]
    assert isinstance(failures[certain], PolicyFailure)
    assert open_slots(trio) == [0, 0, 0]


def test_a_grammar_that_breaks_down_ends_its_request(
    byte_tokenizer: PreTrainedTokenizerFast, byte_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it is asked: about a draft, about logits, or about the end of the text."""
    model = CoLLM(byte_model, [byte_model], DeferralHead(32, 1), byte_tokenizer)
    text = "a b a b a b a b a b "
    wanted = SamplingParams(max_tokens=8, structured_outputs=StructuredOutputs(regex="[ab ]{40}"))
    (good,) = model.generate([text], PARAMS, threshold=0.4)
    plain, left = Grammar.go_to, list[int]()

    def breaks_down(grammar: Grammar, token_ids: Sequence[int]) -> None:
        left.pop()
        if not left:
            raise RequestError("the grammar cannot be enforced: too complex; use a simpler one")
        plain(grammar, token_ids)

    monkeypatch.setattr(Grammar, "go_to", breaks_down)
    for calls in range(1, 12):
        left[:] = range(calls)
        engine = model.engine()
        for params in (PARAMS, wanted):
            engine.add(model.request(text, params, ThresholdPolicy(0.4)))
        assert isinstance(engine, Engine)
        came, failures = run(engine)
        assert came[0] == good.token_ids
        assert list(failures) == [1]
        assert open_slots(model) == [0, 0]


def test_an_assistant_that_cannot_be_asked_ends_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    base, assistant = two_tokenizers()
    models = writing_model(base, 1), writing_model(assistant, 2, hidden_size=48)
    model = CoLLM(models[0], [models[1]], DeferralHead(32, 1), base, tokenizers=[assistant])
    good = [c.token_ids for c in model.generate(["the", "a river", "miles"], PARAMS, threshold=-1.0)]
    plain = SegmentUnit.resolve

    def fails(segments: SegmentUnit, decision: Decision, draw: Draw | None) -> None:
        if segments.sequence.number == 1:
            raise RuntimeError("no such text")
        plain(segments, decision, draw)

    monkeypatch.setattr(SegmentUnit, "resolve", fails)
    engine = model.engine()
    for prompt in ("the", "a river", "miles"):
        engine.add(model.request(prompt, PARAMS, ThresholdPolicy(-1.0)))
    assert isinstance(engine, Engine)
    came, failures = run(engine)
    assert [came[0], came[2]] == good[::2]
    assert list(failures) == [1]
    assert open_slots(model) == [0, 0]


def test_an_author_without_a_free_slot_ends_the_requests_that_need_one(
    trio: CoLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = [c.token_ids for c in trio.generate(HEALTHY, PARAMS, policy=MixturePolicy())]
    opened = trio.runners[2].open

    def refuses(token_ids: Sequence[int] = ()) -> int:
        if not token_ids or POISON in token_ids:
            raise RequestError("assistant-2 has no free slot")
        return opened(token_ids)

    monkeypatch.setattr(trio.runners[2], "open", refuses)
    came, failures = run(in_company(trio, [7, POISON, 8], MixturePolicy()))
    assert [came[number] for number in (0, 2, 3)] == good
    assert list(failures) == [1]
    with pytest.raises(RequestError, match="no free slot"):
        trio.prompt_logprobs([7, POISON, 8])
    assert open_slots(trio) == [0, 0, 0]
