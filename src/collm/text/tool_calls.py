"""Incremental parsing of tool calls from generated text."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from collm.text.tool_formats import ARGUMENTS, MISTRAL, MISTRAL_WITH_IDS, ToolFormat

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
        self._buffer = ""
        self._state: Callable[[], Any] = self._text
        self._begun = False  # whether any content or call was emitted
        self._blank = True  # whether no text was emitted since the beginning or the last call
        self._raw = ""  # the text of a call that has no name yet
        self._call: _CallObject | None = None
        self._in_list = False
        self.count = 0
        self._found: list[Delta] = []

    def push(self, text: str) -> list[Delta]:
        """Parse more text and return what it adds."""
        self._buffer += text
        while self._buffer and (following := self._state()):
            self._state = following
        found, self._found = self._found, []
        return found

    def finish(self) -> list[Delta]:
        """End the text and return what was held back."""
        if self._call is not None and not self._call.started:
            self._call.take(" ")  # nothing else closes a null
            self._start(self._call)
            self._object()
        rest = self._raw + self._buffer
        if (self._state == self._text or self._raw) and not (self.count and self._is_space(rest)):
            self._emit_text(rest)
        self._buffer = self._raw = ""
        return self.push("")

    # States of the parser. Each consumes the beginning of the buffer and returns the next state, or None if it needs
    # more text.

    def _text(self) -> Any:
        opening = self._format.opening
        if self._format.kind == "bare" and not self._begun:
            text = self._buffer.lstrip(_SPACE)
            if text.startswith("{"):
                self._skip(len(self._buffer) - len(text))
                return self._object
            if not text or opening.startswith(text):
                return None
        place = self._buffer.find(opening)
        end = place if place >= 0 else len(self._buffer) - _held(self._buffer, opening)
        if not self._is_space(self._buffer[:end]):
            self._emit_text(self._buffer[:end])
            self._buffer, end = self._buffer[end:], 0
        if place < 0:
            return None
        self._skip(end + len(opening))
        return self._after_marker

    def _after_marker(self) -> Any:
        self._skip(len(self._buffer) - len(self._buffer.lstrip(_SPACE)))
        if not self._buffer:
            return None
        if self._buffer[0] == "{" or self._format.kind in ("tags", "bare"):
            return self._object
        if self._buffer[0] != "[":
            return self._name
        self._skip(1)
        self._in_list = True
        return self._between

    def _name(self) -> Any:
        found = _NAME.match(self._buffer)
        if found is None:
            return None
        name, _, call_id = (part.strip(_SPACE) for part in found[1].partition(MISTRAL_WITH_IDS.call_id))
        if not name or any(char in _SPACE for char in name) or not self._may_call(name):
            return self._give_up()
        self._call = _CallObject(self._format.arguments, name, call_id=call_id)
        self._skip(found.end())
        return self._object

    def _object(self) -> Any:
        bare = self._format.kind == "bare"
        call = self._call = self._call or _CallObject(self._format.arguments, may_be_bare=not bare)
        place = 0
        while place < len(self._buffer) and not (call.done or call.broken):
            call.take(self._buffer[place])
            place += 1
            if not call.started:
                self._raw += self._buffer[place - 1]
                if call.broken or not self._may_call(call.name):
                    self._buffer = self._buffer[place:]
                    return self._give_up()
                self._start(call)
        if call.started and len(call.arguments) > call.num_reported:
            self._found.append(Delta(call.arguments[call.num_reported :], self.count - 1))
            call.num_reported = len(call.arguments)
        dropped, self._buffer = self._buffer[place - 1 : place], self._buffer[place:]
        if not (call.done or call.broken):
            return None
        self._call = None
        if call.broken and self._format.closing:
            self._buffer = dropped + self._buffer
            return self._to_closing
        return self._between

    def _to_closing(self) -> Any:
        """After a malformed call: drop the text before its closing marker."""
        closing = self._format.closing
        place = self._buffer.find(closing)
        if place < 0:
            self._buffer = self._buffer[-len(closing) :]
            return None
        self._buffer = self._buffer[place + len(closing) :]
        return self._text

    def _between(self) -> Any:
        """After a call, or at the beginning of a list of calls."""
        kind, closing = self._format.kind, self._format.closing
        separators = _SPACE + {"tags": "}", "bare": ",;"}.get(kind, "," * self._in_list)
        rest = self._buffer.lstrip(separators)
        if self._raw:
            self._raw += self._buffer[: len(self._buffer) - len(rest)]
        self._buffer = rest
        if not rest or (closing and closing != rest and closing.startswith(rest)):
            return None
        if rest[0] == "{" and (self._in_list or kind == "bare" or (kind == "tags" and not self._raw)):
            return self._object
        end = "]" if self._in_list else closing
        if end and rest.startswith(end):
            self._buffer, self._raw = rest[len(end) :], ""
        elif self._raw:
            return self._give_up()
        self._in_list = False
        return self._text

    def _give_up(self) -> Any:
        """Return the current call as text, because it is not a call."""
        self._emit_text(self._raw)
        self._raw, self._call, self._in_list, self._begun = "", None, False, True
        return self._text

    def _may_call(self, name: str | None) -> bool:
        """Whether a name is that of a tool, or not known yet."""
        return name is None or self._names is None or name in self._names

    def _skip(self, length: int) -> None:
        """Move text from the buffer to the call."""
        self._raw, self._buffer = self._raw + self._buffer[:length], self._buffer[length:]

    def _is_space(self, text: str) -> bool:
        """Whether a text is white space beside calls, with no other text so far."""
        return self._blank and not text.strip(_SPACE)

    def _start(self, call: _CallObject) -> None:
        if call.name is not None and (call.arguments or call.done):
            call.started = self._begun = self._blank = True
            self._raw = ""
            self._found.append(Delta("", self.count, call.call_id or self._new_id(), call.name))
            self.count += 1

    def _emit_text(self, text: str) -> None:
        if text:
            self._begun, self._blank = True, False
            self._found.append(Delta(text))


def _held(text: str, marker: str) -> int:
    """Length of the longest suffix of a text that may become a marker."""
    return next((n for n in range(min(len(text), len(marker) - 1), 0, -1) if marker.startswith(text[-n:])), 0)


_NEXT = {("object", "{"): "key", ("colon", ":"): "value", ("comma", ","): "key"}


class _CallObject:
    """Incremental parser of a call's JSON object, or of its arguments alone if the tool's name is known.

    Args:
        key: key of the arguments.
        call_id: the id that the model wrote, or an empty string.
        may_be_bare: whether a name without arguments is a call.

    Attributes:
        arguments: JSON text of the arguments so far.
        done, broken: whether the object is complete or malformed.
        started, num_reported: whether the call was reported, and how many characters of its arguments.
    """

    def __init__(self, key: str, name: str | None = None, *, call_id: str = "", may_be_bare: bool = True) -> None:
        self.name = name
        self.call_id = call_id
        self.arguments = ""
        self.done = self.broken = self.started = False
        self.num_reported = 0
        self._may_be_bare = may_be_bare
        self._whole = name is not None
        self._keys = {key, "arguments", "parameters"}
        self._key: str | None = key if name else None
        self._expects = "value" if name else "object"
        self._value = ""  # of the current key or value
        self._open, self._in_string, self._escaped = "", False, False  # its open brackets
        self._complete = False  # whether the arguments are complete

    def take(self, char: str) -> None:
        """Parse one character."""
        if self._expects == "value" or self._value or (self._expects == "key" and char == '"'):
            self._take_value(char)
        elif (self._expects, char) in _NEXT:
            self._expects = _NEXT[self._expects, char]
        elif char == "}" and self._expects in ("comma", "key"):
            self.done = self.name is not None and (bool(self.arguments) or self._may_be_bare)
            self.broken = not self.done
            self.arguments = self.arguments or "{}"
        else:
            self.broken = char not in _SPACE

    def _take_value(self, char: str) -> None:
        plain = not self._in_string and not self._open
        if plain and not self._value and char in _SPACE:
            return
        if plain and self._value and char in ",}" + _SPACE:  # after a literal, which has no closing character
            self._finish_value()
            if not (self.broken or self.done):
                self.take(char)
            return
        self._value += char
        if self._in_string:
            self._in_string = char != '"' or self._escaped
            self._escaped = not self._escaped and char == "\\"
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._open += char
        elif char in "}]":
            self.broken = self._open[-1:] != ("{" if char == "}" else "[")
            self._open = self._open[:-1]
        if self._key in self._keys and self._expects == "value" and self._value[0] == "{" and not self._complete:
            self.arguments += char  # arguments in a string are decoded at its end
        if not self.broken and not self._in_string and not self._open and char in '"}]':
            self._finish_value()

    def _finish_value(self) -> None:
        text, self._value = self._value, ""
        if self._expects == "key":
            self._key, self._expects = _string(text), "colon"
            self.broken = self._key is None
            return
        self._expects = "comma"
        if self._key == "name":
            self.name = _string(text) or None
            self.broken = self.name is None
        elif self._key in self._keys and not self._complete:
            self._complete = True
            self._finish_arguments(text)
            self.done = self._whole and not self.broken

    def _finish_arguments(self, text: str) -> None:
        """Accept an object, a string that contains an object, or null for an empty object."""
        if text.startswith("{"):
            return
        self.arguments = "{}" if text == "null" else (_string(text) or "")
        try:
            self.broken = not isinstance(json.loads(self.arguments), dict)
        except ValueError:
            self.broken = True


def _string(text: str) -> str | None:
    """The value of a JSON string; None for any other JSON."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, str) else None
