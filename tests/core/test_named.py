"""Policies by name: what each text builds, and what the refusals say."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from collm.core import combinations, policies
from collm.core.named import POLICIES, policy_named
from collm.core.policies import Policy
from collm.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("threshold:threshold=-0.5", policies.ThresholdPolicy(-0.5)),
        ("schedule:start=-1,end=0.75,steps=20", policies.ScheduledPolicy(-1.0, 0.75, 20)),
        ("budget:budget=0.3", policies.BudgetPolicy(0.3)),
        ("budget:burst=4,threshold=0.2,budget=0.3", policies.BudgetPolicy(0.3, 0.2, 4)),
        ("joint", policies.JointPolicy()),
        ("price:0.7", policies.PricePolicy((0.7,))),
        ("price:0.7,-1", policies.PricePolicy((0.7, -1.0))),
        ("mixture:threshold=0.3", combinations.MixturePolicy(0.3)),
        ("single:writer=2", policies.SingleAuthorPolicy(2)),
        ("random:rate=0.25", policies.RandomPolicy(0.25)),
        ("confidence", policies.ConfidencePolicy()),
        ("mixture", combinations.MixturePolicy()),
        ("product", combinations.ProductPolicy()),
        ("product:weight=1e-1", combinations.ProductPolicy(0.1)),
        ("contrastive", combinations.ContrastivePolicy()),
        ("contrastive:alpha=0.2,beta=0.3", combinations.ContrastivePolicy(alpha=0.2, beta=0.3)),
        ("contrastive:expert=2,amateur=1", combinations.ContrastivePolicy(expert=2, amateur=1)),
        ("proxy", combinations.ProxyTuningPolicy()),
        ("proxy:model=3,tuned=1", combinations.ProxyTuningPolicy(model=3, tuned=1)),
    ],
)
def test_a_text_builds_the_policy_it_names(text: str, expected: Policy) -> None:
    assert policy_named(text) == expected


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "price"])
def test_every_named_policy_takes_all_its_fields_from_a_text(name: str) -> None:
    kind: Any = POLICIES[name]
    numbers = enumerate(fields(kind), start=1)
    options: Any = {f.name: {"float": 0.25, "str": "cosine"}.get(str(f.type), number) for number, f in numbers}
    policy = policy_named(f"{name}:{','.join(f'{option}={value}' for option, value in options.items())}")
    assert type(policy) is kind
    assert policy == kind(**options)
    assert all(type(getattr(policy, option)) is type(value) for option, value in options.items())


@pytest.mark.parametrize("text", ["majority", "", "Joint", "oracle", "majority:rate=1"])
def test_an_unknown_name_is_refused_with_the_known_ones(text: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        policy_named(text)
    assert repr(text) in str(refusal.value)
    assert ", ".join(POLICIES) in str(refusal.value)


ONCE = "expected each of these at most once:"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("threshold:limit=1", f"policy 'threshold' got 'limit=1', {ONCE} threshold=.."),
        ("joint:weight=1", f"policy 'joint' got 'weight=1', {ONCE} none"),
        ("random:rate=0.5,seed=1", f"policy 'random' got 'seed=1', {ONCE} rate=.."),
        ("product:weight", f"policy 'product' got 'weight', {ONCE} weight=.."),
        ("product:weight=0.1,weight=0.9", f"policy 'product' got 'weight=0.9', {ONCE} weight=.."),
        ("product:0.5", f"policy 'product' got '0.5', {ONCE} weight=.."),
        ("product:=0.5", f"policy 'product' got '=0.5', {ONCE} weight=.."),
        ("contrastive:alpha=high", "alpha of policy 'contrastive' is 'high', expected a number"),
        ("contrastive:beta=", "beta of policy 'contrastive' is '', expected a number"),
        ("proxy:model=1.5", "model of policy 'proxy' is '1.5', expected a whole number"),
        ("threshold", "policy 'threshold' requires threshold; write threshold:threshold=.."),
        ("threshold:", "policy 'threshold' requires threshold; write threshold:threshold=.."),
        ("schedule:start=0.5", "policy 'schedule' requires end and steps; write schedule:start=..,end=..,steps=.."),
        ("budget:burst=2", "policy 'budget' requires budget; write budget:burst=..,budget=.."),
        ("single", "policy 'single' requires writer; write single:writer=.."),
        ("random", "policy 'random' requires rate; write random:rate=.."),
        ("product:weight=2", "weight is 2.0, expected a number from 0 to 1"),
        ("threshold:threshold=nan", "threshold is nan, expected a number from -1 to 1"),
        ("schedule:start=0,end=1,steps=0", "steps is 0, expected at least 1"),
        ("contrastive:expert=2,amateur=2", "expert and amateur are both author 2"),
        ("contrastive:beta=1e38", "beta is 1e+38, expected a number from 0 to 1000"),
    ],
)
def test_a_bad_option_is_refused_with_what_came_and_what_was_expected(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        policy_named(text)
    assert str(refusal.value).startswith(message)
