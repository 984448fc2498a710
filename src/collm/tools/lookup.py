"""The lookup tool: a table of patterns such as `The capital of {country} is {capital}.` with their fields."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from collm.errors import DataError

_PATTERN = "pattern"
_WITHIN_WORD = re.compile(r"\w\w")
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_MAX_CHARACTERS = 100_000_000  # of all facts together, as a short pattern may repeat a long value
_MAX_TAIL = 16  # characters at the end of a text by which most texts without a match are recognised


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
        sources: dict[str, str] = {}
        left = _MAX_CHARACTERS
        for where, fields in _facts(path):
            opening, following = _fill(where, fields, left)
            left -= len(opening) + len(following)
            bare = opening.rstrip()
            answer = opening[len(bare) :] + following
            if bare in sources and answer != self._following[bare]:
                other = f"in {sources[bare]} by {self._following[bare]!r}; expected the same answer"
                raise DataError(f"{where}: {bare!r} is followed by {answer!r}, but {other}")
            sources.setdefault(bare, where)
            self._following |= {bare: answer, opening: following}
        if not sources:
            raise DataError(f"{path} has no facts, expected at least one")
        self._tail = min(_MAX_TAIL, min(map(len, sources)))
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


def _fill(where: str, fields: Any, most: int) -> tuple[str, str]:
    """Fill the pattern of a fact. Returns its text before the last placeholder, and the text from there on."""
    if not isinstance(fields, dict):
        raise DataError(f"{where}: the fact is {fields!r}, expected an object of fields")
    pattern = fields.get(_PATTERN)
    if not isinstance(pattern, str) or not pattern.strip():
        raise DataError(
            f"{where}: the pattern is {pattern!r}, expected a text such as 'In {{country}} lies {{capital}}.'"
        )
    parts = _PLACEHOLDER.split(pattern)
    if len(parts) == 1 or any(brace in text for text in parts[::2] for brace in "{}"):
        raise DataError(f"{where}: the pattern is {pattern!r}, expected a text with {{field}} placeholders")
    if not "".join(parts[:-2]).strip():
        raise DataError(f"{where}: the pattern {pattern!r} has nothing before its last placeholder: any text matches")
    known = sorted(fields.keys() - {_PATTERN})
    for at, name in list(enumerate(parts))[1::2]:
        if name not in known:
            raise DataError(f"{where}: unknown placeholder {{{name}}} in {pattern!r}, expected one of {known}")
        parts[at] = value = fields[name]
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{where}: the field {name!r} is {value!r}, expected a text that is not blank")
    if sum(map(len, parts)) > most:
        raise DataError(f"{where}: the facts have over {_MAX_CHARACTERS} characters in all; use fewer or shorter ones")
    opening, following = "".join(parts[:-2]), "".join(parts[-2:])
    try:
        (opening + following).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: {opening + following!r} is not valid Unicode ({error.reason})") from None
    return opening, following


def _facts(path: Path) -> Iterator[tuple[str, Any]]:
    """The location and the fields of each fact of a file."""
    kind = path.suffix.lower()
    if kind not in (".csv", ".json"):
        raise DataError(f"{path} has the suffix {path.suffix!r}, expected a .csv or .json file")
    try:
        text = path.read_bytes().decode("utf-8-sig")
        if kind == ".csv":
            yield from _csv_rows(path, text)
            return
        content = json.loads(text, parse_int=str, parse_float=str, parse_constant=str)
    except OSError as error:
        raise DataError(f"could not read {path}: {error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 at byte {error.start}; save it as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, list):
        raise DataError(f"{path}: expected a list of facts, each with its {_PATTERN!r} and fields")
    yield from ((f"{path}, fact {number}", fields) for number, fields in enumerate(content, start=1))


def _csv_rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows = filter(None, reader)
    try:
        header = [cell.strip() for cell in next(rows, ())]
        where = f"{path}, line {reader.line_num}"
        if header and (_PATTERN not in header or len(set(header)) < len(header)):
            raise DataError(f"{where}: the header is {header!s:.80}, expected {_PATTERN!r} and fields, each once")
        for cells in rows:
            where = f"{path}, line {reader.line_num}"
            if len(cells) > len(header):
                raise DataError(f"{where}: there are {len(cells)} cells, expected {len(header)} as in the header")
            yield where, dict(zip_longest(header, cells, fillvalue=""))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not CSV ({error})") from error
