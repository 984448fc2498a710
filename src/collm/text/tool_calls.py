"""Incremental parsing of tool calls from generated text."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

from collm.text.tool_formats import ARGUMENTS, MISTRAL, MISTRAL_WITH_IDS, ToolFormat

_SPACE = " \t\r\n"
_CALL_ID = MISTRAL_WITH_IDS.call_id


@dataclass(frozen=True)
class Content:
    """Text outside of tool calls."""

    text: str


@dataclass(frozen=True)
class CallStart:
    """The beginning of a call: its index, its id and the tool's name."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """More of a call's arguments, as JSON text."""

    index: int
    text: str


Delta = Content | CallStart | CallArguments


class ToolCallReader:
    """Parses an answer into text and tool calls while it is generated.

    Text that may still become a marker is held back. A call without the name of a tool is returned as text, and a
    malformed call keeps the arguments read so far. White space is text, unless there is nothing else beside the calls.

    Args:
        written: the format of calls.
        names: names of the tools; None for any name.
        new_id: creates the id of a call.
    """

    def __init__(
        self, written: ToolFormat, names: Collection[str] | None = None, new_id: Callable[[], str] | None = None
    ) -> None:
        self._format = written
        self._names = names
        self._new_id = new_id or (_short_id if written.opening == MISTRAL.opening else _id)
        self._buffer = ""
        self._state: Callable[[], bool] = self._text
        self._begun = False  # whether any content or call was emitted
        self._blank = True  # whether no text was emitted since the beginning or the last call
        self._raw = ""  # the text of a call that has no name yet
        self._object: _CallObject | None = None
        self._in_list = False
        self._count = 0
        self._found: list[Delta] = []

    def push(self, text: str) -> list[Delta]:
        """Parse more text and return what it adds."""
        self._buffer += text
        while self._buffer and self._state():
            pass
        return self._take()

    def finish(self) -> list[Delta]:
        """End the text and return what was held back."""
        if self._object is not None and not self._object.started:
            self._object.take(" ")  # nothing else closes a null
            self._report(self._object)
        if (self._state == self._text or self._raw) and not (self._count and self._is_space(self._raw + self._buffer)):
            self._emit_text(self._raw + self._buffer)
        self._buffer = self._raw = ""
        return self._take()

    def _take(self) -> list[Delta]:
        """Return the deltas found so far, with adjacent arguments merged."""
        found, self._found = self._found, []
        whole: list[Delta] = []
        for one in found:
            last = whole[-1] if whole else None
            if isinstance(one, CallArguments) and isinstance(last, CallArguments) and one.index == last.index:
                whole[-1] = CallArguments(one.index, last.text + one.text)
            else:
                whole.append(one)
        return whole

    # States of the parser. Each consumes the beginning of the buffer and returns False if it needs more text.

    def _text(self) -> bool:
        opening = self._format.opening
        if self._format.kind == "bare" and not self._begun:
            text = self._buffer.lstrip(_SPACE)
            if text.startswith("{"):
                self._raw, self._buffer = self._buffer[: len(self._buffer) - len(text)], text
                self._state = self._call
                return True
            if not text or opening.startswith(text):
                return False
        place = self._buffer.find(opening)
        end = place if place >= 0 else len(self._buffer) - _held(self._buffer, opening)
        text = self._buffer[:end]
        if not self._is_space(text):
            self._emit_text(text)
            self._buffer, text = self._buffer[end:], ""
        if place < 0:
            return False
        self._raw, self._buffer = text + opening, self._buffer[len(text) + len(opening) :]
        self._state = self._after_marker
        return True

    def _is_space(self, text: str) -> bool:
        """Whether a text is white space beside calls, with no other text so far."""
        return self._blank and not text.strip(_SPACE)

    def _after_marker(self) -> bool:
        space = len(self._buffer) - len(self._buffer.lstrip(_SPACE))
        self._raw, self._buffer = self._raw + self._buffer[:space], self._buffer[space:]
        if not self._buffer:
            return False
        if self._format.kind in ("list", "named"):
            if self._buffer[0] == "[":
                self._raw, self._buffer, self._in_list = self._raw + "[", self._buffer[1:], True
                self._state = self._between
                return True
            if self._buffer[0] != "{":
                self._state = self._name
                return True
        self._state = self._call
        return True

    def _name(self) -> bool:
        """A name, with an optional id, before the arguments."""
        ends = [(self._buffer.find(mark), len(mark)) for mark in (ARGUMENTS, "{")]
        found = [(place, place + length * (length > 1)) for place, length in ends if place >= 0]
        if not found:
            return False
        place, start = min(found)
        name, _, call_id = (part.strip(_SPACE) for part in self._buffer[:place].partition(_CALL_ID))
        if not name or any(char in _SPACE for char in name) or not self._may_call(name):
            self._give_up()
            return True
        self._object = _CallObject(self._format.arguments, name, call_id=call_id)
        self._raw, self._buffer = self._raw + self._buffer[:start], self._buffer[start:]
        self._state = self._call
        return True

    def _call(self) -> bool:
        if self._object is None:
            self._object = _CallObject(self._format.arguments, may_be_bare=self._format.kind != "bare")
        while self._buffer:
            char, self._buffer = self._buffer[0], self._buffer[1:]
            if not self._object.started:
                self._raw += char
            self._object.take(char)
            if (self._object.broken or not self._may_call(self._object.name)) and not self._object.started:
                self._give_up()
                return True
            self._report(self._object)
            if self._object.broken and self._format.closing:
                self._buffer, self._state = char + self._buffer, self._to_closing
            elif self._object.done or self._object.broken:
                self._state = self._between
            if self._object.done or self._object.broken:
                self._object = None
                return True
        return False

    def _may_call(self, name: str | None) -> bool:
        """Whether a name is that of a tool, or not known yet."""
        return name is None or self._names is None or name in self._names

    def _to_closing(self) -> bool:
        """After a malformed call: drop the text before its closing marker."""
        closing = self._format.closing
        place = self._buffer.find(closing)
        if place < 0:
            self._buffer = self._buffer[-len(closing) :]
            return False
        self._buffer, self._state = self._buffer[place + len(closing) :], self._text
        return True

    def _report(self, read: _CallObject) -> None:
        if not read.started and read.named and (read.arguments or read.done):
            read.started = True
            self._begun, self._blank, self._raw = True, True, ""
            self._found.append(CallStart(self._count, read.call_id or self._new_id(), str(read.name)))
            self._count += 1
        if read.started:
            text = read.new_arguments()
            if text:
                self._found.append(CallArguments(self._count - 1, text))

    def _between(self) -> bool:
        """After a call, or at the beginning of a list of calls."""
        separators = _SPACE + {"tags": "}", "bare": ",;"}.get(self._format.kind, "," * self._in_list)
        rest = self._buffer.lstrip(separators)
        if self._raw:
            self._raw += self._buffer[: len(self._buffer) - len(rest)]
        closing = self._format.closing
        if not rest or (closing and closing != rest and closing.startswith(rest)):
            self._buffer = rest
            return False
        several = self._in_list or self._format.kind == "bare" or (self._format.kind == "tags" and not self._raw)
        if rest[0] == "{" and several:
            self._buffer, self._state = rest, self._call
        elif rest[0] == "]" and self._in_list:
            self._buffer, self._state, self._in_list, self._raw = rest[1:], self._text, False, ""
        elif closing and rest.startswith(closing):
            self._buffer, self._state = rest[len(closing) :], self._text
        elif self._raw:
            self._give_up()
        else:
            self._buffer, self._state, self._in_list = rest, self._text, False
        return True

    def _give_up(self) -> None:
        """Return the current call as text, because it is not a call."""
        self._emit_text(self._raw)
        self._raw, self._object, self._in_list, self._begun = "", None, False, True
        self._state = self._text

    def _emit_text(self, text: str) -> None:
        if text:
            self._begun, self._blank = True, False
            self._found.append(Content(text))


def _held(text: str, marker: str) -> int:
    """Length of the longest suffix of a text that may become a marker."""
    return next((n for n in range(min(len(text), len(marker) - 1), 0, -1) if marker.startswith(text[-n:])), 0)


def _id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def _short_id() -> str:
    return uuid.uuid4().hex[:9]  # Mistral's templates require this length


class _CallObject:
    """Incremental parser of a call's JSON object.

    Args:
        key: key of the arguments.
        name: the tool's name if it is known; the object then consists of the arguments.
        call_id: the id that the model wrote, or an empty string.
        may_be_bare: whether a name without arguments is a call.

    Attributes:
        done: whether the object is complete.
        broken: whether the object is malformed.
        started: whether the call was reported.
    """

    def __init__(self, key: str, name: str | None = None, *, call_id: str = "", may_be_bare: bool = True) -> None:
        self.name = name
        self.call_id = call_id
        self._may_be_bare = may_be_bare
        self.done = self.broken = self.started = False
        self.arguments = ""
        self._keys = {key, "arguments", "parameters"}
        self._emitted = 0
        self._key: str | None = None
        self._expects: Literal["object", "key", "colon", "value", "comma"] = "value" if name else "object"
        self._whole = name is not None
        self._value = ""
        self._open, self._in_string, self._escaped = "", False, False  # open brackets
        self._complete = False  # whether the arguments are complete

    @property
    def named(self) -> bool:
        return self.name is not None

    def take(self, char: str) -> None:
        """Parse one character."""
        if self._expects == "value" or (self._expects == "key" and self._value):
            self._take_value(char)
        elif char in _SPACE:
            pass
        elif self._expects == "object" and char == "{":
            self._expects = "key"
        elif self._expects == "key" and char == '"':
            self._take_value(char)
        elif self._expects == "colon" and char == ":":
            self._expects = "value"
        elif self._expects == "comma" and char == ",":
            self._expects = "key"
        elif char == "}" and self._expects in ("comma", "key"):
            self._close()
        else:
            self.broken = True

    def _take_value(self, char: str) -> None:
        if not self._value and char in _SPACE:
            return
        ends = not self._in_string and not self._open and self._value and char in ",}" + _SPACE
        if ends:  # a number or a literal, which has no closing character
            self._finish_value()
            if not (self.broken or self.done):
                self.take(char)
            return
        self._value += char
        self._track_brackets(char)
        if self._is_arguments:
            self.arguments += char
        if not self.broken and not self._in_string and not self._open and char in '"}]':
            self._finish_value()

    @property
    def _is_arguments(self) -> bool:
        """Whether the current value is an object of arguments. Arguments in a string are decoded at the end."""
        return (self._whole or self._key in self._keys) and self._value[:1] == "{" and not self._complete

    def _track_brackets(self, char: str) -> None:
        if self._in_string:
            if not self._escaped and char == '"':
                self._in_string = False
            self._escaped = not self._escaped and char == "\\"
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._open += char
        elif char in "}]":
            self.broken = self._open[-1:] != ("{" if char == "}" else "[")
            self._open = self._open[:-1]

    def _finish_value(self) -> None:
        text, self._value = self._value, ""
        if self._whole:
            self._finish_arguments(text)
            self.done = not self.broken
            return
        if self._expects == "key":
            self._key, self._expects = _string(text), "colon"
            self.broken = self._key is None
            return
        if self._key == "name":
            self.name = _string(text) or None
            self.broken = self.name is None
        elif self._key in self._keys and not self._complete:
            self._finish_arguments(text)
        self._expects = "comma"

    def _finish_arguments(self, text: str) -> None:
        """Accept an object, a string that contains an object, or null for an empty object."""
        self._complete = True
        if text.startswith("{"):
            return
        self.arguments = "{}" if text == "null" else (_string(text) or "")
        try:
            self.broken = not isinstance(json.loads(self.arguments), dict)
        except ValueError:
            self.broken = True

    def _close(self) -> None:
        self.done = self.named and (bool(self.arguments) or self._may_be_bare)
        self.broken = not self.done
        self.arguments = self.arguments or "{}"

    def new_arguments(self) -> str:
        """The arguments added since the previous call."""
        text = self.arguments[self._emitted :]
        self._emitted = len(self.arguments)
        return text


def _string(text: str) -> str | None:
    """The value of a JSON string; None for any other JSON."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, str) else None
