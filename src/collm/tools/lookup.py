"""The lookup tool: a table of patterns such as `The capital of {country} is {capital}.` with their fields."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from collm.errors import DataError

_PATTERN = "pattern"
_WITHIN_WORD = re.compile(r"\w\w")
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_MAX_CHARACTERS = 100_000_000  # of all facts together, as a short pattern may repeat a long value
_MAX_TAIL = 16  # characters at the end of a text by which most texts without a match are recognised

_Fact = tuple[str, str, dict[str, Any]]
"""Location, pattern and fields of a fact."""


class Lookup:
    """Facts of a table, looked up by the end of a text.

    A fact is a pattern, a text with {field} placeholders, and the values of its fields. If the text ends with the
    filled pattern up to its last placeholder, with or without the white space before it, the value of that field
    follows, and then the rest of the pattern. A match does not begin within a word, and the longest match wins.

    A CSV file has a header with `pattern` and the fields, and a fact per row. A JSON file has a list of such objects.
    Values are texts or numbers, which are kept as written.

    Args:
        path: the table, .csv or .json, in UTF-8.

    Raises:
        DataError: the table cannot be read, has no facts, or has a fact that is invalid or contradicts another.
    """

    def __init__(self, path: Path) -> None:
        self._following: dict[str, str] = {}
        answers: dict[str, tuple[str, str]] = {}
        left = _MAX_CHARACTERS
        for where, pattern, fields in _facts(path):
            opening, following = _fill(where, pattern, fields, left)
            left -= len(opening) + len(following)
            bare = opening.rstrip()
            answer = opening[len(bare) :] + following
            before, other = answers.setdefault(bare, (where, answer))
            if answer != other:
                raise DataError(
                    f"{where}: {bare!r} is followed by {answer!r}, but in {before} by {other!r}; expected the same "
                    "answer"
                )
            self._following[bare] = answer
            self._following[opening] = following
        if not answers:
            raise DataError(f"{path} has no facts, expected at least one")
        self._tail = min(_MAX_TAIL, min(map(len, answers)))
        lengths: dict[str, set[int]] = {}
        for opening in self._following:
            lengths.setdefault(opening[-self._tail :], set()).add(len(opening))
        self._lengths = {tail: sorted(each, reverse=True) for tail, each in lengths.items()}

    def __call__(self, text: str) -> str | None:
        """The text that follows, or None if the text does not end with the beginning of a fact."""
        for length in self._lengths.get(text[-self._tail :], ()):
            following = self._following.get(text[-length:])
            start = max(len(text) - length, 0)
            if following is not None and not (start and _WITHIN_WORD.match(text, start - 1)):
                return following
        return None


def _fill(where: str, pattern: str, fields: dict[str, Any], most: int) -> tuple[str, str]:
    """Fill a pattern. Returns its text before the last placeholder, and the text from there on."""
    parts = _PLACEHOLDER.split(pattern)
    for at in range(1, len(parts), 2):
        value = fields.get(parts[at], "")
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{where}: the field {parts[at]!r} is {value!r}, expected a text that is not blank")
        parts[at] = value
    if sum(map(len, parts)) > most:
        raise DataError(
            f"{where}: the facts have over {_MAX_CHARACTERS} characters in total; use fewer or shorter ones"
        )
    opening, following = "".join(parts[:-2]), "".join(parts[-2:])
    try:
        (opening + following).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: {opening + following!r} is not valid Unicode ({error.reason})") from None
    return opening, following


def _facts(path: Path) -> Iterator[_Fact]:
    """Read the facts of a file, in order."""
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".json"):
        raise DataError(f"{path} has the suffix {path.suffix!r}, expected a .csv or .json file")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"could not read {path}: {error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 at byte {error.start}; save it as UTF-8") from error
    if suffix == ".csv":
        yield from _csv_facts(path, text)
        return
    try:
        content = json.loads(text, parse_int=str, parse_float=str, parse_constant=str)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, list):
        raise DataError(f"{path}: expected a list of facts, each with its {_PATTERN!r} and fields")
    for number, fields in enumerate(content, start=1):
        yield _check_fact(f"{path}, fact {number}", fields)


def _csv_facts(path: Path, text: str) -> Iterator[_Fact]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    try:
        for cells in filter(None, reader):
            where = f"{path}, line {reader.line_num}"
            if header is None:
                header = [cell.strip() for cell in cells]
                if _PATTERN not in header or len(set(header)) < len(header):
                    raise DataError(
                        f"{where}: the header is {cells!s:.80}, expected {_PATTERN!r} and fields, each once"
                    )
            elif len(cells) > len(header):
                raise DataError(f"{where}: there are {len(cells)} cells, expected {len(header)} as in the header")
            else:
                fields = dict.fromkeys(header, "") | dict(zip(header, cells, strict=False))
                yield _check_fact(where, fields)
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not CSV ({error})") from error


def _check_fact(where: str, fields: Any) -> _Fact:
    """Check the pattern and fields of a row."""
    if not isinstance(fields, dict):
        raise DataError(f"{where}: the fact is {fields!r}, expected an object of fields")
    pattern = fields.get(_PATTERN)
    if not isinstance(pattern, str) or not pattern.strip():
        raise DataError(
            f"{where}: the pattern is {pattern!r}, expected a text such as 'The capital of {{country}} is {{capital}}.'"
        )
    parts = _PLACEHOLDER.split(pattern)
    if len(parts) == 1 or any(brace in text for text in parts[::2] for brace in "{}"):
        raise DataError(f"{where}: the pattern is {pattern!r}, expected a text with {{field}} placeholders")
    if not "".join(parts[:-2]).strip():
        raise DataError(
            f"{where}: the pattern {pattern!r} has nothing before its last placeholder, so it would match any text"
        )
    known = sorted(set(fields) - {_PATTERN})
    for name in parts[1::2]:
        if name not in known:
            raise DataError(f"{where}: unknown placeholder {{{name}}} in {pattern!r}, expected one of {known}")
    return where, pattern, fields
