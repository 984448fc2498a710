"""The client of one engine, with a server that decodes by the local engine."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from collm import CoLLM, SamplingParams
from collm.core.combinations import ProductPolicy
from collm.core.policies import BudgetPolicy, OraclePolicy, Policy, RandomPolicy, SingleAuthorPolicy, ThresholdPolicy
from collm.core.types import Completion
from collm.errors import ConfigError, MismatchError, ModelFailure
from collm.vllm import AUTHORS, HEAD, author_token
from collm.vllm.drafting import policy_of
from collm.vllm.export import head_digest
from collm.vllm.servers import Servers
from tests.engine.test_engine import prompts_of, random_head
from tests.tiny_models import make_model, tiny_config
from tests.vllm.fake import DOWN, FakeVllm, Fault, Served
from tests.vllm.test_engine import check_equal

GREEDY = SamplingParams(max_tokens=24)


class FakeEngine(FakeVllm):
    """One engine of a pair."""

    def __init__(self, pair: CoLLM, **options: Any) -> None:
        super().__init__(Served(pair.assistants[0], pair.tokenizer), **options)  # type: ignore[arg-type]
        self.pair = pair
        self.head = head_digest(pair.head)

    def _wrong(self, body: dict[str, Any]) -> str | None:
        if body["vllm_xargs"][HEAD] != self.head:
            return f"the request expects the head {body['vllm_xargs'][HEAD]}, but the engine has {self.head}"
        return super()._wrong(body)

    def _written(self, body: dict[str, Any]) -> Iterator[Any]:
        policy = policy_of(body["vllm_xargs"])
        assert policy is not None
        params = SamplingParams(
            body["max_tokens"],
            ignore_eos=body.get("ignore_eos", False),
            stop_token_ids=body.get("stop_token_ids", ()),
            seed=body.get("seed") if policy.draws else None,
            logprobs=max(body["logprobs"] - 1, 0),
            presence_penalty=body.get("presence_penalty", 0.0),
            frequency_penalty=body.get("frequency_penalty", 0.0),
            repetition_penalty=body.get("repetition_penalty", 1.0),
        )
        (out,) = self.pair.generate([body["prompt"]], params, policy=policy)
        yield from ((token_id, (out, place)) for place, token_id in enumerate(out.token_ids))

    def _logprobs(self, body: dict[str, Any], written: Any) -> dict[str, Any]:
        assert body["vllm_xargs"][AUTHORS]
        top = [_beside(token_id, *of) for token_id, of in written]
        return {
            "tokens": [f"token_id:{token_id}" for token_id, _ in written],
            "token_logprobs": [out.logprobs[place] for _, (out, place) in written],
            "top_logprobs": [{f"token_id:{token_id}": value for token_id, value in one.items()} for one in top],
            "text_offset": [],
        }


def _beside(token_id: int, out: Completion, place: int) -> dict[int, float]:
    """As `inline` fills them: the token, who wrote it, the most probable ones."""
    likely = dict(out.top_logprobs[place]) if out.top_logprobs else {}
    author = author_token(out.authors[place], {token_id, *likely})
    defer_prob = out.defer_probs[place]
    return {token_id: out.logprobs[place], author: math.log(defer_prob) if defer_prob else -9999.0, **likely}


@pytest.fixture(scope="module")
def pair(tokenizer: PreTrainedTokenizerFast) -> CoLLM:
    head = random_head(32, 1, scale=1.0)
    head.bias.data += 0.25
    return CoLLM(make_model(tiny_config(), 0), [make_model(tiny_config(hidden_size=48), 1)], head, tokenizer)


@pytest.fixture
def engine(pair: CoLLM) -> Iterator[FakeEngine]:
    with FakeEngine(pair, pieces=(1, 3, 2)) as server:
        yield server


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def connect(pair: CoLLM, engine: FakeEngine, stack: ExitStack, **options: Any) -> CoLLM:
    servers = Servers([engine.url], **{"timeout_s": 20.0, **options})
    model = CoLLM(pair.base, pair.assistants, pair.head, pair.tokenizer, servers=servers)
    stack.callback(model.backend.connections.close)  # type: ignore[attr-defined]
    engine.bodies.clear()
    return model


def test_completions_are_the_local_ones_with_one_request_each(
    pair: CoLLM, engine: FakeEngine, stack: ExitStack
) -> None:
    policies: list[Policy] = [ThresholdPolicy(eta) for eta in (-1.0, 0.3, 0.6, 1.0)]
    policies += [SingleAuthorPolicy(0), BudgetPolicy(0.2, 0.3), RandomPolicy(0.4), ThresholdPolicy(0.5)]
    params = [
        SamplingParams(max_tokens=24, seed=3 if policy.draws else None, logprobs=2 * (place % 2))
        for place, policy in enumerate(policies)
    ]
    prompts = prompts_of(1, len(policies))
    model = connect(pair, engine, stack)
    found = model.generate(prompts, params, policy=policies)
    assert len(engine.bodies) == len(policies)
    expected = pair.generate(prompts, params, policy=policies)
    for ours, theirs in zip(found, expected, strict=True):
        check_equal(ours, theirs)
        assert [[token for token, _ in one] for one in ours.top_logprobs] == [
            [token for token, _ in one] for one in theirs.top_logprobs
        ]
    assert found.usage["assistant"].tokens_written == sum(sum(one.authors) for one in expected)


def test_stop_strings_end_the_request(pair: CoLLM, engine: FakeEngine, stack: ExitStack) -> None:
    (whole,) = pair.generate([[5, 6]], GREEDY, threshold=0.5)
    params = SamplingParams(max_tokens=24, stop=[whole.text[12:18]])
    model = connect(pair, engine, stack)
    (found,) = model.generate([[5, 6]], params, threshold=0.5)
    check_equal(found, pair.generate([[5, 6]], params, threshold=0.5)[0])
    assert found.finish_reason == "stop"
    engine.wait_until(lambda: engine.running == 0)


def test_an_answer_that_breaks_off_goes_on_where_the_rule_allows(
    pair: CoLLM, engine: FakeEngine, stack: ExitStack
) -> None:
    model = connect(pair, engine, stack)
    http = model.backend.connections.authors[1].http  # type: ignore[attr-defined]
    http.settings = replace(http.settings, waits_s=(0.01, 10.0))
    engine.faults = [Fault(after=5), DOWN]
    (found,) = model.generate([[5, 6]], GREEDY, threshold=0.5)
    check_equal(found, pair.generate([[5, 6]], GREEDY, threshold=0.5)[0])
    assert [len(body["prompt"]) for body in engine.bodies] == [2, 7, 7]
    engine.faults = [Fault(after=5)]
    with pytest.raises(ModelFailure, match="failed after 5 tokens"):
        model.generate([[5, 6]], GREEDY, policy=BudgetPolicy(0.2, 0.3))
    engine.faults = [DOWN]  # nothing was written yet
    (found,) = model.generate([[5, 6]], GREEDY, policy=BudgetPolicy(0.2, 0.3))
    check_equal(found, pair.generate([[5, 6]], GREEDY, policy=BudgetPolicy(0.2, 0.3))[0])


def test_rules_and_parameters_that_it_cannot_follow_are_refused(
    pair: CoLLM, engine: FakeEngine, stack: ExitStack
) -> None:
    model = connect(pair, engine, stack)
    for policy in (ProductPolicy(0.5), OraclePolicy((1,))):
        with pytest.raises(ConfigError, match="use engine 'local'"):
            model.generate([[5]], GREEDY, policy=policy)
    for params in (SamplingParams(temperature=1.0, min_p=0.1), SamplingParams(logit_bias={5: 1.0})):
        with pytest.raises(ConfigError, match="not available across servers"):
            model.generate([[5]], params, threshold=0.5)
    with pytest.raises(ConfigError, match="not available in one engine"):
        model.candidates("w1", [5])
    assert not engine.bodies


def test_other_servers_are_refused(pair: CoLLM, stack: ExitStack) -> None:
    other = CoLLM(pair.base, pair.assistants, random_head(32, 1, seed=9), pair.tokenizer)
    with FakeEngine(other) as server, pytest.raises(MismatchError, match="holds no engine of this collaboration"):
        connect(pair, server, stack)
    plain = FakeVllm(Served(pair.assistants[0], pair.tokenizer))  # type: ignore[arg-type]
    with plain, pytest.raises(MismatchError, match=r"holds no engine of this|let author 0 write"):
        connect(pair, plain, stack)  # type: ignore[arg-type]
