"""Across servers as in memory: the same tokens by the same authors, in as few requests as can be."""

from __future__ import annotations

import gc
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from collm import CoLLM, SamplingParams
from collm.core.policies import (
    BudgetPolicy,
    JointPolicy,
    Policy,
    RandomPolicy,
    ScheduledPolicy,
    SingleAuthorPolicy,
    ThresholdPolicy,
)
from collm.core.sampling import token_probs
from collm.core.types import Completion
from collm.engine.request import Request
from collm.errors import ConfigError, RequestError
from tests.engine.test_engine import prompts_of
from tests.vllm.conftest import Cluster, Members, make_members

Clusters = Callable[..., Cluster]
GREEDY = SamplingParams(max_tokens=24)


def check_equal(ours: Completion, expected: Completion, *, defer_probs: bool = True) -> None:
    for name in ("text", "token_ids", "token_texts", "authors", "finish_reason", "prompt_token_ids", "stood_in"):
        assert getattr(ours, name) == getattr(expected, name), name
    assert ours.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
    if defer_probs:
        assert ours.defer_probs == pytest.approx(expected.defer_probs, abs=1e-4)


def check_all_equal(ours: Iterable[Completion], expected: Iterable[Completion]) -> None:
    for one, other in zip(ours, expected, strict=True):
        check_equal(one, other)


def check_drawn(token_ids: torch.Tensor, law: torch.Tensor) -> None:
    """In total variation n draws stray from their law by sum_x sqrt(p_x (1 - p_x) / (2 pi n)) on average, and by
    sqrt(log(1000) / 2n) more in less than one case of a thousand (McDiarmid).
    """
    draws = len(token_ids)
    seen = torch.bincount(token_ids, minlength=len(law)) / draws
    usual = float((law * (1 - law) / (2 * math.pi * draws)).sqrt().sum())
    assert float((seen - law).abs().sum()) / 2 < usual + math.sqrt(math.log(1000) / 2 / draws)
    assert not seen[law == 0].any()


@pytest.mark.parametrize("k", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_greedy_equals_the_models_in_memory_for_mixed_thresholds_at_once(cluster: Clusters, k: int) -> None:
    world = cluster(k)
    policies: list[Policy] = [ThresholdPolicy(eta) for eta in (-1.0, -0.01, 0.0, 0.2, 0.5, 0.8, 1.0)]
    policies += [SingleAuthorPolicy(author) for author in range(k + 1)]
    policies += [BudgetPolicy(0.2, 0.3), BudgetPolicy(0.0, 0.3, burst=2), RandomPolicy(0.3)]
    policies += [ScheduledPolicy(0.1, 0.9, 8)]
    prompts = prompts_of(4, len(policies))
    params = [replace(GREEDY, seed=place if policy.draws else None) for place, policy in enumerate(policies)]
    expected = world.members.local.generate(prompts, params, policy=policies)
    out = world.connect().generate(prompts, params, policy=policies, max_batch=6)
    for ours, theirs, policy in zip(out, expected, policies, strict=True):
        alone = isinstance(policy, SingleAuthorPolicy) and policy.writer != 0
        check_equal(ours, theirs, defer_probs=not alone)
        assert not alone or set(ours.defer_probs) == {1.0}
    assert {author for one in out for author in one.authors} == set(range(k + 1))


def test_stop_strings_cut_the_same_text_wherever_a_piece_ends(cluster: Clusters) -> None:
    world = cluster(pieces=(2, 5))
    prompts = prompts_of(5, 6)
    local, remote = world.members.local, world.connect()
    whole = local.generate(prompts, GREEDY, threshold=0.5)
    assert len({author for one in whole for author in one.authors}) == 2
    stops = [one.text[place : place + 7] for place, one in enumerate(whole, start=20)]  # across tokens
    params = [SamplingParams(max_tokens=24, stop=[stop, "never"]) for stop in stops]
    expected = local.generate(prompts, params, threshold=0.5)
    assert {one.finish_reason for one in expected} == {"stop"}
    check_all_equal(remote.generate(prompts, params, threshold=0.5), expected)
    world.fakes[0].wait_until(lambda: not world.fakes[0].running)


def test_an_end_token_of_either_author_ends_the_text(cluster: Clusters, monkeypatch: pytest.MonkeyPatch) -> None:
    world = cluster()
    prompts = prompts_of(6, 8)
    free = world.members.local.generate(prompts, GREEDY, threshold=0.5)
    written = [pair for one in free for pair in zip(one.authors, one.token_ids, strict=True)]
    eos = [Counter(token for author, token in written if author == z).most_common(1)[0][0] for z in (0, 1)]
    for model in world.members.models:
        monkeypatch.setattr(model.generation_config, "eos_token_id", eos)
    expected = world.members.local.generate(prompts, GREEDY, threshold=0.5)
    enders = {one.authors[-1] for one in expected if one.finish_reason == "eos"}
    assert enders == {0, 1}
    check_all_equal(world.connect().generate(prompts, GREEDY, threshold=0.5), expected)


@pytest.mark.parametrize("max_tokens", [1, 2, 7, 500])
def test_limits_of_request_and_context_are_the_same(cluster: Clusters, max_tokens: int) -> None:
    world = cluster()
    prompts = [*prompts_of(7, 1), [5] * 126, [6] * 127]
    params = SamplingParams(max_tokens=max_tokens)
    remote = world.connect()
    for threshold in (-1.0, 0.5, 1.0):
        expected = world.members.local.generate(prompts, params, threshold=threshold)
        assert {one.finish_reason for one in expected} <= {"length", "eos"}
        check_all_equal(remote.generate(prompts, params, threshold=threshold), expected)
    with pytest.raises(RequestError, match="is 128 tokens including its output"):
        remote.generate([[5] * 128], params, threshold=0.5)


def test_a_padded_base_writes_the_same(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, cluster: Clusters) -> None:
    world = cluster()
    world.members = make_members(tokenizer, tmp_path / "out", 1, vocab_size=len(tokenizer) + 31)
    world.fakes.clear()
    expected = world.members.local.generate(prompts_of(8, 4), GREEDY, threshold=0.5)
    check_all_equal(world.serve().connect().generate(prompts_of(8, 4), GREEDY, threshold=0.5), expected)


def test_a_stream_says_what_generate_says(cluster: Clusters) -> None:
    model = cluster().connect()
    for prompt in prompts_of(9, 3):
        (whole,) = model.generate([prompt], GREEDY, threshold=0.5)
        steps = list(model.stream(prompt, GREEDY, threshold=0.5))
        assert [step.token_id for step in steps] == whole.token_ids
        assert "".join(step.text for step in steps) == whole.text
        assert [step.author for step in steps] == whole.authors


@pytest.mark.parametrize("threshold", [-1.0, 0.3, 0.5, 0.7, 1.0])
def test_two_requests_for_each_deferral_and_one_more(cluster: Clusters, threshold: float) -> None:
    world = cluster()
    model = world.connect()
    base, assistant = world.fakes
    for prompt in prompts_of(10, 4):
        base.bodies.clear()
        assistant.bodies.clear()
        out = model.generate([prompt], GREEDY, threshold=threshold)
        deferrals = sum(author != 0 for author in out[0].authors)
        assert len(assistant.bodies) == deferrals
        assert len(base.bodies) <= deferrals + 1
        assert all(body["max_tokens"] == 1 for body in assistant.bodies)
        assert [out.usage[name].calls for name in ("base", "assistant")] == [len(base.bodies), len(assistant.bodies)]
        assert all(body["prompt"] == [*prompt, *out[0].token_ids][: len(body["prompt"])] for body in base.bodies)


def test_usage_counts_what_was_new_and_what_was_written(cluster: Clusters) -> None:
    world = cluster()
    (prompt,) = prompts_of(11, 1)
    out = world.connect().generate([prompt], GREEDY, threshold=0.5)
    authors = out[0].authors
    base, assistant = out.usage["base"], out.usage["assistant"]
    assert (base.tokens_written, assistant.tokens_written) == (authors.count(0), authors.count(1)) != (0, 24)
    assert (base.forward_passes, assistant.forward_passes) == (24, authors.count(1))  # a deferral is a pass as well
    last = max(place for place, author in enumerate(authors) if author == 1)
    assert assistant.tokens_read == len(prompt) + last - (authors.count(1) - 1)  # all before it but its own
    resumed = authors.count(1) - (authors[-1] == 1)
    assert base.tokens_read == len(prompt) + resumed
    assert (base.failed, assistant.failed) == (0, 0)


def test_connections_are_kept_for_further_requests(cluster: Clusters) -> None:
    world = cluster()
    model = world.connect()
    out = model.generate(prompts_of(12, 6), GREEDY, threshold=0.5, max_batch=1)
    assert min(sum(use.calls for use in out.usage.values()), 20) == 20
    assert [fake.connections for fake in world.fakes] == [1, 1]


# Sampling


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [
        (1.0, 1.0, 0),
        pytest.param(0.6, 1.0, 6, marks=pytest.mark.soak),
        pytest.param(1.5, 0.7, 0, marks=pytest.mark.soak),
        (1.2, 0.8, 9),
    ],
)
def test_tokens_are_drawn_by_the_law_of_their_author(
    cluster: Clusters, temperature: float, top_p: float, top_k: int
) -> None:
    world = cluster()
    draws = 300
    params = SamplingParams(max_tokens=1, temperature=temperature, top_p=top_p, top_k=top_k, seed=1)
    (prompt,) = prompts_of(13, 1)
    model = world.connect()
    for author, policy in enumerate([ThresholdPolicy(1.0), ThresholdPolicy(-1.0)]):
        out = model.generate([prompt] * draws, params, policy=policy)
        assert all(one.authors == [author] for one in out)
        logits = world.members.served[author].logits(prompt)[-1][: model.identity.vocab_size]
        law = token_probs(logits, temperature, top_p, top_k).double()
        check_drawn(torch.tensor([one.token_ids[0] for one in out]), law)


def test_a_seed_gives_the_same_text_whatever_runs_beside_it(cluster: Clusters) -> None:
    world = cluster(pieces=(1, 4))
    model = world.connect()
    prompts = prompts_of(14, 6)
    params = [SamplingParams(max_tokens=16, temperature=1.0, seed=seed) for seed in (3, 3, 4, 5, 6, 7)]
    together = model.generate(prompts, params, threshold=0.5)
    assert len({author for one in together for author in one.authors}) == 2
    for place in (5, 0, 3):
        (alone,) = model.generate(prompts[place], params[place], threshold=0.5)
        assert (alone.token_ids, alone.authors) == (together[place].token_ids, together[place].authors)
    (other,) = model.generate(prompts[0], SamplingParams(max_tokens=16, temperature=1.0, seed=8), threshold=0.5)
    assert other.token_ids != together[0].token_ids
    bodies = [body for fake in world.fakes for body in fake.bodies if body["prompt"][: len(prompts[4])] == prompts[4]]
    assert len({body["seed"] for body in bodies}) == len(bodies) > 2  # each call draws on its own


# Requests that come and go


def test_a_request_cancelled_while_it_waits_is_never_sent(cluster: Clusters) -> None:
    world = cluster()
    model, (base, _) = world.connect(), world.fakes
    engine = model.engine(1)
    first, second = (engine.add(Request(prompt, GREEDY, ThresholdPolicy(1.0))) for prompt in prompts_of(16, 2))
    engine.cancel(second)
    numbers = {output.number for _ in iter(lambda: engine.has_work, False) for output in engine.step()}
    assert numbers == {first}
    assert len(base.bodies) == 1


@pytest.mark.parametrize("steps", [0, 1, 2, 5, 12, 40])
def test_a_request_can_be_cancelled_at_any_time(cluster: Clusters, steps: int) -> None:
    world = cluster()
    model = world.connect()
    prompts = prompts_of(26, 3)
    expected = world.members.local.generate(prompts[1:], GREEDY, threshold=0.5)
    engine = model.engine(3)
    dropped, *kept = (engine.add(Request(prompt, GREEDY, ThresholdPolicy(0.5))) for prompt in prompts)
    outputs = [output for _ in range(steps) for output in engine.step()]
    engine.cancel(dropped)
    engine.cancel(dropped)
    engine.cancel(99)
    later = [output for _ in iter(lambda: engine.has_work, False) for output in engine.step()]
    assert dropped not in {output.number for output in later}
    done = {output.number: output.completion for output in outputs + later if output.completion is not None}
    for number, whole in zip(kept, expected, strict=True):
        check_equal(done[number], whole)


def test_a_stream_that_is_left_leaves_nothing_running(cluster: Clusters) -> None:
    world = cluster()
    model, (base, _) = world.connect(), world.fakes
    (prompt,) = prompts_of(17, 1)
    steps = model.stream(prompt, SamplingParams(max_tokens=100), threshold=1.0)
    next(steps)
    base.hold()
    steps.close()
    base.wait_until(lambda: [body["prompt"] for body in base.abandoned] == [prompt] and not base.running)


@pytest.mark.parametrize("max_batch", [1, 3])
def test_no_more_requests_run_than_allowed(cluster: Clusters, max_batch: int) -> None:
    world = cluster()
    model, base = world.connect(), world.fakes[0]
    base.hold()
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(model.generate, prompts_of(18, 9), GREEDY, threshold=0.5, max_batch=max_batch)
        base.wait_until(lambda: base.running == max_batch)
        base.let_go()
        assert len(done.result()) == 9
    assert max(fake.most_running for fake in world.fakes) == max_batch


def test_many_at_once_are_all_answered(cluster: Clusters) -> None:
    world = cluster()
    prompts = prompts_of(19, 60)
    short = SamplingParams(max_tokens=6)
    expected = world.members.local.generate(prompts, short, threshold=0.5)
    out = world.connect().generate(prompts, short, threshold=0.5, max_batch=60)
    assert [one.token_ids for one in out] == [one.token_ids for one in expected]


# What cannot be followed, and the end


def test_what_servers_cannot_follow_is_refused(cluster: Clusters) -> None:
    model = cluster().connect()
    with pytest.raises(ConfigError, match="cannot be followed across servers"):
        model.generate([[5]], GREEDY, policy=JointPolicy())
    with pytest.raises(ConfigError, match="author 2, expected 0 to 1"):
        model.generate([[5]], GREEDY, policy=SingleAuthorPolicy(2))
    with pytest.raises(ConfigError, match="logprobs is not available"):
        model.generate([[5]], SamplingParams(logprobs=2), threshold=0.5)
    with pytest.raises(ConfigError, match="which servers raise"):
        model.generate([[5]], SamplingParams(temperature=0.005), threshold=0.5)
    with pytest.raises(ConfigError, match="lookahead=3"):
        model.generate([[5]], GREEDY, threshold=0.5, lookahead=3)
    with pytest.raises(ConfigError, match="max_batch is 0"):
        model.engine(0)
    with pytest.raises(RequestError, match="outside the vocabulary"):
        model.generate([[97]], GREEDY, threshold=0.5)


def test_nothing_is_left_to_the_generation_config_of_a_served_model(cluster: Clusters) -> None:
    world = cluster()
    model = world.connect()
    model.generate([[5]], SamplingParams(max_tokens=3, temperature=1.0), threshold=0.5)
    for body in [body for fake in world.fakes for body in fake.bodies]:
        neutral = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_p": 0.0}
        assert body.items() >= {**neutral, "ignore_eos": True, "top_p": 1.0, "top_k": 0}.items()


def test_candidates_are_those_of_the_models_in_memory(cluster: Clusters) -> None:
    world = cluster()
    (prompt,) = prompts_of(20, 1)
    model, local = world.connect(), world.members.local
    (out,) = local.generate(prompt, SamplingParams(max_tokens=5), threshold=0.5)
    ours, theirs = (each.candidates(prompt, out.token_ids, 3) for each in (model, local))
    for place in range(5):
        for author in (0, 1):
            mine, expected = ours[place][author], theirs[place][author]
            assert [text for text, _ in mine] == [text for text, _ in expected]
            ratio = mine[0][1] / expected[0][1]
            assert [p for _, p in mine] == pytest.approx([p * ratio for _, p in expected], rel=1e-3)
            assert ratio <= 1.001 if author == 0 else ratio == pytest.approx(1, rel=1e-3)
    assert model.candidates(prompt, [], 3) == []


def test_connections_end_when_closed_or_forgotten(cluster: Clusters, members: Callable[[int], Members]) -> None:
    world = cluster()

    before = set(threading.enumerate())

    def threads() -> int:
        return sum(thread.name == "collm-http" for thread in set(threading.enumerate()) - before)

    model = world.connect()
    connections = model.backend.connections
    assert threads() == 1
    engine = model.engine(2)
    world.fakes[0].hold()
    engine.add(Request([5], GREEDY, ThresholdPolicy(1.0)))
    engine.step()
    world.fakes[0].wait_until(lambda: world.fakes[0].running == 1)
    connections.close()
    connections.close()
    assert threads() == 0
    world.fakes[0].wait_until(lambda: not world.fakes[0].running)
    world.fakes[0].let_go()
    (last,) = engine.step()
    assert "closed during decoding" in str(last.failure)
    assert not engine.has_work
    with pytest.raises(ConfigError, match="connections to the servers were closed"):
        model.generate([[5]], GREEDY, threshold=0.5)
    m = members(1)
    forgotten = CoLLM(m.models[0], m.models[1:], m.head, m.tokenizer, servers=world.servers())
    with closing(forgotten.backend.connections):
        assert threads() == 1
    forgotten = CoLLM(m.models[0], m.models[1:], m.head, m.tokenizer, servers=world.servers())
    assert forgotten.backend.connections.defer_ids
    assert threads() == 1
    del forgotten
    gc.collect()
    assert threads() == 0
