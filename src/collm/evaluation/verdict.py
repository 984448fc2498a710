"""A comparison in words: whether collaboration pays, or one model alone is the better choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from collm.evaluation.systems import COLLABORATION, is_threshold, short_names

if TYPE_CHECKING:
    from collm.evaluation.intervals import Interval
    from collm.evaluation.results import SystemResult


def verdict(task: str, measure: str | None, results: Sequence[SystemResult]) -> str:
    """Sentences that compare the collaboration with the base, each assistant and the other systems.

    Args:
        task: the task's name.
        measure: its main measure; None if it has none.
        results: the results of all systems.
    """
    by_name = {result.name: result for result in results}
    own = by_name[COLLABORATION]
    if measure is None:
        return f"Task {task} gives no score by itself; outputs/ holds the answers of every system for its judge."
    parts = [_own_words(own, measure)]
    if "base" in by_name:
        parts.append(_against_base(by_name["base"]))
    assistants = [result for result in results if result.name.startswith("assistant")]
    parts += [_against_assistant(own, result) for result in assistants]
    short, seen = short_names(list(by_name)), {COLLABORATION, "base", *(result.name for result in assistants)}
    others = {short[name]: result for name, result in by_name.items() if name not in seen and not is_threshold(name)}
    return " ".join([*parts, *_against_others(others)])


def _own_words(own: SystemResult, measure: str) -> str:
    score = own.measures[measure]
    return (
        f"The collaboration reaches {measure} {score.mean:.1%} ({score.low:.1%} to {score.high:.1%}) on "
        f"{own.num_items} items with {own.deferral_rate:.1%} of the tokens written by assistants."
    )


def _against_base(base: SystemResult) -> str:
    assert base.difference is not None
    if base.difference.high < 0:
        return f"It is better than the base alone by {_points(base.difference, -1)}."
    if base.difference.low > 0:
        return f"The base alone is better, by {_points(base.difference, 1)}, and cheaper: use it alone."
    return (
        f"The base alone cannot be told from it (difference {_points(base.difference, -1)}) and is cheaper: of the "
        "two, on this evidence, the base alone is the better choice."
    )


def _against_assistant(own: SystemResult, other: SystemResult) -> str:
    assert other.difference is not None
    cost = own.flops / other.flops if other.flops else float("nan")
    speed = own.tokens_per_s / other.tokens_per_s if other.tokens_per_s else float("nan")
    costs = f"{cost:.2f} times its FLOPs, {speed:.2f} times its tokens per second"
    if other.difference.low > 0:
        worse = f"The {other.name} alone is better by {_points(other.difference, 1)}; the collaboration takes {costs}"
        return f"{worse}." if cost < 1 else f"{worse}: of the two the {other.name} alone is the better choice."
    known = "is better than" if other.difference.high < 0 else "cannot be told from"
    difference = f"(difference {_points(other.difference, -1)})"
    compared = f"The collaboration {known} the {other.name} alone {difference} and takes {costs}"
    if other.difference.high >= 0 and cost >= 1:
        return f"{compared}: of the two the {other.name} alone is the better choice."
    return f"{compared}."


def _against_others(others: Mapping[str, SystemResult]) -> list[str]:
    """One sentence, or none."""
    found = {name: result.difference for name, result in others.items() if result.difference is not None}
    groups = {
        "is better than": [name for name, one in found.items() if one.high < 0],
        "cannot be told from": [name for name, one in found.items() if one.low <= 0 <= one.high],
        "is worse than": [name for name, one in found.items() if one.low > 0],
    }
    parts = [f"{how} {_listed(names)}" for how, names in groups.items() if names]
    return [f"The collaboration {'; it '.join(parts)}."] if parts else []


def _listed(names: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    *before, last = names
    return f"{', '.join(before)} and {last}" if before else last


def _points(difference: Interval, sign: int) -> str:
    """A difference in percentage points with its interval; `sign` -1 reverses it."""
    mean, low, high = (100 * sign * end + 0.0 for end in (difference.mean, difference.low, difference.high))  # no -0.0
    return f"{mean:+.1f} points ({min(low, high):+.1f} to {max(low, high):+.1f})"
