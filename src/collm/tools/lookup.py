"""A table of facts by pattern: `The capital of {country} is {capital}.` and what to fill in."""

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
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_LONGEST_TAIL = 16  # characters at the end of a text by which most are told to match nothing

_Fact = tuple[str, str, dict[str, Any]]
"""Where it stands, its pattern and its fields."""


class Lookup:
    """The facts of a table, looked up by how a text ends.

    A fact is a pattern, a text with {field} placeholders, and the fields. Where the text ends with the pattern filled
    in up to its last placeholder, with or without the white space just before it, the value of that field follows, and
    what the pattern says after it. No match begins in the middle of a word; the longest one counts.

    A CSV file has a header, `pattern` and the fields, and one fact a row. A JSON file has a list of such objects, or
    {"patterns": [text, ..], "facts": [{field: value, ..}, ..]}: every pattern with every fact that has its fields.
    Values are texts or numbers; a number stays as it is written.

    Args:
        path: the table, .csv or .json, in UTF-8.

    Raises:
        DataError: it cannot be read, has no facts, or has one that cannot be used or contradicts another.
    """

    def __init__(self, path: Path) -> None:
        self._following: dict[str, str] = {}
        told: dict[str, tuple[str, str]] = {}
        for where, pattern, fields in _facts(path):
            opening, following = _filled(where, pattern, fields)
            bare = opening.rstrip()
            answer = opening[len(bare) :] + following
            before, other = told.setdefault(bare, (where, answer))
            if answer != other:
                raise DataError(
                    f"{where}: {bare!r} is followed by {answer!r}, but in {before} by {other!r}; expected one answer "
                    "to one beginning"
                )
            self._following[bare] = answer
            self._following[opening] = following
        if not told:
            raise DataError(f"{path} has no facts, expected at least one")
        self._tail = min(_LONGEST_TAIL, min(map(len, told)))
        lengths: dict[str, set[int]] = {}
        for opening in self._following:
            lengths.setdefault(opening[-self._tail :], set()).add(len(opening))
        self._lengths = {tail: sorted(each, reverse=True) for tail, each in lengths.items()}

    def __call__(self, text: str) -> str | None:
        """The text that follows, or None if the text so far does not end as a fact begins."""
        for length in self._lengths.get(text[-self._tail :], ()):
            following = self._following.get(text[-length:])
            start = max(len(text) - length, 0)
            if following is not None and not (start and _in_word(text[start - 1]) and _in_word(text[start])):
                return following
        return None


def _in_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def _filled(where: str, pattern: str, fields: dict[str, Any]) -> tuple[str, str]:
    """The pattern up to its last placeholder and from there on, filled in."""
    parts = _PLACEHOLDER.split(pattern)
    for at in range(1, len(parts), 2):
        value = fields.get(parts[at], "")
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{where}: the field {parts[at]!r} is {value!r}, expected a text that is not blank")
        parts[at] = value
    opening, following = "".join(parts[:-2]), "".join(parts[-2:])
    try:
        (opening + following).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: {opening + following!r} is no Unicode text ({error.reason})") from None
    return opening, following


def _facts(path: Path) -> Iterator[_Fact]:
    """The facts of a file in their order.

    Raises:
        DataError: it cannot be read or parsed, or a pattern cannot be used.
    """
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".json"):
        raise DataError(f"{path} ends in {path.suffix!r}, expected a table in a .csv or a .json file")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"could not read {path}: {error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 at byte {error.start}; save it as UTF-8") from error
    return _csv_facts(path, text) if suffix == ".csv" else _json_facts(path, text)


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
                yield _checked(where, fields)
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not CSV ({error})") from error


def _json_facts(path: Path, text: str) -> Iterator[_Fact]:
    try:
        content = json.loads(text, parse_int=str, parse_float=str, parse_constant=str)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    if isinstance(content, list):
        for number, fields in enumerate(content, start=1):
            yield _checked(f"{path}, fact {number}", fields)
        return
    shape = {name: type(each) for name, each in content.items()} if isinstance(content, dict) else type(content)
    if shape != {"patterns": list, "facts": list}:
        raise DataError(f'{path}: expected a list of facts or {{"patterns": [..], "facts": [..]}}')
    for at, pattern in enumerate(content["patterns"], start=1):
        names = set(_placeholders(f"{path}, pattern {at}", pattern))
        fits = False
        for number, fields in enumerate(content["facts"], start=1):
            where = f"{path}, pattern {at} with fact {number}"
            _require_fields(where, fields)
            if names <= fields.keys():
                fits = True
                yield where, pattern, fields
        if not fits:
            raise DataError(f"{path}, pattern {at}: no fact has all of {sorted(names)}, the fields of {pattern!r}")


def _checked(where: str, fields: Any) -> _Fact:
    """The fact of a row."""
    _require_fields(where, fields)
    pattern = fields.get(_PATTERN)
    for name in _placeholders(where, pattern):
        if name == _PATTERN or name not in fields:
            known = sorted(set(fields) - {_PATTERN})
            raise DataError(f"{where}: unknown placeholder {{{name}}} in {pattern!r}, expected one of {known}")
    return where, pattern, fields


def _placeholders(where: str, pattern: Any) -> list[str]:
    """The fields that a pattern names.

    Raises:
        DataError: it is no text, names none, or has nothing before the last one.
    """
    if not isinstance(pattern, str) or not pattern.strip():
        raise DataError(
            f"{where}: the pattern is {pattern!r}, expected a text such as 'The capital of {{country}} is {{capital}}.'"
        )
    parts = _PLACEHOLDER.split(pattern)
    if len(parts) == 1 or any(brace in text for text in parts[::2] for brace in "{}"):
        raise DataError(f"{where}: the pattern is {pattern!r}, expected a text with {{field}} placeholders")
    if not "".join(parts[:-2]).strip():
        raise DataError(
            f"{where}: the pattern {pattern!r} has nothing before its last placeholder, so it fits any text"
        )
    return parts[1::2]


def _require_fields(where: str, fields: Any) -> None:
    if not isinstance(fields, dict):
        raise DataError(f"{where}: {fields!r} came, expected an object of fields")
