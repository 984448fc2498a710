"""Intervals: they cover as often as they claim, never shrink to a point, and use the pairing."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from collm.errors import DataError
from collm.evaluation import intervals
from collm.evaluation.intervals import (
    Interval,
    bootstrap_interval,
    independent_difference,
    paired_difference,
    ratio_interval,
    statistic_interval,
)

shares = st.floats(0, 1)


def _too_rarely(covered: int, trials: int, coverage: float) -> bool:
    """Whether so few covered, though each would with probability `coverage`, has odds below 1e-6 (Chernoff)."""
    share = covered / trials
    if share >= coverage:
        return False
    divergence_nats = share * math.log(share / coverage) + (1 - share) * math.log((1 - share) / (1 - coverage))
    return trials * divergence_nats > math.log(1e6)


@pytest.mark.slow
@given(scores=st.lists(shares, min_size=1, max_size=30))
def test_bounds_are_in_order_and_never_a_point(scores):
    interval = bootstrap_interval(scores)
    assert 0 <= interval.low <= interval.mean <= interval.high <= 1
    assert len(set(scores)) > 1 or interval.low < interval.high


@pytest.mark.slow
@given(pairs=st.lists(st.tuples(shares, shares), min_size=1, max_size=30))
def test_a_difference_turns_its_sign_with_the_order(pairs):
    a, b = [list(side) for side in zip(*pairs, strict=True)]
    forward, backward = paired_difference(a, b), paired_difference(b, a)
    assert -1 <= forward.low <= forward.mean <= forward.high <= 1
    assert forward.mean == pytest.approx(-backward.mean)
    assert forward.low == pytest.approx(-backward.high)


def zero_one(rng: random.Random, share: float) -> Interval:
    return bootstrap_interval([float(rng.random() < share) for _ in range(50)])


def graded(rng: random.Random, mean: float) -> Interval:
    return bootstrap_interval([rng.betavariate(2, 1) for _ in range(60)])


def paired(rng: random.Random, mean: float) -> Interval:
    difficulty = [rng.random() for _ in range(60)]
    a = [float(rng.random() < 1 - hard / 2) for hard in difficulty]  # right with probability 3/4 on average
    return paired_difference(a, [float(rng.random() < 1 - hard) for hard in difficulty])  # 1/2


# Wilson's coverage swings around 95 % with n and the share; for these three it is at least 92 %. The percentile
# bootstrap of 60 items covers 94 %, and 95 % of the differences in the same simulation.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("drawn", "truth", "coverage"),
    [*((zero_one, share, 0.92) for share in (0.02, 0.5, 0.95)), (graded, 2 / 3, 0.92), (paired, 1 / 4, 0.93)],
)
def test_the_truth_is_covered_as_often_as_claimed(drawn, truth, coverage):
    rng, trials = random.Random(0), 1000
    intervals = [drawn(rng, truth) for _ in range(trials)]
    covered = sum(one.low <= truth <= one.high for one in intervals)
    assert not _too_rarely(covered, trials, coverage)
    assert covered < trials or drawn is zero_one  # an interval that always covers says nothing


def test_wilson_agrees_with_its_closed_form():
    # The ends solve (p - mean)^2 = z^2 p (1 - p) / n, which is how Wilson defined them.
    interval = bootstrap_interval([1.0] * 9 + [0.0])
    z = 1.959963984540054
    for end in (interval.low, interval.high):
        assert (end - 0.9) ** 2 == pytest.approx(z**2 * end * (1 - end) / 10)


@pytest.mark.parametrize("items", [1, 10, 1000])
def test_equal_scores_leave_room_for_what_was_not_seen(items):
    all_right, all_wrong = bootstrap_interval([1.0] * items), bootstrap_interval([0.0] * items)
    half = bootstrap_interval([0.5] * items)
    unseen = all_wrong.high
    assert (all_wrong.low, all_right.high) == (0, 1)
    assert all_right.low == pytest.approx(1 - unseen)
    assert (half.low, half.high) == pytest.approx((0.5 - unseen / 2, 0.5 + unseen / 2))
    # The share that n items without an exception leave possible: 1/n would be too little, 5/n too much.
    assert 1 / (items + 1) < unseen < 5 / items
    tie = paired_difference([0.3] * items, [0.3] * items)
    assert (tie.low, tie.mean, tie.high) == pytest.approx((-unseen, 0, unseen))


def test_pairing_narrows_the_interval():
    rng = random.Random(0)
    b = [rng.random() * 0.9 for _ in range(100)]
    a = [score + 0.1 * rng.random() for score in b]
    paired = paired_difference(a, b)
    apart = [bootstrap_interval(scores) for scores in (a, b)]
    assert paired.low > 0
    assert paired.high - paired.low < 0.2 * min(one.high - one.low for one in apart)


def test_the_same_scores_give_the_same_interval_and_blocks_do_not_change_the_law(monkeypatch):
    scores = [i % 7 / 7 for i in range(100)]
    first = bootstrap_interval(scores)
    assert first == bootstrap_interval(scores)
    monkeypatch.setattr(intervals, "_NUMBERS_AT_ONCE", 150)  # one resample at a time
    one_by_one = bootstrap_interval(scores)
    # Both ends are Monte Carlo estimates with a standard error near 0.003.
    assert (one_by_one.low, one_by_one.high) == pytest.approx((first.low, first.high), abs=0.02)


@pytest.mark.parametrize(
    ("interval", "values", "complaint"),
    [
        *((bootstrap_interval, [scores], "expected") for scores in ([], [0.5, 1.5], [-0.1], [float("nan")])),
        (paired_difference, [[0, 1], [1]], "2 and 1 scores"),
        (statistic_interval, [lambda sums: sums[..., 0], []], "no items to take a statistic of"),
        *(
            (ratio_interval, parts_and_wholes, "expected a part from 0 to its whole")
            for parts_and_wholes in ([[1], [1, 2]], [[2], [1]], [[-1], [1]], [[0], [0]], [[], []])
        ),
    ],
)
def test_other_values_are_refused(interval, values, complaint):
    with pytest.raises(DataError, match=complaint):
        interval(*values)


def test_a_ratio_weighs_items_by_their_wholes() -> None:
    assert bootstrap_interval([0.25, 0.75]).mean == 0.5
    interval = ratio_interval([1, 0, 3], [2, 0, 4])
    assert interval.mean == pytest.approx(4 / 6)
    assert interval.low <= interval.mean <= interval.high


def test_items_that_hold_together_widen_the_interval_of_a_ratio() -> None:
    """100 items with 4 steps, all right or all wrong, say as much as 100 steps, not as 400."""
    clustered = ratio_interval([4, 0] * 50, [4] * 100)
    alone = bootstrap_interval([1.0, 0.0] * 50)
    spread = bootstrap_interval([1.0, 0.0] * 200)
    assert clustered.high - clustered.low == pytest.approx(alone.high - alone.low, rel=0.15)
    assert clustered.high - clustered.low > 1.6 * (spread.high - spread.low)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 4, 1000])
def test_ratios_that_agree_leave_room_for_items_that_do_not(share: float, steps: int) -> None:
    """What was not seen depends on the number of items, not on the number of their steps."""
    found = ratio_interval([share * steps] * 20, [steps] * 20)
    unseen = bootstrap_interval([0.0] * 20).high
    assert found.mean == share
    assert max(share - found.low, found.high - share) > unseen / 4
    assert found == ratio_interval([share * steps] * 20 + [0.0] * 5, [steps] * 20 + [0.0] * 5)  # empty items
    if share in (0, 1):
        assert found == bootstrap_interval([share] * 20)


def of_clusters(items: int, share: float, likeness: float, *, equal: bool) -> list[Interval]:
    """Intervals of steps that are right with probability `share`, with correlation `likeness` within an item."""
    rng = random.Random(f"{items} {share} {likeness} {equal}")
    spread = math.inf if likeness == 0 else (1 - likeness) / likeness

    def chance() -> float:
        if likeness in (0, 1):
            return share if likeness == 0 else float(rng.random() < share)
        return rng.betavariate(share * spread, (1 - share) * spread)

    def draw() -> Interval:
        wholes = [20 if equal else rng.randint(1, 40) for _ in range(items)]
        chances = [chance() for _ in range(items)]
        parts = [sum(rng.random() < one for _ in range(whole)) for one, whole in zip(chances, wholes, strict=True)]
        return ratio_interval(parts, wholes)

    return [draw() for _ in range(max(100, 4000 // items))]


@pytest.mark.slow
@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("likeness", [0, 0.05, 0.3, 1])
@pytest.mark.parametrize(
    ("items", "share", "coverage"),
    [
        *((20, 0.5, 0.94), (40, 0.7, 0.94), (100, 0.1, 0.94), (100, 0.9, 0.94)),
        *((5, 0.02, 0.9), (5, 0.5, 0.9), (20, 0.05, 0.9), (20, 0.95, 0.9), (40, 0.02, 0.9), (100, 0.02, 0.9)),
    ],
)
def test_a_ratio_is_covered_however_alike_the_steps_of_an_item_are(
    items: int, share: float, coverage: float, likeness: float, equal: bool
) -> None:
    found = of_clusters(items, share, likeness, equal=equal)
    assert not _too_rarely(sum(one.low <= share <= one.high for one in found), len(found), coverage)
    assert not _too_rarely(sum(share <= one.high for one in found), len(found), 0.95)


@pytest.mark.slow
@given(rows=st.lists(st.tuples(shares, st.floats(1, 2)), min_size=2, max_size=30))
def test_a_ratio_is_a_statistic_of_sums(rows):
    parts, wholes = [list(side) for side in zip(*rows, strict=True)]
    interval = statistic_interval(lambda sums: sums[..., 0] / sums[..., 1], rows)
    assert interval.mean == pytest.approx(ratio_interval(parts, wholes).mean)


def test_a_difference_of_proportions_is_newcombes() -> None:
    """56/70 against 48/80: 0.2 with ends 0.0524 and 0.3339 (Newcombe 1998, table II, row a, method 10)."""
    one, other = bootstrap_interval([1.0] * 56 + [0.0] * 14), bootstrap_interval([1.0] * 48 + [0.0] * 32)
    found, back = independent_difference(one, other), independent_difference(other, one)
    assert [found.mean, found.low, found.high] == pytest.approx([0.2, 0.0524, 0.3339], abs=5e-5)
    assert [back.mean, back.low, back.high] == pytest.approx([-found.mean, -found.high, -found.low])


@pytest.mark.slow
@pytest.mark.parametrize(("here", "there", "items"), [(0.9, 0.9, 60), (0.5, 0.8, 40), (0.05, 0.3, 50)])
def test_an_interval_of_a_difference_covers_it(here: float, there: float, items: int) -> None:
    draw = torch.Generator().manual_seed(1)
    covered = 0
    for _ in range(400):
        a, b = ((torch.rand(items, generator=draw) < rate).double().tolist() for rate in (here, there))
        found = independent_difference(bootstrap_interval(a), bootstrap_interval(b))
        covered += found.low <= here - there <= found.high
    assert 0.92 <= covered / 400 <= 0.99
