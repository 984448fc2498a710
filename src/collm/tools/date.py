"""The date tool: dates before or after another date, days between two dates, and weekdays."""

from __future__ import annotations

import re
from calendar import monthrange
from datetime import date as Day
from datetime import timedelta

_CONTEXT_CHARS = 160  # characters at the end of the text to read
_DIGIT_CHARS = 40  # characters at the end of the text that must include a digit

_MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
_WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]

_ENDS = tuple(word + space for word in (" is", " was", " be", " are", " were", " a", "=", ":") for space in ("", " "))
_DIGIT = re.compile(r"[0-9]")
_MONTH = "|".join([*_MONTHS, *(month[:3] for month in _MONTHS)])
_DATE = rf"(?:\d{{4}}-\d\d-\d\d|(?:{_MONTH})\s\d{{1,2}},?\s\d{{4}}|\d{{1,2}}\s(?:{_MONTH}),?\s\d{{4}})"
_COUNT = r"(?:\d{1,3}(?:,\d{3}){1,2}|\d{1,7})"
_UNIT = r"\s(?:day|week|month|year)s?"

_POINT = re.compile(
    rf"(?P<weekday>(?:weekday|day\sof\sthe\sweek)\s(?:(?:of|on)\s)?)?"
    rf"(?:(?P<count>{_COUNT}{_UNIT})\s(?P<way>after|before|from)\s(?P<date>{_DATE})"
    rf"|(?P<first>{_DATE})(?:\s?(?P<sign>plus|minus|[-+\u2212])\s?(?P<step>{_COUNT}{_UNIT}))?)"
    r"(?:\s(?P<a>(?:is|was|will\sbe|falls\son|fell\son)\sa)|\s(?:is|was|will\sbe)|:|(?P<equals>\s?=))\s?\Z",
    re.ASCII | re.IGNORECASE,
)
_DISTANCE = re.compile(
    rf"(?P<number>number\sof\s(?P<counted>\w+)\s)?(?:(?P<from>from)\s(?P<first>{_DATE})\sto|between\s(?P<one>{_DATE})\sand)"
    rf"\s(?P<second>{_DATE})(?:\s(?:is|are|was|were)|(?P<equals>\s?=))\s?\Z",
    re.ASCII | re.IGNORECASE,
)
_CONTINUES = re.compile(
    r"\b(?:after|before|from|plus|minus|to|and|between|until|since)\s\Z|[-+\u2212]\s?\Z|(?:day|week|month|year)s?,\s\Z"
    r"|\b(?:days|weeks|months|years|hours|minutes|seconds)\s\Z",
    re.ASCII | re.IGNORECASE,
)


def date(text: str) -> str | None:
    """Answer the question about dates at the end of a text.

    The following forms are supported, where DATE is 2024-02-29, February 29, 2024, 29 February 2024, or with Feb. The
    case of letters does not matter before the last word.

        N days after DATE is             the date; day, week, month, year; after, before, from; is, was, will be, :, =
        DATE plus N days is              the date; plus, minus, +, -; the rest as above
        the weekday of DATE is           `Thursday`; weekday, day of the week; DATE may be one of the forms above
        DATE is a                        `Thursday`; is a, was a, will be a, falls on a, fell on a; DATE as above
        between DATE and DATE is         `29 days`; is, are, was, were, =
        from DATE to DATE is             `29 days`; None if the second is earlier
        number of days between DATE ..   `29`; also with from

    The answer has the format of the given date. If adding months or years leads past the end of a month, it is the last
    day of that month: one month after 2024-01-31 is 2024-02-29. The answer begins with a space unless the text ends
    with one, or with `=` directly after a unit or date.

    Returns:
        The text that follows, or None if the text has none of these forms, or has a date that does not exist or is
        outside of the years 1 to 9999.
    """
    if not text.endswith(_ENDS) or not _DIGIT.search(text[-_DIGIT_CHARS:]):
        return None
    context = text[-_CONTEXT_CHARS:]
    try:
        return _point(context) or _distance(context)
    except (ValueError, OverflowError):  # no such date
        return None


def _point(text: str) -> str | None:
    """Answer a question for a date or weekday."""
    match = _POINT.search(text)
    if match is None or not _is_whole_question(match, text):
        return None
    written = match["date"] or match["first"]
    moved = match["count"] or match["step"]
    day = _read(written)
    if moved:
        back = (match["way"] or match["sign"]).lower() in ("before", "minus", "-", "\u2212")
        day = _shift(day, moved.lower(), -1 if back else 1)
    if match["weekday"] or match["a"]:
        answer = _WEEKDAYS[day.weekday()]
    elif moved:
        answer = _write(day, written)
    else:
        return None
    return _with_space(match, text, answer)


def _distance(text: str) -> str | None:
    """Answer a question for the days between two dates."""
    match = _DISTANCE.search(text)
    if match is None or not _is_whole_question(match, text):
        return None
    days = (_read(match["second"]) - _read(match["first"] or match["one"])).days
    if (match["from"] and days < 0) or (match["counted"] or "days").lower() != "days":
        return None
    unit = "" if match["number"] else " day" if abs(days) == 1 else " days"
    return _with_space(match, text, f"{abs(days)}{unit}")


def _is_whole_question(match: re.Match[str], text: str) -> bool:
    """Whether the match begins at a word boundary and is not part of a longer question."""
    prefix = text[: match.start()]
    attached = prefix and (prefix[-1].isalnum() or prefix[-1] in "_.,-/+$")
    return not attached and not _CONTINUES.search(prefix)


def _with_space(match: re.Match[str], text: str, answer: str) -> str:
    return answer if text[-1].isspace() or match["equals"] == "=" else f" {answer}"


def _shift(day: Day, count: str, sign: int) -> Day:
    """The date `count` units (such as "3 weeks") later, or earlier if `sign` is -1."""
    digits, unit = count.split()
    number, unit = sign * int(digits.replace(",", "")), unit.rstrip("s")
    if unit in ("day", "week"):
        return day + timedelta(days=number * (7 if unit == "week" else 1))
    month = day.year * 12 + day.month - 1 + number * (12 if unit == "year" else 1)
    year, month = month // 12, month % 12 + 1
    return Day(year, month, min(day.day, monthrange(year, month)[1]))


def _read(written: str) -> Day:
    """Parse a date; a ValueError if it does not exist."""
    if "-" in written:
        return Day(*map(int, written.split("-")))
    first, second, year = written.replace(",", "").split()
    month, day = (second, first) if first.isdigit() else (first, second)
    return Day(int(year), [name[:3] for name in _MONTHS].index(month[:3].capitalize()) + 1, int(day))


def _write(day: Day, like: str) -> str:
    """Write a date in the format of another."""
    if "-" in like:
        return day.isoformat()
    first, second, _ = like.split()
    comma = "," if "," in like else ""
    name = _MONTHS[day.month - 1]
    model = (second if first.isdigit() else first).rstrip(",").lower()
    month = name[:3] if len(model) == 3 and model != "may" else name
    year = f"{day.year:04}"
    return f"{day.day} {month}{comma} {year}" if first.isdigit() else f"{month} {day.day}{comma} {year}"
