"""The base of one engine, with a plain loop in the place of vLLM."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from collm import CoLLM, SamplingParams
from collm.core.named import POLICIES, name_of, policy_named
from collm.core.policies import (
    BudgetPolicy,
    JointPolicy,
    OraclePolicy,
    Policy,
    RandomPolicy,
    ScheduledPolicy,
    SingleAuthorPolicy,
    ThresholdPolicy,
)
from collm.engine.decision import Draw
from collm.engine.runner import ModelRunner
from collm.errors import ConfigError, ModelFailure
from collm.models.language_model import LanguageModel
from collm.vllm import POLICY, THRESHOLD, author_of, author_token
from collm.vllm.drafting import Drafted, Drafter, RoundTimes, check_policy, policy_of
from tests.engine.test_engine import SHAPES, prompts_of, random_head
from tests.tiny_models import make_model, tiny_config

NEW = 30
POLICIES_AT_ONCE: list[Policy] = [
    *(ThresholdPolicy(eta) for eta in (-1.0, 0.2, 0.5, 0.8, 1.0)),
    SingleAuthorPolicy(0),
    SingleAuthorPolicy(1),
    BudgetPolicy(0.2, 0.3),
    RandomPolicy(0.3),
    ScheduledPolicy(0.0, 1.0, 20),
    JointPolicy(),
]


@dataclass
class Engine:
    """What vLLM does, one request after the other and without a cache: read drafts, write what follows them. If it
    `trims`, now and then a draft loses its end before it is read, as under preemption.
    """

    drafter: Drafter
    assistant: PreTrainedModel
    end_ids: frozenset[int]
    trims: bool = False
    _random: random.Random = field(default_factory=lambda: random.Random(0))

    def run(self, prompts: Sequence[list[int]], policies: Sequence[Policy]) -> list[tuple[list[int], list[int]]]:
        """Tokens and their authors."""
        requests = [
            Drafted(None, policy, len(prompt), end_ids=self.end_ids, seed=-seed, text=list(prompt), room=NEW)
            for seed, (prompt, policy) in enumerate(zip(prompts, policies, strict=True))
        ]
        authors: dict[Drafted, list[int]] = {one: [] for one in requests}
        live = list(requests)
        while live:
            self.drafter.draft(live)
            for one in list(live):
                text = cast("list[int]", one.text)
                self._round(one, text, authors[one])
                one.room = NEW - len(authors[one])
                if one.failure is not None or not one.room or text[-1] in self.end_ids:
                    self.drafter.forget(one)
                    live.remove(one)
        return [(list(one.text[one.prompt_length :]), authors[one]) for one in requests]

    def _round(self, one: Drafted, text: list[int], authors: list[int]) -> None:
        if one.failure is not None:
            return
        read = one.draft[: self._random.randrange(len(one.draft) + 1)] if self.trims else one.draft
        for decision in one.accept(read):
            text.append(decision.choice.token_id if decision.choice is not None else self._next(text))
            authors.append(decision.author)

    @torch.no_grad()
    def _next(self, text: list[int]) -> int:
        return int(self.assistant(torch.tensor([text])).logits[0, -1].argmax())


def greedy(logits: Tensor, requests: Sequence[Drafted], drafted: Sequence[Sequence[int]]) -> list[Draw]:
    return [Draw(token_id, 0.0) for token_id in logits.argmax(-1).tolist()]


@pytest.fixture(scope="module")
def pair(tokenizer: PreTrainedTokenizerFast) -> CoLLM:
    head = random_head(32, 1, scale=1.0)
    head.bias.data += 0.25
    return CoLLM(make_model(tiny_config(), 0), [make_model(tiny_config(hidden_size=48), 1)], head, tokenizer)


def engine_of(pair: CoLLM, most: int, **options: bool) -> Engine:
    base = LanguageModel(pair.base, name="base", vocab_size=pair.identity.vocab_size)  # type: ignore[arg-type]
    ends = frozenset({pair.tokenizer.eos_token_id})
    drafter = Drafter(ModelRunner(base), pair.head, most=most, draw=greedy)
    return Engine(drafter, pair.assistants[0], ends, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("most", "trims", "shape"), [(1, False, {}), (4, False, {}), (9, False, {}), (5, True, {}), (5, True, SHAPES[-1])]
)
def test_texts_are_those_of_the_local_engine_for_mixed_rules(
    pair: CoLLM, most: int, trims: bool, shape: dict[str, Any]
) -> None:
    if shape:
        pair = CoLLM(pair.base, pair.assistants, random_head(32, 1, seed=1, **shape), pair.tokenizer)
    policies = POLICIES_AT_ONCE * 2
    prompts = prompts_of(1, len(policies))
    params = [
        SamplingParams(max_tokens=NEW, seed=-seed if policy.draws else None) for seed, policy in enumerate(policies)
    ]
    expected = pair.generate(prompts, params, policy=policies)
    found = engine_of(pair, most, trims=trims).run(prompts, policies)
    assert found == [(one.token_ids, one.authors) for one in expected]
    assert {author for _, authors in found for author in authors} == {0, 1}


def test_a_cache_too_small_for_all_changes_no_text(pair: CoLLM) -> None:
    policies = [ThresholdPolicy(0.5)] * 12
    prompts = prompts_of(2, 12)
    engine = engine_of(pair, 4)
    roomy = engine.run(prompts, policies)
    engine.drafter.runner.set_capacity(128)
    before = engine.drafter.runner.usage.tokens_read
    assert engine.run(prompts, policies) == roomy
    assert engine.drafter.runner.usage.tokens_read - before > 2 * before  # texts were read anew
    assert engine.drafter.runner.open_slots == 0


def test_a_request_that_meets_nan_fails_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    base = make_model(tiny_config(tie_word_embeddings=False), 0)
    poison = 0
    base.get_input_embeddings().weight.data[poison] = torch.nan
    base.get_output_embeddings().weight.data[poison] = 0
    pair = CoLLM(base, [make_model(tiny_config(hidden_size=48), 1)], random_head(32, 1), tokenizer)
    prompts = [prompt for prompt in prompts_of(3, 6) if poison not in prompt]
    engine = engine_of(pair, 4)
    expected = engine.run(prompts, [ThresholdPolicy(0.9)] * len(prompts))
    found = engine.run([*prompts, [5, poison, 6]], [ThresholdPolicy(0.9)] * (len(prompts) + 1))
    assert found[:-1] == expected
    assert found[-1] == ([], [])


def test_what_breaks_down_fails_the_requests_that_it_was_for(pair: CoLLM) -> None:
    drafter = engine_of(pair, 4).drafter

    def request(threshold: float) -> Drafted:
        return Drafted(None, ThresholdPolicy(threshold), 2, text=[5, 6], room=9)

    requests = [request(threshold) for threshold in (1.0, -1.0)]
    drafter.draw = lambda *_: list[Draw]()  # of the wrong length, which raises a ValueError
    drafter.draft(requests)
    assert [type(one.failure) for one in requests] == [ValueError, ValueError]
    drafter.draw = greedy
    again = request(1.0)
    drafter.draft([again])
    assert again.failure is None
    assert len(again.draft) == 3
    drafter.head.weight.data.fill_(torch.nan)
    last = request(1.0)
    drafter.draft([last])
    assert isinstance(last.failure, ModelFailure)


def test_another_pass_pays_while_it_gives_more_than_rounds_do() -> None:
    times = RoundTimes()
    assert times.pays(1, 16)  # nothing is known yet
    for tokens in (8, 16, 24) * 20:
        times.assistant.record(tokens, 0.010 + 0.001 * tokens)
        times.saw_round(tokens, 0.030)
    for requests in (1, 4):
        times.base.record(requests, 0.002)
    assert times.pays(4, 12)  # 4 tokens in about 6 ms, beside about 16 in 30 ms
    assert not times.pays(1, 15)  # 1 token in about 3 ms


def test_policies_that_one_engine_can_follow_keep_their_names() -> None:
    for policy in POLICIES_AT_ONCE:
        name = name_of(policy)
        assert name is not None
        assert policy_named(name) == policy
        check_policy(policy)
        assert policy_of({POLICY: name}) == policy
    assert name_of(OraclePolicy((1,))) is None
    for name in {"mixture", "product", "contrastive", "proxy", "confidence"} & POLICIES.keys():
        with pytest.raises(ConfigError, match="use engine 'local'"):
            policy_of({POLICY: name})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({THRESHOLD: "0.5"}, "expected a number"),
        ({THRESHOLD: True}, "expected a number"),
        ({THRESHOLD: 2}, "from -1 to 1"),
        ({"defer_treshold": 0.5}, "defer_treshold"),
        ({POLICY: "nothing"}, "expected one of"),
        ({POLICY: "single:writer=2"}, "one engine holds one assistant"),
        ({POLICY: "random:rate=0.1", THRESHOLD: 0.5}, "has both defer_threshold and defer_policy"),
    ],
)
def test_values_that_mean_nothing_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        policy_of(given)


def test_a_token_says_who_wrote_another_and_is_none_of_those_beside_it() -> None:
    for taken in (set[int](), {0}, {1}, {0, 1, 2, 3}, {5, 7}):
        for author in (0, 1):
            token = author_token(author, taken)
            assert token not in taken
            assert author_of(token) == author
