"""Who writes: each policy's rule, and what parameters are refused."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collm.core.calibration import Calibration, CalibrationPoint
from collm.core.params import SamplingParams
from collm.core.policies import (
    BudgetPolicy,
    ConfidencePolicy,
    JointPolicy,
    OraclePolicy,
    Policy,
    RandomPolicy,
    ScheduledPolicy,
    SingleAuthorPolicy,
    StepView,
    ThresholdPolicy,
)
from collm.errors import ConfigError


def view(probs: list[float], **changes: Any) -> StepView:
    options = {
        "position": 0,
        "deferred": 0,
        "author_probs": probs,
        "defer_prob": 1 - probs[0],
        "temperature": 1.0,
        "uniform": 0.5,
    }
    return StepView(**{**options, **changes})


def test_threshold_keeps_the_base_at_equality_and_names_the_likeliest_assistant_above() -> None:
    assert ThresholdPolicy(0.75).author(view([0.25, 0.3, 0.45])) == 0
    assert ThresholdPolicy(0.74).author(view([0.25, 0.3, 0.45])) == 2
    assert ThresholdPolicy(-1).author(view([1.0, 0.0, 0.0])) == 1
    assert ThresholdPolicy(1).author(view([0.0, 0.5, 0.5])) == 0


def test_joint_draws_authors_by_their_probability() -> None:
    """Three cells within 5 standard deviations of 20,000 draws: odds of a false alarm below 1 in 500,000."""
    probs, n = [0.6, 0.3, 0.1], 20_000
    rng = random.Random(1)
    drawn = [JointPolicy().author(view(probs, uniform=rng.random())) for _ in range(n)]
    for author, p in enumerate(probs):
        assert abs(drawn.count(author) - n * p) < 5 * math.sqrt(n * p * (1 - p))


def test_joint_at_low_temperature_is_the_likeliest_author() -> None:
    assert JointPolicy().author(view([0.2, 0.5, 0.3], temperature=0)) == 1
    assert JointPolicy().author(view([0.2, 0.5, 0.3], temperature=1e-5)) == 1


def test_random_defers_at_its_rate_whatever_the_head_says() -> None:
    rng = random.Random(2)
    drawn = [RandomPolicy(0.25).author(view([1.0, 0.0], uniform=rng.random())) for _ in range(20_000)]
    assert abs(sum(drawn) - 5_000) < 5 * math.sqrt(20_000 * 0.25 * 0.75)


def test_oracle_picks_who_has_the_reference_token() -> None:
    oracle = OraclePolicy((7, 8))
    assert oracle.author(view([1, 0, 0], top_tokens={0: 7, 1: 7, 2: 7})) == 0
    assert oracle.author(view([1, 0, 0], top_tokens={0: 1, 1: 2, 2: 7})) == 2
    assert oracle.author(view([1, 0, 0], top_tokens={0: 1, 1: 2, 2: 3})) == 0
    assert oracle.author(view([1, 0, 0], position=2, top_tokens={0: 1, 1: 7, 2: 8})) == 0


def test_a_single_author_writes_everything() -> None:
    assert SingleAuthorPolicy(2).author(view([1, 0, 0])) == 2


def written(policy: Policy, defer_probs: list[float]) -> list[int]:
    """The authors that `policy` names in one completion."""
    authors: list[int] = []
    for prob in defer_probs:
        step = view([1 - prob, prob], defer_prob=prob, position=len(authors), deferred=sum(authors))
        authors.append(policy.author(step))
    return authors


DEFER_PROBS = st.lists(st.floats(0, 1), max_size=60)


@pytest.mark.parametrize(("start", "end"), [(0.2, 0.8), (0.8, 0.2), (-0.5, 0.5)])
def test_a_schedule_moves_its_threshold_in_a_straight_line_and_then_keeps_it(start: float, end: float) -> None:
    policy = ScheduledPolicy(start, end, steps=4)
    for position, share in [(0, 0.0), (1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0), (5, 1.0), (1000, 1.0)]:
        threshold = (1 - share) * start + share * end
        below = view([0.5, 0.2, 0.3], position=position, defer_prob=threshold - 1e-6)
        above = view([0.5, 0.2, 0.3], position=position, defer_prob=threshold + 1e-6)
        assert (policy.author(below), policy.author(above)) == (0, 2)


@settings(deadline=None, max_examples=50)
@given(st.floats(-1, 1), DEFER_PROBS)
def test_a_schedule_that_stays_is_the_threshold_rule(threshold: float, defer_probs: list[float]) -> None:
    policy = ScheduledPolicy(threshold, threshold, steps=7)
    assert written(policy, defer_probs) == written(ThresholdPolicy(threshold), defer_probs)


@settings(deadline=None, max_examples=50)
@given(st.floats(0, 1), st.floats(-1, 1), st.integers(0, 4), DEFER_PROBS)
def test_a_budget_bounds_every_prefix_and_holds_back_only_what_it_cannot_afford(
    budget: float, threshold: float, burst: int, defer_probs: list[float]
) -> None:
    authors = written(BudgetPolicy(budget, threshold, burst), defer_probs)
    wanted = written(ThresholdPolicy(threshold), defer_probs)
    for n in range(1, len(authors) + 1):
        deferred = sum(authors[:n])
        assert deferred <= budget * n + burst
        if authors[n - 1] != wanted[n - 1]:
            assert authors[n - 1] == 0
            assert deferred + 1 > budget * n + burst


@settings(deadline=None, max_examples=30)
@given(st.floats(-1, 1), DEFER_PROBS)
def test_no_budget_is_the_base_alone_and_a_full_one_the_threshold_rule(
    threshold: float, defer_probs: list[float]
) -> None:
    assert not any(written(BudgetPolicy(0.0, threshold, burst=0), defer_probs))
    full = BudgetPolicy(1.0, threshold, burst=0)
    assert written(full, defer_probs) == written(ThresholdPolicy(threshold), defer_probs)


def test_a_budget_is_spread_over_the_text_after_its_burst() -> None:
    assert written(BudgetPolicy(0.25, 0.5, burst=0), [1.0] * 9) == [0, 0, 0, 1, 0, 0, 0, 1, 0]
    assert written(BudgetPolicy(0.25, 0.5, burst=2), [1.0] * 9) == [1, 1, 0, 1, 0, 0, 0, 1, 0]
    assert written(BudgetPolicy(0.25, 0.5, burst=0), [0.0] * 4 + [1.0] * 4) == [0, 0, 0, 0, 1, 0, 0, 1]
    assert BudgetPolicy(1.0).author(view([0.2, 0.3, 0.5])) == 2


def test_confidence_asks_everyone_and_names_whoever_is_surest_whatever_the_head_says() -> None:
    assert [list(ConfidencePolicy().consults(k)) for k in (1, 2, 3)] == [[1], [1, 2], [1, 2, 3]]
    assert ConfidencePolicy().author(view([1, 0, 0], top_probs={0: 0.5, 1: 0.6, 2: 0.7})) == 2
    assert ConfidencePolicy().author(view([0, 1, 0], top_probs={0: 0.8, 1: 0.6, 2: 0.7})) == 0


def test_confidence_keeps_the_base_on_a_tie() -> None:
    assert ConfidencePolicy().author(view([0, 1, 0], top_probs={0: 0.7, 1: 0.7, 2: 0.6})) == 0
    assert ConfidencePolicy().author(view([0, 0, 1], top_probs={0: 0.5, 1: 0.7, 2: 0.7})) == 1


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        *((ThresholdPolicy, [threshold], "from -1 to 1") for threshold in (1.01, -1.5, math.nan, math.inf)),
        (ScheduledPolicy, [1.1, 0.5, 4], "threshold is 1.1"),
        (ScheduledPolicy, [0.5, -1.1, 4], "threshold is -1.1"),
        (ScheduledPolicy, [math.nan, 0.5, 4], "threshold is nan"),
        (ScheduledPolicy, [0.5, 0.5, 0], "steps is 0"),
        (ScheduledPolicy, [0.5, 0.5, -3], "steps is -3"),
        (BudgetPolicy, [1.1], "budget is 1.1"),
        (BudgetPolicy, [-0.1], "budget is -0.1"),
        (BudgetPolicy, [math.nan], "budget is nan"),
        (BudgetPolicy, [0.5, 2], "threshold is 2"),
        (BudgetPolicy, [0.5, 0.5, -1], "burst is -1"),
        (RandomPolicy, [1.2], "from 0 to 1"),
        (SamplingParams, [0], "max_tokens is 0"),
        (SamplingParams, [9, -1], "temperature is -1"),
        (SamplingParams, [9, math.nan], "temperature is nan"),
        (SamplingParams, [9, 1, 0], "top_p is 0"),
        (SamplingParams, [9, 1, 1, -1], "top_k is -1"),
        (SamplingParams, [9, 0, 0.9], "top_p=0.9 has no effect at temperature 0"),
        (SamplingParams, [9, 0, 1, 5], "top_k=5 has no effect at temperature 0"),
        (SamplingParams, [9, 0, 1, 0, None, [""]], "non-empty"),
    ],
)
def test_options_out_of_range_are_refused(kind: Any, options: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(*options)


def test_one_stop_string_may_stand_alone() -> None:
    assert SamplingParams(stop="END").stop == ("END",)


def test_calibration_keeps_the_best_and_ties_go_to_the_lower_rate() -> None:
    points = [
        CalibrationPoint(1.0, 0.0, 0.2, 0.1, 0.3, 0.0, 0.0),
        CalibrationPoint(0.6, 0.1, 0.8, 0.7, 0.9, 0.0, 0.2),
        CalibrationPoint(0.3, 0.4, 0.8, 0.7, 0.9, 0.3, 0.5),
        CalibrationPoint(-1.0, 1.0, 0.5, 0.4, 0.6, 0.9, 1.0),
    ]
    calibration = Calibration(points, "exact_match", 50, {})
    assert calibration.best() == points[1]
    assert calibration.best(budget=0.2) == points[1]
    assert calibration.best(budget=0.15) == points[0]  # points[1] may exceed it
    assert Calibration.from_dict(calibration.to_dict()) == calibration
    with pytest.raises(ConfigError, match="from 0 to 1"):
        calibration.best(1.5)


def test_of_thresholds_that_gave_the_same_the_one_nearest_to_even_odds_is_best() -> None:
    """Where nothing is deferred it is 1, so that a budget of 0 holds on any text."""
    same = [CalibrationPoint(threshold, 0.1, 0.8, 0.7, 0.9, 0.0, 0.2) for threshold in (0.99, 0.6, 0.5, 0.01)]
    never = [CalibrationPoint(threshold, 0.0, 0.2, 0.1, 0.3, 0.0, 1 - threshold) for threshold in (0.999, 1.0)]
    calibration = Calibration([*never, *same], "exact_match", 50, {})
    assert calibration.best().threshold == 0.5
    assert calibration.best(budget=0).threshold == calibration.best(budget=0.01).threshold == 1.0
    with pytest.raises(ConfigError, match=r"budget is 0\.15, but the lowest measured deferral rate is up to 0\.2"):
        Calibration(same, "exact_match", 50, {}).best(budget=0.15)
