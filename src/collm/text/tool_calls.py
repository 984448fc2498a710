"""Incremental parsing of tool calls from generated text."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass
from typing import TypeVar

from collm.text.tool_formats import ARGUMENTS, MISTRAL, MISTRAL_WITH_IDS, ToolFormat

T = TypeVar("T")
Parser = Generator[None, None, T]
"""Yields when it needs more text, and returns what it read. Raises a ValueError for what is no call."""
_SPACE = " \t\r\n"
_NAME = re.compile(rf"(.*?)(?:{re.escape(ARGUMENTS)}|(?=\{{))", re.DOTALL)
"""A name, with an optional id, before the arguments."""


@dataclass(frozen=True)
class Delta:
    """More of an answer: of its text or of a tool call.

    Attributes:
        text: text outside of calls, or more of a call's arguments as JSON text.
        index: number of the call; None outside of calls.
        id, name: the id of the call and the name of the tool where the call begins, else empty.
    """

    text: str
    index: int | None = None
    id: str = ""
    name: str = ""


class _Input:
    """Text that arrives in pieces, and is read character by character."""

    def __init__(self) -> None:
        self.text, self.at = "", 0  # text that was not dropped yet, and how much of it was read
        self.ended = False

    def value(self, char: str, take: Callable[[str], None] = lambda char: None) -> Parser[str]:
        """Read the JSON value that begins with `char`, and pass each character to `take`.

        Only its strings and brackets are checked.
        """
        text, brackets, in_string, escaped = "", "", False, False
        while True:
            text += char
            take(char)
            if in_string:
                in_string = char != '"' or escaped
                escaped = char == "\\" and not escaped
            elif char == '"':
                in_string = True
            elif char in "{[":
                brackets += char
            elif char in "}]":
                if brackets[-1:] + char not in ("{}", "[]"):
                    raise ValueError
                brackets = brackets[:-1]
            is_whole = not in_string and not brackets
            if is_whole and (char in '"}]' or (yield from self.peek()) in ",}" + _SPACE):  # or at the end of the text
                return text
            char = yield from self.expect(skip="")

    def peek(self, skip: str = "") -> Parser[str]:
        """The next character that is not in `skip`; empty at the end of the text."""
        while True:
            while self.at < len(self.text):
                if self.text[self.at] not in skip:
                    return self.text[self.at]
                self.at += 1
            if self.ended:
                return ""
            yield

    def expect(self, chars: str = "", *, skip: str = _SPACE) -> Parser[str]:
        """Read the next character that is not in `skip`. It must be one of `chars`, if they are given."""
        char = yield from self.peek(skip)
        if not char or (chars and char not in chars):
            raise ValueError
        self.at += 1
        return char

    def drop(self) -> None:
        """Forget the text that was read."""
        self.text, self.at = self.text[self.at :], 0


class ToolCallReader:
    """Parses an answer into text and tool calls while it is generated.

    Text that may still become a marker is held back. A call without the name of a tool is returned as text, and a
    malformed call keeps the arguments read so far. White space is text, unless there is nothing else beside the calls.

    Args:
        written: the format of calls.
        names: names of the tools; None for any name.
        new_id: creates the id of a call.

    Attributes:
        count: number of calls so far.
    """

    def __init__(
        self, written: ToolFormat, names: Collection[str] | None = None, new_id: Callable[[], str] | None = None
    ) -> None:
        self._format = written
        self._names = names
        short = written.opening == MISTRAL.opening  # whose templates require 9 characters
        self._new_id = new_id or (lambda: uuid.uuid4().hex[:9] if short else f"call_{uuid.uuid4().hex[:24]}")
        self._input = _Input()  # its text is not returned yet
        self._begun = False  # whether any content or call was returned
        self._blank = True  # whether no text was returned since the beginning or the last call
        self._name = self._call_id = ""  # of the call that is being read
        self._arguments = ""  # those that are not returned yet
        self._started = False  # whether the call was returned
        self.count = 0
        self._found: list[Delta] = []
        self._parser = self._parse()

    def push(self, text: str) -> list[Delta]:
        """Parse more text and return what it adds."""
        self._input.text += text
        next(self._parser, None)
        self._return_arguments()
        found, self._found = self._found, []
        return found

    def finish(self) -> list[Delta]:
        """End the text and return what was held back."""
        self._input.ended = True
        return self.push("")

    def _parse(self) -> Parser[None]:
        while (yield from self._find_call()):
            try:
                yield from self._calls()
            except (ValueError, RecursionError):
                self._return_text(self._input.at)

    def _find_call(self) -> Parser[bool]:
        """Return the text before a call, and read its marker. False if the text ends without one."""
        opening = self._format.opening
        while True:
            text = self._input.text.lstrip(_SPACE)
            if self._format.kind == "bare" and not self._begun and text.startswith("{"):
                self._input.at = len(self._input.text) - len(text)
                return True
            place = self._input.text.find(opening)
            end = (
                place
                if place >= 0
                else len(self._input.text) - (0 if self._input.ended else _held(self._input.text, opening))
            )
            if self._input.text[:end].strip(_SPACE) or not self._blank or (self._input.ended and not self.count):
                self._return_text(end)
                end = 0
            if place >= 0:
                self._input.at = end + len(opening)
                return True
            if self._input.ended:
                return False
            yield

    def _calls(self) -> Parser[None]:
        """Read the calls after a marker, and what closes them."""
        kind, closing = self._format.kind, self._format.closing
        separators, end, follows = {"tags": "}", "bare": ",;"}.get(kind, ""), closing, True
        self._begin_call()
        first = yield from self._input.peek(_SPACE)
        if kind in ("list", "named") and first == "[":
            self._input.at += 1
            separators, end = ",", "]"
            follows = yield from self._another(separators, end)
        elif kind in ("list", "named") and first != "{":
            yield from self._read_name()
        while follows:
            try:
                yield from self._read_arguments() if self._name else self._object()
            except ValueError:
                if not self._started:
                    raise
                while (place := self._input.text.find(closing, self._input.at)) < 0 and not self._input.ended:
                    yield
                self._input.at = place if place >= 0 else len(self._input.text)
            self._return_arguments()
            follows = yield from self._another(separators, end)
            self._begin_call()

    def _read_name(self) -> Parser[None]:
        """Read the name of a tool, and an id if there is one."""
        while (found := _NAME.match(self._input.text, self._input.at)) is None:
            if self._input.ended:
                raise ValueError
            yield
        name, _, self._call_id = (part.strip(_SPACE) for part in found[1].partition(MISTRAL_WITH_IDS.call_id))
        if any(char in _SPACE for char in name):
            raise ValueError
        self._set_name(name)
        self._input.at = found.end()

    def _object(self) -> Parser[None]:
        """Read a call that is an object."""
        has_arguments = False
        char = yield from self._input.expect("{")
        while char != "}" and (yield from self._input.expect('"}')) == '"':
            key = _string((yield from self._input.value('"')))
            yield from self._input.expect(":")
            if key in {self._format.arguments, "arguments", "parameters"} and not has_arguments:
                yield from self._read_arguments()
                has_arguments = True
            else:
                value = yield from self._input.value((yield from self._input.expect()))
                if key == "name":
                    self._set_name(_string(value))
            char = yield from self._input.expect(",}")
        if not has_arguments and self._format.kind != "bare":
            self._add_arguments("{}")
        if not self._started:
            raise ValueError

    def _read_arguments(self) -> Parser[None]:
        """Read an object, a string that contains an object, or null for an empty object."""
        first = yield from self._input.expect()
        if first == "{":
            yield from self._input.value(first, self._add_arguments)
            return
        text = yield from self._input.value(first)
        arguments = "{}" if text == "null" else _string(text)
        if not isinstance(json.loads(arguments), dict):
            raise ValueError
        self._add_arguments(arguments)

    def _another(self, separators: str, end: str) -> Parser[bool]:
        """Whether another call follows. If none does, read what closes the calls."""
        first = yield from self._input.peek(_SPACE + separators)
        if self._started:
            self._input.drop()
        if first == "{" and separators:
            return True
        while (rest := self._input.text[self._input.at :]) != end and end.startswith(rest) and not self._input.ended:
            yield
        if rest and end and (rest.startswith(end) or end.startswith(rest)):
            self._input.at += len(end)
        elif not self._started:
            raise ValueError
        self._input.drop()
        return False

    def _begin_call(self) -> None:
        self._started, self._name, self._call_id, self._arguments = False, "", "", ""

    def _set_name(self, name: str) -> None:
        if not name or not (self._started or self._names is None or name in self._names):
            raise ValueError
        self._name = name
        self._add_arguments("")

    def _add_arguments(self, text: str) -> None:
        """Add to the arguments of the call. Once they and the name are known, the call is returned."""
        self._arguments += text
        if self._name and self._arguments and not self._started:
            self._started = self._begun = self._blank = True
            self._input.drop()
            self._found.append(Delta("", self.count, self._call_id or self._new_id(), self._name))
            self.count += 1

    def _return_arguments(self) -> None:
        if self._started and self._arguments:
            self._found.append(Delta(self._arguments, self.count - 1))
            self._arguments = ""
            self._input.drop()

    def _return_text(self, length: int) -> None:
        if length:
            self._begun, self._blank = True, False
            self._found.append(Delta(self._input.text[:length]))
            self._input.text, self._input.at = self._input.text[length:], 0


def _held(text: str, marker: str) -> int:
    """Length of the longest suffix of a text that may become a marker."""
    return next((n for n in range(min(len(text), len(marker) - 1), 0, -1) if marker.startswith(text[-n:])), 0)


def _string(text: str) -> str:
    """The value of a JSON string. Raises a ValueError for any other JSON."""
    value = json.loads(text)
    if not isinstance(value, str):
        raise ValueError
    return value
