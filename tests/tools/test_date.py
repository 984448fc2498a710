"""Questions about dates: the forms that are understood, against the calendar, and what is not answered."""

from __future__ import annotations

import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collm.tools.date import date

FORMS = ["%Y-%m-%d", "%B {day}, %Y", "{day} %B %Y", "%b {day}, %Y", "{day} %b %Y", "%B {day} %Y"]
DAYS = st.dates(datetime.date(1000, 1, 1))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3 days after 2024-02-28 is", " 2024-03-02"),
        ("The delivery 3 days after 2024-02-28 was", " 2024-03-02"),
        ("1 day before March 1, 2024 will be", " February 29, 2024"),
        ("2 weeks from 29 February 2024 is ", "14 March 2024"),
        ("1 MONTH AFTER JAN 31, 2024 is", " Feb 29, 2024"),
        ("1 year after Feb 29, 2024:", " Feb 28, 2025"),
        ("12 months before 29 feb 2024 =", " 28 Feb 2023"),
        ("1 month after April 3 2024 is", " May 3 2024"),
        ("1 month after May 3, 2024 is", " June 3, 2024"),
        ("1,000 days after 2024-01-01 is", " 2026-09-27"),
        ("2024-02-28 + 3 days =", " 2024-03-02"),
        ("2024-02-28+3 days=", "2024-03-02"),
        ("2024-02-28 + 3 days= ", "2024-03-02"),
        ("2024-03-02 \u2212 3 days =", " 2024-02-28"),
        ("March 2, 2024 minus 2 weeks is", " February 17, 2024"),
        ("2024-12-31 plus 1 day is", " 2025-01-01"),
        ("from 2024-02-01 to March 1, 2024 is", " 29 days"),
        ("between 2024-03-01 and 2024-02-29 is", " 1 day"),
        ("between 2024-03-01 and 2024-03-01 are", " 0 days"),
        ("The number of days between 2024-02-01 and 2024-03-01 is", " 29"),
        ("The weekday of 2024-02-29 is", " Thursday"),
        ("the day of the week of 29 February 2024 was", " Thursday"),
        ("the weekday 2 days after February 29, 2024 is", " Saturday"),
        ("2024-02-29 is a", " Thursday"),
        ("Feb 29, 2024 falls on a ", "Thursday"),
        ("2 days after February 29, 2024 was a", " Saturday"),
    ],
)
def test_what_is_understood(text: str, answer: str) -> None:
    assert date(text) == answer
    assert date("As we said, " + text) == answer


@pytest.mark.parametrize(
    "text",
    [
        "",
        "is",
        "this is a",
        "3 days after 2024-02-28",
        "2024-02-28 is",
        "3 days after 2023-02-29 is",
        "2024-13-01 is a",
        "0000-01-01 is a",
        "February 30, 2024 is a",
        "1 day after 9999-12-31 is",
        "1 month before 0001-01-15 is",
        "9999999 years after 2024-01-01 is",
        "9999999 days after 2024-01-01 is",
        "99999999999 days after 2024-01-01 is",
        "1.5 days after 2024-01-01 is",
        "-3 days after 2024-01-01 is",
        "x3 days after 2024-01-01 is",
        "\u00e93 days after 2024-01-01 is",
        "12024-01-01 is a",
        "2 weeks and 3 days after 2024-01-01 is",
        "2 weeks, 3 days after 2024-01-01 is",
        "a few days after 2024-01-01 is a",
        "2024-01-01 + 2 days + 3 days =",
        "3 fortnights after 2024-01-01 is",
        "from 2024-03-01 to 2024-02-01 is",
        "The number of weeks between 2024-02-01 and 2024-03-01 is",
        "The number of working days between 2024-02-01 and 2024-03-01 is",
        "\uff13 days after 2024-01-01 is",
    ],
)
def test_what_is_not_answered(text: str) -> None:
    assert date(text) is None


def shown(day: datetime.date, form: str) -> str:
    return day.strftime(form.format(day=day.day))


@given(DAYS, st.integers(0, 10_000), st.sampled_from(["day", "week"]), st.sampled_from(FORMS), st.booleans())
def test_days_and_weeks(day: datetime.date, count: int, unit: str, form: str, after: bool) -> None:
    step = datetime.timedelta(days=count * (7 if unit == "week" else 1))
    try:
        other = day + step if after else day - step
    except OverflowError:
        expected = None
    else:
        full = form.replace("%b", "%B") if day.month == 5 else form  # May is no abbreviation
        expected = f" {shown(other, full)}"
    if expected is not None and other.year < 1000:
        return
    word = unit if count == 1 else unit + "s"
    assert date(f"{count} {word} {'after' if after else 'before'} {shown(day, form)} is") == expected
    assert date(f"{shown(day, form)} {'+' if after else '-'} {count} {word} =") == expected


@given(DAYS, st.integers(0, 5000))
def test_months_and_years(day: datetime.date, count: int) -> None:
    months = day.year * 12 + day.month - 1 + count
    answer = date(f"{count} months after {day} is")
    if months >= 120_000:
        assert answer is None
        return
    first = datetime.date(months // 12, months % 12 + 1, 1)
    following = None if first >= datetime.date(9999, 12, 1) else (first + datetime.timedelta(days=31)).replace(day=1)
    last = 31 if following is None else (following - first).days
    assert answer == f" {first.replace(day=min(day.day, last))}"
    if count % 12 == 0:
        assert date(f"{count // 12} years after {day} is") == answer


@given(DAYS, DAYS, st.sampled_from(FORMS), st.sampled_from(FORMS))
def test_distances(one: datetime.date, other: datetime.date, form: str, second: str) -> None:
    days = abs((other - one).days)
    said = f" {days} day" + "s" * (days != 1)
    assert date(f"between {shown(one, form)} and {shown(other, second)} is") == said
    assert date(f"from {shown(one, form)} to {shown(other, second)} is") == (said if other >= one else None)
    assert date(f"number of days between {shown(one, form)} and {shown(other, second)} =") == f" {days}"


@given(DAYS, st.sampled_from(FORMS), st.sampled_from(["is a", "was a", "will be a", "falls on a", "fell on a"]))
def test_weekdays(day: datetime.date, form: str, end: str) -> None:
    assert date(f"{shown(day, form)} {end}") == f" {day:%A}"
    assert date(f"The day of the week of {shown(day, form)} is") == f" {day:%A}"


@pytest.mark.parametrize("piece", ["1", "2024-01-01 ", "1 day from ", "number of ", " is a", "= ", "+", "May 1, "])
@pytest.mark.parametrize("end", ["", " is", "=", ":", " a", "2024-02-29 is a", " 3 days =", "2024 was"])
def test_a_very_long_text(piece: str, end: str) -> None:
    answer = date(piece * (10**6 // len(piece)) + end)
    assert answer is None or len(answer) < 30


WORDS = [
    "1",
    "12",
    "2024",
    "-",
    "2024-02-30",
    "0001-01-01",
    "day",
    "weeks",
    "months",
    "years",
    "after",
    "before",
    "from",
]
WORDS += [
    "to",
    "between",
    "and",
    "plus",
    "minus",
    "+",
    "May",
    "feb",
    ",",
    "is",
    "was",
    "a",
    "=",
    ":",
    "9999999",
    "weekday of",
]


@pytest.mark.slow
@given(
    st.one_of(st.text(), st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join)), st.sampled_from(["", " is", "="])
)
@settings(max_examples=500)
def test_any_text(text: str, end: str) -> None:
    answer = date(text + end)
    assert answer is None or 0 < len(answer) < 30
