"""Judges: their distributions by hand, and what users write for them."""

from __future__ import annotations

import math

import pytest
import torch

from collm.core.judges import JUDGES, BlendJudge, ExactJudge, JointJudge, JudgedPolicy, RegretJudge
from collm.core.named import judged, name_of, policy_named
from collm.core.policies import BudgetPolicy, JointPolicy, ThresholdPolicy
from collm.core.sampling import redraw, sample
from collm.errors import ConfigError

BASE, ASSISTANT = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.1, 0.3, 0.6]])
LOGPROBS = {0: BASE.log(), 1: ASSISTANT.log()}


@pytest.mark.parametrize(
    ("judge", "law"),
    [
        (ExactJudge(), [0.1, 0.3, 0.6]),
        (BlendJudge(0.25), [0.55, 0.225, 0.225]),
        (BlendJudge(0.0), [0.7, 0.2, 0.1]),
        (BlendJudge(1.0), [0.1, 0.3, 0.6]),
        (JointJudge(), [0.4, 0.25, 0.35]),
    ],
)
def test_the_law_of_a_judge(judge: ExactJudge, law: list[float]) -> None:
    logits = judge.combine(LOGPROBS, torch.tensor([[0.5, 0.5]]).log())
    assert logits.softmax(-1)[0].tolist() == pytest.approx(law)


def test_what_is_redrawn_is_distributed_as_the_target_and_stands_as_often_as_can_be() -> None:
    """Over all random numbers from a fine grid."""
    grid = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    target, proposal = ASSISTANT.expand(len(grid), 3), BASE.expand(len(grid), 3)
    drafted = sample(proposal, grid)
    drawn = redraw(target, proposal, drafted, grid)
    assert (drawn.bincount(minlength=3) / len(grid)).tolist() == pytest.approx(ASSISTANT[0].tolist(), abs=1e-4)
    assert float((drawn == drafted).double().mean()) == pytest.approx(0.1 + 0.2 + 0.1, abs=1e-4)  # sum of min(P, Q)


def test_what_does_not_stand_is_drawn_from_the_target_whatever_was_drafted() -> None:
    grid = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    target, proposal = ASSISTANT.expand(len(grid), 3), BASE.expand(len(grid), 3)
    drafted = sample(proposal, grid)
    drawn = redraw(target, proposal, drafted, grid, drafted != 0)
    assert torch.equal(drawn[drafted != 0], drafted[drafted != 0])
    other = drawn[drafted == 0].bincount(minlength=3) / (drafted == 0).sum()
    assert other.tolist() == pytest.approx(ASSISTANT[0].tolist(), abs=1e-4)


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("exact", JudgedPolicy(ThresholdPolicy(0.5), ExactJudge())),
        ("blend:weight=0.25,every=3", JudgedPolicy(ThresholdPolicy(0.5), BlendJudge(0.25), every=3)),
        ("joint:", JudgedPolicy(ThresholdPolicy(0.5), JointJudge())),
        ("regret:nats=1,budget=9", JudgedPolicy(ThresholdPolicy(0.5), RegretJudge(1.0, 9.0))),
        ("regret", JudgedPolicy(ThresholdPolicy(0.5), RegretJudge(2.0, math.inf))),
    ],
)
def test_a_judge_is_named_beside_a_rule_or_in_it(text: str, policy: JudgedPolicy) -> None:
    assert judged(ThresholdPolicy(0.5), text) == policy
    assert policy_named(f"threshold:threshold=0.5,judge={text}") == policy
    assert policy_named(str(name_of(policy))) == policy


def test_a_budget_may_have_a_judge() -> None:
    policy = JudgedPolicy(BudgetPolicy(0.1), RegretJudge())
    assert policy_named("budget:budget=0.1,judge=regret") == policy
    assert not policy.allows(10, 2, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fair", f"judge is 'fair', expected one of {', '.join(JUDGES)}"),
        ("regret:nats=-1", "nats of judge 'regret' is -1.0, expected a number of nats, 0 or more"),
        ("regret:budget=nan", "budget of judge 'regret' is nan"),
        ("regret:nats=few", "nats of judge 'regret' is 'few', expected a number"),
        ("exact:nats=1", "judge 'exact' got 'nats=1', expected each of these at most once: every=.."),
        ("exact:every=0", "every is 0, expected at least 1 token"),
        ("blend:weight=2", "weight is 2.0, expected a number from 0 to 1"),
    ],
)
def test_what_is_no_judge_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        judged(ThresholdPolicy(0.5), text)
    assert message in str(refusal.value)


def test_a_judge_needs_a_threshold() -> None:
    with pytest.raises(ConfigError, match=r"judge 'exact' needs a rule that compares .* but the policy is joint"):
        judged(JointPolicy(), "exact")
