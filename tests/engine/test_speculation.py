"""What is learnt of costs and chances, and the plans at the ends where the best one is plain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collm.engine.speculation import (
    AcceptanceRates,
    PassTimes,
    assistant_draft_length,
    expected_run,
    guess_depth,
    lookup_length,
    pays,
    wait_steps,
)

SIZES = [2**power for power in range(10)]
CHANCES = st.floats(0, 1)


def passes(seconds: Callable[[int], float], sizes: list[int] = SIZES) -> PassTimes:
    times = PassTimes()
    for tokens in sizes:
        times.record(tokens, seconds(tokens))
    return times


def flat(seconds: float) -> PassTimes:
    return passes(lambda _: seconds)


def by_the_token(seconds: float) -> PassTimes:
    return passes(lambda tokens: seconds * tokens)


# Pass times


def test_passes_that_were_never_seen_look_free() -> None:
    assert [PassTimes().at(tokens) for tokens in (0, 1, 7.5, 1000)] == [0.0] * 4


def test_beyond_what_was_seen_times_are_flat() -> None:
    times = passes(lambda tokens: tokens / 2, [4, 16])
    assert [times.at(tokens) for tokens in (0, 1, 3.9, 4)] == [2.0] * 4
    assert [times.at(tokens) for tokens in (16, 16.1, 5000)] == [8.0] * 3


def test_times_are_straight_lines_between_what_was_seen() -> None:
    times = passes({4: 2.0, 16: 8.0, 32: 9.0}.__getitem__, [16, 4, 32])
    assert [times.at(tokens) for tokens in (7, 10, 20, 28)] == pytest.approx([3.5, 5.0, 8.25, 8.75])


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0.001, 1.0), min_size=len(SIZES), max_size=len(SIZES)), st.integers(1, 5))
def test_growing_times_are_reproduced_where_seen_and_grow_between(growth: list[float], repeats: int) -> None:
    truth = {tokens: sum(growth[: place + 1]) for place, tokens in enumerate(SIZES)}
    times = passes(truth.__getitem__, SIZES * repeats)
    assert [times.at(tokens) for tokens in SIZES] == pytest.approx(list(truth.values()))
    fine = [times.at(quarters / 4) for quarters in range(4 * SIZES[-1])]
    assert all(later >= earlier - 1e-9 for earlier, later in pairwise(fine))


def test_a_slow_first_pass_is_forgotten() -> None:
    times = PassTimes()
    for seconds in (50.0, 1.0, 1.0):
        times.record(8, seconds)
    assert times.at(8) == 1.0


def test_one_slow_pass_among_many_counts_for_little_and_a_lasting_change_is_learnt() -> None:
    times = PassTimes()
    for _ in range(10):
        times.record(8, 1.0)
    times.record(8, 1000.0)
    assert 1.0 < times.at(8) <= 1.2
    for _ in range(100):
        times.record(8, 3.0)
    assert times.at(8) == pytest.approx(3.0, rel=0.01)


# Acceptance rates


def changes(acceptance: AcceptanceRates) -> dict[str, int]:
    """Which chances rose (1) and which fell (-1)."""
    before, after = asdict(AcceptanceRates()), asdict(acceptance)
    moved = [name for name in after if name != "previous" and after[name] != before[name]]
    return {name: 1 if after[name] > before[name] else -1 for name in moved}


@pytest.mark.parametrize(
    ("previous", "author", "predicted", "token_id", "expected"),
    [
        (0, 2, None, 5, {"start": 1}),
        (0, 0, None, 5, {"start": -1}),
        (1, 1, None, 5, {"run": 1}),
        (1, 0, None, 5, {"run": -1}),
        (1, 2, None, 5, {"run": -1}),
        (0, 0, 5, 5, {"start": -1, "lookup": 1}),
        (2, 2, 5, 6, {"run": 1, "lookup": -1}),
        (0, 1, 0, 0, {"start": 1, "lookup": 1}),
    ],
)
def test_a_token_moves_the_chances_it_bears_on(
    previous: int, author: int, predicted: int | None, token_id: int, expected: dict[str, int]
) -> None:
    acceptance = AcceptanceRates(previous=previous)
    acceptance.observe_token(author, predicted, token_id)
    assert acceptance.previous == author
    assert changes(acceptance) == expected


@pytest.mark.parametrize(("agreed", "expected"), [(True, {"agree": 1}), (False, {"agree": -1})])
def test_an_answer_moves_only_the_chance_of_agreement(agreed: bool, expected: dict[str, int]) -> None:
    acceptance = AcceptanceRates()
    acceptance.observe_agreement(agreed)
    assert changes(acceptance) == expected


def test_chances_approach_what_always_happens() -> None:
    acceptance = AcceptanceRates()
    for _ in range(100):
        acceptance.observe_token(1, 3, 3)
        acceptance.observe_token(0, None, 3)
        acceptance.observe_agreement(True)
        acceptance.observe_stand(True)
    expected = {"start": 1.0, "run": 0.0, "agree": 1.0, "lookup": 1.0, "previous": 0, "stands": 1.0, "judged": 100}
    assert asdict(acceptance) == pytest.approx(expected, abs=1e-3)


def test_the_first_tokens_that_stand_count_most() -> None:
    acceptance = AcceptanceRates()
    acceptance.observe_stand(True)
    assert changes(acceptance) == {"stands": 1, "judged": 1}
    assert acceptance.stands > 0.5


def test_a_copy_of_odds_goes_its_own_way() -> None:
    acceptance = AcceptanceRates(start=0.5)
    copy = acceptance.copy()
    assert copy == acceptance
    copy.observe_token(1, None, 1)
    assert acceptance == AcceptanceRates(start=0.5)


@settings(deadline=None, max_examples=50)
@given(st.floats(0.05, 1), st.floats(0, 0.95))
def test_the_rate_is_the_share_at_which_deferrals_begin_as_often_as_they_end(start: float, run: float) -> None:
    rate = AcceptanceRates(start=start, run=run).rate
    assert rate == pytest.approx(rate * run + (1 - rate) * start)


@settings(deadline=None, max_examples=50)
@given(CHANCES, CHANCES)
def test_the_rate_is_a_share_and_never_0(start: float, run: float) -> None:
    assert 0.01 <= AcceptanceRates(start=start, run=run).rate <= 1


# Plans


@settings(deadline=None, max_examples=50)
@given(st.floats(0, 0.99), st.integers(0, 12))
def test_an_expected_run_is_the_geometric_sum(chance: float, length: int) -> None:
    assert expected_run(chance, length) == pytest.approx((1 - chance ** (length + 1)) / (1 - chance))


def test_an_expected_run_counts_the_certain_token_and_every_guess_that_must_hold() -> None:
    assert [expected_run(1.0, length) for length in range(4)] == [1, 2, 3, 4]
    assert [expected_run(0.0, length) for length in range(4)] == [1, 1, 1, 1]


def test_lookup_that_never_holds_is_not_drafted_from_and_one_that_always_does_is_at_full_length() -> None:
    for active in (1, 4):
        assert lookup_length(AcceptanceRates(lookup=0.0), flat(1.0), flat(1.0), active, longest=6) == 0
        assert lookup_length(AcceptanceRates(lookup=0.001), flat(1.0), flat(1.0), active, longest=6) == 0
        assert lookup_length(AcceptanceRates(lookup=0.99), flat(1.0), flat(1.0), active, longest=6) == 6
        assert lookup_length(AcceptanceRates(lookup=1.0), flat(1.0), flat(1.0), active, longest=6) == 6


def test_lookup_drafts_do_not_pay_where_every_token_read_costs_the_same() -> None:
    assert lookup_length(AcceptanceRates(lookup=1.0), by_the_token(1.0), flat(1.0), active=4, longest=6) == 0


def test_lookup_drafts_are_shorter_where_an_assistant_reads_what_does_not_hold() -> None:
    acceptance = AcceptanceRates(start=0.5, run=0.5, lookup=0.7)
    free = lookup_length(acceptance, flat(1.0), flat(5.0), active=1, longest=8)
    costly = lookup_length(acceptance, flat(1.0), by_the_token(5.0), active=1, longest=8)
    assert costly < free


def test_guesses_that_never_hold_are_not_gathered() -> None:
    assert guess_depth(AcceptanceRates(agree=0.0), flat(0.1), flat(10.0), active=2, longest=8) == 1


def test_guesses_are_gathered_for_an_expensive_assistant_that_mostly_agrees() -> None:
    acceptance = AcceptanceRates(agree=0.95)
    assert 1 < guess_depth(acceptance, flat(0.01), flat(10.0), active=2, longest=8) <= 8
    assert guess_depth(acceptance, flat(0.01), flat(10.0), active=2, longest=1) == 1


def test_guesses_that_half_hold_are_gathered_only_if_what_is_lost_was_cheap() -> None:
    acceptance = AcceptanceRates(agree=0.5)
    assert guess_depth(acceptance, flat(0.0), flat(1.0), active=2, longest=8) > 1
    assert guess_depth(acceptance, flat(10.0), flat(1.0), active=2, longest=8) == 1


def test_guesses_are_not_gathered_where_the_assistants_passes_cost_by_the_token() -> None:
    assert guess_depth(AcceptanceRates(agree=0.95), flat(0.01), by_the_token(10.0), active=1, longest=8) == 1


def test_an_assistant_writes_ahead_only_in_runs_and_only_to_save_a_base_that_costs_as_much() -> None:
    assert assistant_draft_length(AcceptanceRates(run=0.05), flat(1.0), flat(1.0), longest=6) == 0
    assert 0 < assistant_draft_length(AcceptanceRates(run=0.97), flat(1.0), flat(1.0), longest=6) <= 6
    assert assistant_draft_length(AcceptanceRates(run=1.0), flat(1.0), flat(1.0), longest=6) == 6
    assert assistant_draft_length(AcceptanceRates(run=0.97), flat(0.01), flat(1.0), longest=6) == 0


def test_another_token_is_drafted_while_those_before_it_probably_stand() -> None:
    def drafts(stands: float, base: float, chances: list[float]) -> bool:
        return pays(chances, stands, flat(base), [flat(6.0)], active=1)

    assert drafts(0.8, 1.0, [0.8] * 3)
    assert not drafts(0.8, 1.0, [0.8] * 12)
    assert not drafts(0.8, 1.0, [0.8, 0.1])  # where the base defers, its token hardly stands
    assert not drafts(0.0, 1.0, [0.0])
    assert not drafts(0.5, 9.0, [0.5])
    assert not pays([1.0], 1.0, PassTimes(), [PassTimes()], active=1)  # nothing was timed


def test_no_token_is_drafted_where_reading_it_costs_as_much_as_writing_it() -> None:
    assert not pays([0.8], 0.8, flat(0.1), [by_the_token(1.0)], active=16)
    assert pays([0.8], 0.8, flat(0.1), [flat(1.0)], active=16)


def test_waiting_does_not_pay_where_passes_cost_by_the_token() -> None:
    assert wait_steps(0.2, 0.2, by_the_token(0.1), by_the_token(1.0), active=8, longest=4) == 0


@pytest.mark.parametrize("active", [4, 32])
def test_the_base_goes_on_while_an_expensive_call_waits_for_company(active: int) -> None:
    assert 0 < wait_steps(0.1, 0.1, flat(0.01), flat(1.0), active, longest=4) <= 4
    assert wait_steps(0.1, 0.1, flat(0.01), flat(1.0), active, longest=0) == 0


def test_waiting_does_not_pay_where_hardly_a_sequence_would_go_on() -> None:
    assert wait_steps(0.97, 0.97, flat(0.01), flat(1.0), active=8, longest=4) == 0


def test_waiting_does_not_pay_where_the_base_is_the_expensive_one() -> None:
    assert wait_steps(0.3, 0.3, flat(1.0), flat(0.01), active=8, longest=4) == 0


@settings(deadline=None, max_examples=50)
@given(
    chances=st.tuples(CHANCES, CHANCES, CHANCES, CHANCES),
    costs=st.tuples(*[st.floats(0, 10)] * 4),
    active=st.integers(1, 32),
    longest=st.integers(1, 8),
)
def test_no_plan_exceeds_its_longest(
    chances: tuple[float, float, float, float],
    costs: tuple[float, float, float, float],
    active: int,
    longest: int,
) -> None:
    acceptance = AcceptanceRates(*chances)
    base, assistant = (passes(lambda n, c=c, s=s: c + s * n) for c, s in (costs[:2], costs[2:]))  # type: ignore[misc]
    assert 0 <= lookup_length(acceptance, base, assistant, active, longest) <= longest
    assert 1 <= guess_depth(acceptance, base, assistant, active, longest) <= longest
    assert 0 <= assistant_draft_length(acceptance, base, assistant, longest) <= longest
    assert 0 <= wait_steps(acceptance.start, acceptance.run, base, assistant, active, longest) <= longest


def test_before_any_pass_was_timed_nothing_is_planned() -> None:
    unknown = PassTimes(), PassTimes()
    sure = AcceptanceRates(start=0.5, run=1.0, agree=1.0, lookup=1.0)
    assert lookup_length(sure, *unknown, 4, 6) == 0
    assert guess_depth(sure, *unknown, 4, 6) == 1
    assert assistant_draft_length(sure, *unknown, 6) == 0
    assert wait_steps(0.1, 0.1, *unknown, 4, 6) == 0
