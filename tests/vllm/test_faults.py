"""An assistant that fails is an error or a stand-in, as chosen; a base that fails ends its requests; nobody else's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from collm import CoLLM, SamplingParams
from collm.core.policies import Policy, SingleAuthorPolicy, ThresholdPolicy
from collm.engine.engine import RequestOutput
from collm.engine.request import Request
from collm.errors import ModelFailure
from collm.http.client import COOLS_S, TRIPS_AFTER, CircuitBreaker
from tests.engine.test_engine import prompts_of
from tests.vllm.conftest import Cluster
from tests.vllm.fake import DOWN, HANG, FakeVllm, Fault, refusal
from tests.vllm.test_engine import check_equal

Clusters = Callable[..., Cluster]
GREEDY = SamplingParams(max_tokens=16)
(PROMPT,) = prompts_of(21, 1)

FAILURES = {
    "down": DOWN,
    "slow": HANG,
    "overloaded": refusal(429, Retry_After="1"),
    "unavailable": refusal(503),
    "broken": refusal(500),
    "refusing": refusal(400, "too long"),
    "garbage": Fault(status=200, text="<html>"),
    "another model": Fault(change=lambda choice: {**choice, "token_ids": [4096]}),
}


def decode(model: CoLLM, *requests: tuple[list[int], Policy], max_batch: int = 8) -> list[list[RequestOutput]]:
    """What became of each request."""
    engine = model.engine(max_batch)
    numbers = [engine.add(Request(prompt, GREEDY, policy)) for prompt, policy in requests]
    outputs: list[RequestOutput] = []
    while engine.has_work:
        outputs += engine.step()
    return [[output for output in outputs if output.number == number] for number in numbers]


def base_alone(world: Cluster, prompt: list[int]) -> list[int]:
    return list(world.members.local.generate([prompt], GREEDY, threshold=1.0)[0].token_ids)


@pytest.mark.parametrize("name", FAILURES)
def test_an_assistant_that_fails_ends_the_request_with_an_error_that_names_it(cluster: Clusters, name: str) -> None:
    world = cluster()
    model = world.connect(retries=1, timeout_s=1.0 if name == "slow" else 20.0)
    (expected,) = world.members.local.generate([PROMPT], GREEDY, threshold=0.5)
    world.fakes[1].always = lambda body: FAILURES[name]
    ((*steps, last),) = decode(model, (PROMPT, ThresholdPolicy(0.5)))
    first = expected.authors.index(1)
    assert [output.step.token_id for output in steps if output.step] == expected.token_ids[:first]
    assert isinstance(last.failure, ModelFailure)
    assert str(last.failure).startswith(f"assistant at {world.fakes[1].url} ")
    assert "; check" in str(last.failure)
    attempts = 1 if name == "refusing" else 2
    assert (len(world.fakes[1].bodies), len(world.pauses)) == (attempts, attempts - 1)
    assert model.backend.connections.authors[1].usage.failed == 1
    with pytest.raises(ModelFailure, match="assistant at"):
        model.generate([PROMPT], GREEDY, threshold=0.5)


@pytest.mark.parametrize("name", FAILURES)
def test_the_base_stands_in_where_that_was_chosen(cluster: Clusters, name: str) -> None:
    world = cluster()
    model = world.connect(on_failure="base", retries=1, timeout_s=1.0 if name == "slow" else 20.0)
    world.fakes[1].always = lambda body: FAILURES[name]
    out = model.generate([PROMPT], GREEDY, threshold=0.5)
    assert out[0].token_ids == base_alone(world, PROMPT)
    assert set(out[0].authors) == {0}
    deferred = [place for place, defer_prob in enumerate(out[0].defer_probs) if defer_prob > 0.5]
    assert out[0].stood_in == deferred
    assert len(deferred) > TRIPS_AFTER
    usage = out.usage["assistant"]
    assert (usage.failed, usage.tokens_written) == (len(deferred), 0)
    attempts = 1 if name == "refusing" else 2
    assert len(world.fakes[1].bodies) == usage.calls == TRIPS_AFTER * attempts  # then nobody asks any more
    steps = list(model.stream(PROMPT, GREEDY, threshold=0.5))
    assert [place for place, step in enumerate(steps) if step.stood_in] == deferred


def test_an_assistant_alone_is_stood_in_for_too(cluster: Clusters) -> None:
    world = cluster()
    model = world.connect(on_failure="base", retries=0)
    (whole,) = world.members.local.generate([PROMPT], GREEDY, policy=SingleAuthorPolicy(1))
    world.fakes[1].faults = [Fault(after=5), refusal(500)]
    (out,) = model.generate([PROMPT], GREEDY, policy=SingleAuthorPolicy(1))
    assert out.token_ids[:5] == whole.token_ids[:5]
    assert out.stood_in == [5, 6][: len(out.stood_in)] != []
    assert out.authors == [0 if place in out.stood_in else 1 for place in range(16)]
    world.fakes[1].always = lambda body: DOWN
    with pytest.raises(ModelFailure, match="assistant at"):
        world.connect(retries=0).generate([PROMPT], GREEDY, policy=SingleAuthorPolicy(1))


def test_one_that_comes_back_writes_again(cluster: Clusters) -> None:
    world = cluster()
    now = [0.0]
    model = world.connect(on_failure="base", retries=0)
    model.backend.connections.authors[1].http.breaker = CircuitBreaker(clock=lambda: now[0])
    expected = world.members.local.generate([PROMPT], GREEDY, threshold=0.5)[0]
    world.fakes[1].down()
    assert model.generate([PROMPT], GREEDY, threshold=0.5)[0].stood_in
    world.fakes[1].up()
    assert model.generate([PROMPT], GREEDY, threshold=0.5)[0].authors == [0] * 16  # left alone still
    now[0] += COOLS_S
    check_equal(model.generate([PROMPT], GREEDY, threshold=0.5)[0], expected)


@pytest.mark.parametrize("name", ["down", "overloaded", "broken", "garbage", "another model"])
def test_what_passes_within_the_retries_leaves_no_trace(cluster: Clusters, name: str) -> None:
    world = cluster()
    model = world.connect(retries=2)
    for fake in world.fakes:
        fake.faults = [FAILURES[name]] * 2
    expected = world.members.local.generate([PROMPT], GREEDY, threshold=0.5)[0]
    out = model.generate([PROMPT], GREEDY, threshold=0.5)
    check_equal(out[0], expected)
    assert [usage.failed for usage in out.usage.values()] == [0, 0]


# The base


@pytest.mark.parametrize("on_failure", ["fail", "base"])
@pytest.mark.parametrize("name", FAILURES)
def test_a_base_that_fails_ends_its_request_and_no_other(cluster: Clusters, name: str, on_failure: str) -> None:
    world = cluster()
    model = world.connect(on_failure=on_failure, retries=1, timeout_s=1.0 if name == "slow" else 20.0)
    prompts = prompts_of(22, 5)
    poisoned = prompts[2]

    def fails(body: dict[str, Any]) -> Fault | None:
        return FAILURES[name] if body["prompt"][: len(poisoned)] == poisoned else None

    world.fakes[0].always = fails
    expected = world.members.local.generate(prompts, GREEDY, threshold=0.5)
    fates = decode(model, *((prompt, ThresholdPolicy(0.5)) for prompt in prompts))
    for place, (fate, whole) in enumerate(zip(fates, expected, strict=True)):
        if place == 2:
            assert len(fate) == 1
            assert str(fate[0].failure).startswith(f"base at {world.fakes[0].url} ")
        else:
            assert fate[-1].completion is not None
            check_equal(fate[-1].completion, whole)
    assert model.backend.connections.authors[1].usage.failed == 0


def test_a_base_that_goes_down_in_the_middle_is_an_error_after_what_was_written(cluster: Clusters) -> None:
    world = cluster(pieces=(1,))
    model = world.connect(retries=1)
    world.fakes[0].faults = [Fault(after=5, then="hang")]
    steps = model.stream(PROMPT, GREEDY, threshold=1.0)
    written = [next(steps).token_id for _ in range(5)]
    world.fakes[0].down()
    with pytest.raises(ModelFailure, match=r"base at .* failed 2 times, the last time: ConnectError"):
        next(steps)
    assert written == base_alone(world, PROMPT)[:5]


def test_a_stand_in_needs_the_base(cluster: Clusters) -> None:
    world = cluster()
    model = world.connect(on_failure="base", retries=0)
    world.fakes[1].always = lambda body: DOWN

    def falls_with_it(body: dict[str, Any]) -> Fault | None:
        return DOWN if world.fakes[1].bodies else None

    world.fakes[0].always = falls_with_it
    with pytest.raises(ModelFailure, match="base at"):
        model.generate([PROMPT], GREEDY, threshold=0.5)


# Company


@pytest.mark.parametrize("name", ["broken", "refusing", "garbage", "another model"])
def test_a_text_that_an_assistant_cannot_bear_harms_no_other(cluster: Clusters, name: str) -> None:
    world = cluster()
    model = world.connect(on_failure="base", retries=0)
    poisoned, *others = prompts_of(23, 4)

    def fails(body: dict[str, Any]) -> Fault | None:
        return FAILURES[name] if body["prompt"][: len(poisoned)] == poisoned else None

    world.fakes[1].always = fails
    (out,) = model.generate([poisoned], GREEDY, threshold=0.5)
    assert len(out.stood_in) > TRIPS_AFTER
    assert len(world.fakes[1].bodies) == TRIPS_AFTER
    expected = world.members.local.generate(others, GREEDY, threshold=0.5)
    fates = decode(model, *((prompt, ThresholdPolicy(0.5)) for prompt in [poisoned, *others]))
    for fate, whole in zip(fates[1:], expected, strict=True):
        assert fate[-1].completion is not None
        check_equal(fate[-1].completion, whole)


def test_one_assistant_of_two_that_is_down_leaves_the_other_at_work(cluster: Clusters) -> None:
    world = cluster(2)
    model = world.connect(on_failure="base", retries=0)
    prompts = prompts_of(24, 4)
    world.fakes[2].down()
    out = model.generate(prompts, GREEDY, threshold=0.4)
    assert {author for one in out for author in one.authors} == {0, 1}
    assert out.usage["assistant-2"].failed == sum(len(one.stood_in) for one in out) > 0
    assert out.usage["assistant"].failed == 0


def test_a_fault_of_our_own_fails_its_request_and_no_other(cluster: Clusters, monkeypatch: pytest.MonkeyPatch) -> None:
    world = cluster()
    model = world.connect()
    prompts = prompts_of(25, 2)
    endpoint = model.backend.connections.authors[0]
    stream = endpoint.stream

    def raising(body: dict[str, Any], **options: Any) -> Any:
        if body["prompt"] == prompts[0]:
            raise ZeroDivisionError("a bug")
        return stream(body, **options)

    monkeypatch.setattr(endpoint, "stream", raising)
    bad, good = decode(model, *((prompt, ThresholdPolicy(0.5)) for prompt in prompts))
    assert str(bad[0].failure) == "decoding across servers failed: ZeroDivisionError: a bug"
    assert good[-1].completion is not None


def test_slow_pieces_are_waited_for(cluster: Clusters) -> None:
    world = cluster(pieces=(1,))
    model = world.connect()
    base: FakeVllm = world.fakes[0]
    base.hold()
    engine = model.engine(1)
    engine.add(Request(PROMPT, GREEDY, ThresholdPolicy(1.0)))
    engine.step()
    base.wait_until(lambda: base.running == 1)
    assert [engine.step() for _ in range(5)] == [[]] * 5
    base.let_go()
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert [output.step.token_id for output in outputs if output.step] == base_alone(world, PROMPT)
    assert len(base.bodies) == 1
