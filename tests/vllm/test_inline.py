"""Base and assistant in one real engine of vLLM; `make test-vllm` makes its environment and runs these."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from collm import CoLLM, ModelSpec, SamplingParams, StructuredOutputs
from collm.core.combinations import MixturePolicy
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
from collm.errors import ConfigError, MismatchError
from collm.vllm import HEAD, POLICY, THRESHOLD
from collm.vllm.placement import one_engine
from collm.vllm.servers import Servers
from tests.engine.test_engine import prompts_of, random_head
from tests.tiny_models import make_model, tiny_config
from tests.vllm.test_engine import check_all_equal, check_drawn, check_equal
from tests.vllm.test_servers import GREEDY, PYTHON, QUIET, SHAPE, _counter, ask, check_authors, serving

pytestmark = pytest.mark.vllm

SMALL = 1 << 20
"""Bytes for keys and values of the assistant: of a thousand tokens, so that requests are preempted."""


@dataclass
class World:
    artefact: Path
    servers: Servers

    @property
    def served(self) -> CoLLM:
        return CoLLM.from_pretrained(self.artefact, servers=self.servers)

    @property
    def local(self) -> CoLLM:
        return CoLLM.from_pretrained(self.artefact)

    @property
    def url(self) -> str:
        return self.servers.urls[0]


@pytest.fixture(scope="module")
def world(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    if not PYTHON:
        pytest.fail("COLLM_VLLM_PYTHON names no interpreter with vLLM; run these tests with 'make test-vllm'")
    root = tmp_path_factory.mktemp("one")
    for seed, name in enumerate(("base", "assistant")):
        make_model(tiny_config(**SHAPE), seed).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    head = random_head(64, 1, scale=1.0)
    head.bias.data += 0.5
    CoLLM(ModelSpec(str(root / "base")), [ModelSpec(str(root / "assistant"))], head, tokenizer).save_pretrained(
        root / "artefact"
    )
    flags = ["--kv-cache-memory-bytes", str(SMALL), "--max-num-batched-tokens", "96", "--max-logprobs", "-1"]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in QUIET.items():
            patch.setenv(name, value)
        options = {"python": PYTHON, "max_batch": 40, "max_length": 512, "wait_s": 400, "flags": flags}
        with one_engine(root / "artefact", root / "logs", **options) as servers:  # type: ignore[arg-type]
            yield World(root / "artefact", servers)


def test_greedy_equals_the_models_in_memory_for_mixed_rules_under_preemption(world: World) -> None:
    policies: list[Policy] = [ThresholdPolicy(eta) for eta in (-1.0, 0.0, 0.2, 0.5, 0.8, 0.95, 1.0)]
    policies += [SingleAuthorPolicy(0), BudgetPolicy(0.2, 0.3), RandomPolicy(0.3), ScheduledPolicy(0.0, 1.0, 20)]
    policies += [JointPolicy(), ThresholdPolicy(0.6)]
    policies = (policies * 4)[:40]
    prompts = prompts_of(11, len(policies))  # ragged
    prompts[5] = [*range(3, 93)] * 4  # is read in several steps
    params = [replace(GREEDY, seed=place if policy.draws else None) for place, policy in enumerate(policies)]
    before = _counter(world.url, "vllm:num_preemptions_total")
    found = world.served.generate(prompts, params, policy=policies, max_batch=40)
    assert _counter(world.url, "vllm:num_preemptions_total") > before
    check_all_equal(found, world.local.generate(prompts, params, policy=policies))
    assert {author for one in found for author in one.authors} == {0, 1}


def test_the_assistant_alone_is_its_greedy_text(world: World) -> None:
    prompts = prompts_of(6, 6)
    alone = SingleAuthorPolicy(1)
    found = world.served.generate(prompts, GREEDY, policy=alone)
    expected = world.local.generate(prompts, GREEDY, policy=alone)
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]


def test_stop_strings_ends_and_streams_are_the_local_ones(world: World) -> None:
    prompts = prompts_of(5, 8)
    whole = world.local.generate(prompts, GREEDY, threshold=0.5)
    params = [SamplingParams(max_tokens=40, stop=[one.text[place : place + 7]]) for place, one in enumerate(whole, 20)]
    expected = world.local.generate(prompts, params, threshold=0.5)
    assert {one.finish_reason for one in expected} == {"stop"}
    served = world.served
    check_all_equal(served.generate(prompts, params, threshold=0.5), expected)
    steps = list(served.stream(prompts[3], GREEDY, threshold=0.5))
    assert [step.token_id for step in steps] == whole[3].token_ids
    assert "".join(step.text for step in steps) == whole[3].text


def test_what_changes_logits_counts_the_text_of_both_authors(world: World) -> None:
    params = [
        SamplingParams(max_tokens=30, repetition_penalty=1.5),
        SamplingParams(max_tokens=30, frequency_penalty=0.8, presence_penalty=0.4),
        SamplingParams(max_tokens=30, allowed_token_ids=[*range(5, 40)]),
        SamplingParams(max_tokens=30, min_tokens=20, stop_token_ids=[*range(3, 60)]),
        SamplingParams(max_tokens=12, logprobs=3),
    ]
    prompts = prompts_of(8, len(params))
    expected = world.local.generate(prompts, params, threshold=0.6)
    check_all_equal(world.served.generate(prompts, params, threshold=0.6), expected)
    assert {author for one in expected for author in one.authors} == {0, 1}
    found = world.served.generate(prompts[4], params[4], threshold=0.6)[0].top_logprobs
    for mine, others in zip(found, expected[4].top_logprobs, strict=True):
        assert [token for token, _ in mine] == [token for token, _ in others]
        assert [value for _, value in mine] == pytest.approx([value for _, value in others], abs=1e-3)


def test_sampling_follows_the_stated_law(world: World) -> None:
    served, local = world.served, world.local
    ids = served.tokenizer("w4 w9", add_special_tokens=False)["input_ids"]
    for author, threshold in ((1, -1.0), (0, 1.0)):
        with torch.no_grad():
            logits = local.members[author].module(torch.tensor([ids])).logits[0, -1]  # type: ignore[union-attr]
        params = [SamplingParams(max_tokens=1, temperature=1.3, top_p=0.9, seed=seed) for seed in range(400)]
        out = served.generate(["w4 w9"] * 400, params, threshold=threshold, max_batch=40)
        check_drawn(torch.tensor([one.token_ids[0] for one in out]), token_probs(logits, 1.3, 0.9, 0))


def test_a_seed_draws_the_same_in_any_company(world: World) -> None:
    params = [SamplingParams(max_tokens=24, temperature=1.0, seed=seed) for seed in range(30)]
    prompts = prompts_of(9, 30)
    together = world.served.generate(prompts, params, threshold=0.6, max_batch=30)
    assert {author for one in together for author in one.authors} == {0, 1}
    for place in (0, 7, 29):
        (alone,) = world.served.generate([prompts[place]], params[place], threshold=0.6)
        assert alone.token_ids == together[place].token_ids


def test_a_request_that_fails_in_the_worker_gets_an_error_and_no_other_does(world: World) -> None:
    """Of another head, which only the worker knows."""
    url = f"{world.servers.urls[0]}/completions"
    body = {"prompt": [5, 6], "max_tokens": 40, "temperature": 0, "vllm_xargs": {POLICY: "budget:budget=0.5"}}
    wrong = {**body, "vllm_xargs": {**body["vllm_xargs"], HEAD: "0"}}  # type: ignore[dict-item]
    prompts = prompts_of(4, 6)
    with ThreadPoolExecutor(8) as pool:
        failing = [pool.submit(ask, url, json=wrong, timeout=60) for _ in range(4)]
        found = world.served.generate(prompts, GREEDY, threshold=0.5)
    assert {reply.result().status_code for reply in failing} == {500}
    assert ask(url, json=body, timeout=60).status_code == 200
    check_all_equal(found, world.local.generate(prompts, GREEDY, threshold=0.5))


def test_cancelled_requests_leave_the_others_exact(world: World) -> None:
    served = world.served
    for prompt in prompts_of(12, 20):
        stream = served.stream(prompt, SamplingParams(max_tokens=200), threshold=0.5)
        next(stream)
        stream.close()  # type: ignore[attr-defined]
    prompts = prompts_of(13, 12)
    expected = world.local.generate(prompts, GREEDY, threshold=0.5)
    check_all_equal(served.generate(prompts, GREEDY, threshold=0.5), expected)


def test_what_one_engine_cannot_do_is_refused(world: World) -> None:
    served = world.served
    with pytest.raises(ConfigError, match="use engine 'local'"):
        served.generate("w1", policy=MixturePolicy())
    structured = SamplingParams(structured_outputs=StructuredOutputs(regex="w1"))
    with pytest.raises(ConfigError, match="structured_outputs"):
        served.generate("w1", structured, threshold=0.5)
    url = f"{world.servers.urls[0]}/completions"
    body = {"prompt": [5, 6], "max_tokens": 4, "temperature": 0}
    wrong: list[tuple[dict[str, object], str]] = [
        ({THRESHOLD: 2}, "threshold is 2"),
        ({THRESHOLD: "much"}, "expected a number"),
        ({"defer_treshold": 0.5}, "defer_treshold"),
        ({POLICY: "mixture"}, "compares what both authors would write"),
        ({POLICY: "nothing"}, "expected one of"),
        ({POLICY: "random:rate=0.1", THRESHOLD: 0.5}, "give one of them"),
    ]
    for given, words in wrong:
        refused = ask(url, json={**body, "vllm_xargs": given})
        assert refused.status_code == 400, given
        assert words in refused.text
    refused = ask(url, json={**body, "structured_outputs": {"regex": "a"}})
    assert refused.status_code == 400
    assert "structured_outputs" in refused.text


def test_an_engine_of_another_head_is_refused(world: World) -> None:
    model = world.local
    other = CoLLM(model.base, model.assistants, random_head(64, 1, seed=5), model.tokenizer, servers=world.servers)
    with pytest.raises(MismatchError, match="holds no engine of this collaboration"):
        other.generate("w1", threshold=0.5)


def test_ranks_of_a_tensor_parallel_assistant_are_told_what_the_first_decides(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.fail("two ranks need two cores")
    for name, value in {**QUIET, "VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[1]}"}.items():
        monkeypatch.setenv(name, value)
    flags = ["--tensor-parallel-size", "2", "--distributed-executor-backend", "mp"]
    policies: list[Policy] = [ThresholdPolicy(0.3), RandomPolicy(0.3), SingleAuthorPolicy(1), BudgetPolicy(0.2, 0.3)]
    policies *= 3
    params = [replace(GREEDY, seed=place if policy.draws else None) for place, policy in enumerate(policies)]
    params[-1] = SamplingParams(max_tokens=24, temperature=1.0, seed=5)
    prompts = prompts_of(15, len(policies))
    with one_engine(world.artefact, tmp_path, python=PYTHON, max_length=512, wait_s=400, flags=flags) as servers:
        served = CoLLM.from_pretrained(world.artefact, servers=servers)
        found = served.generate(prompts, params, policy=policies)
    expected = world.local.generate(prompts[:-1], params[:-1], policy=policies[:-1])
    for ours, theirs, policy in zip(found[:-1], expected, policies[:-1], strict=True):
        check_equal(ours, theirs, defer_probs=not isinstance(policy, SingleAuthorPolicy))
    (alone,) = world.served.generate(prompts[-1:], params[-1], policy=policies[-1])
    assert found[-1].token_ids == alone.token_ids


def test_launch_starts_one_engine_serves_authors_and_leaves_nothing(world: World, tmp_path: Path) -> None:
    arguments = ["launch", str(world.artefact), "--vllm-python", PYTHON, "--work", str(tmp_path / "work")]
    with serving(*arguments, "--max-batch", "2", "--max-model-len", "256", "--wait", "400") as (asked, children):
        assert sum("api_server" in " ".join(child.cmdline()) for child in children) == 1
        check_authors(asked(), world.local)
