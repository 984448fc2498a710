"""Chats in OpenAI's message format: tool calls, content parts and turns that are not trained on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from collm.errors import RequestError

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Rendering:
    """Options for rendering a chat that is to be answered.

    Attributes:
        add_generation_prompt: end with the opening of the assistant's turn.
        continue_final_message: leave the last message open, so that the answer continues it.
        template_kwargs: further variables of the template.

    Raises:
        RequestError: both options are true, or a variable is reserved.
    """

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.add_generation_prompt and self.continue_final_message:
            raise RequestError(
                "add_generation_prompt and continue_final_message are both true, but an answer either begins a "
                "message or continues one; set one of them to false"
            )
        taken = sorted(_TAKEN & set(self.template_kwargs))
        if taken:
            raise RequestError(f"chat_template_kwargs has the reserved variable {taken[0]!r}; leave it out")


_TAKEN = {
    "conversation",
    "messages",
    "tools",
    "documents",
    "chat_template",
    "tokenize",
    "add_generation_prompt",
    "continue_final_message",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
}
"""Reserved variables, which are passed already or would change the type of the result."""


class Chat(list[Message]):
    """A list of messages with tools and rendering options.

    Attributes:
        tools: function definitions in OpenAI's form, or None.
        rendering: options for rendering the chat when an answer follows.
    """

    def __init__(
        self,
        messages: Iterable[Message] = (),
        tools: Sequence[Mapping[str, Any]] | None = None,
        rendering: Rendering = Rendering(),
    ) -> None:
        super().__init__(messages)
        self.tools = tools
        self.rendering = rendering


def tools_of(messages: object) -> Sequence[Mapping[str, Any]] | None:
    """The tools of a `Chat`; None for a plain list of messages."""
    return messages.tools if isinstance(messages, Chat) else None


def rendering_of(messages: object) -> Rendering:
    """The rendering options of a `Chat`; the defaults for a plain list of messages."""
    return messages.rendering if isinstance(messages, Chat) else Rendering()


def read_message(message: Any) -> tuple[dict[str, Any], bool]:
    """Normalise a message of a training row as in `as_message`. Returns it with whether it is a training target.

    The field `weight` (OpenAI's) or `train` disables training on the message.

    Raises:
        RequestError: as in `as_message`, or an assistant's message that is a target is empty.
    """
    given = dict(message) if isinstance(message, Mapping) else message
    learned = isinstance(given, dict)
    for name in ("weight", "train"):
        value = given.pop(name, None) if isinstance(given, dict) else None
        if value not in (None, 0, 1):  # false equals 0, true equals 1
            raise RequestError(f": {name!r} is {value!r:.40}, expected 0 or 1")
        learned = learned and value != 0
    fields = as_message(given)
    if fields["role"] == "assistant" and learned and not (fields["content"].strip() or "tool_calls" in fields):
        raise RequestError(": the assistant's content is empty, expected text")
    return fields, learned


def as_message(message: Any) -> dict[str, Any]:
    """Normalise a message for chat templates.

    Text parts are joined, call arguments are parsed to objects, the older `function_call` becomes a tool call, and an
    assistant's missing content becomes empty text.

    Raises:
        RequestError: the role or text is missing, a part is not text, or a call is malformed. The error text continues
            a prefix such as "message 3".
    """
    if not isinstance(message, Mapping):
        raise RequestError(f" is a {type(message).__name__}, expected {{'role': ..., 'content': ...}}")
    fields = {key: value for key, value in message.items() if value is not None}  # Arrow fills absent fields with None
    if not isinstance(fields.get("role"), str):
        raise RequestError(f": 'role' is {fields.get('role')!r:.40}, expected a string")
    if "function_call" in fields:
        fields["tool_calls"] = [{"type": "function", "function": fields.pop("function_call")}]
    if fields["role"] == "function":
        fields["role"] = "tool"
    if fields.get("tool_calls"):
        calls = fields["tool_calls"]
        if not isinstance(calls, Sequence) or isinstance(calls, str):
            raise RequestError(f": 'tool_calls' is a {type(calls).__name__}, expected a list of calls")
        fields["tool_calls"] = [_call(call) for call in calls]
    else:
        fields.pop("tool_calls", None)
    refusal = fields.pop("refusal", None)
    content = fields.get("content", refusal)
    fields["content"] = _text(content, optional=fields["role"] == "assistant")
    return fields


def read_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Read function definitions from a list or from JSON text; None if there are none.

    Raises:
        RequestError: `tools` is not a list of functions with names.
    """
    if isinstance(tools, str):
        tools = _json("tools", tools)
    if not tools:
        return None
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) and tool_name(tool) for tool in tools):
        raise RequestError(f"'tools' is {tools!r:.80}, expected a list of functions with names")
    return [_plain("'tools'", tool) for tool in tools]


def tool_name(tool: Mapping[str, Any]) -> str | None:
    """The name of a function definition or of a call, in OpenAI's form or bare."""
    function = tool.get("function")
    name = (function if isinstance(function, Mapping) else tool).get("name")
    return name if isinstance(name, str) and name else None


def _text(content: Any, *, optional: bool) -> str:
    if isinstance(content, str):
        text = content
    elif content is None and optional:
        text = ""
    elif isinstance(content, Sequence):
        text = "".join(_part(part) for part in content)
    else:
        raise RequestError(f": 'content' is {content!r:.40}, expected a string")
    check_unicode(text)
    return text


def _part(part: Any) -> str:
    if isinstance(part, Mapping):
        kind = part.get("type")
        text = part.get("refusal" if kind == "refusal" else "text")
        if isinstance(text, str) and kind in (None, "text", "input_text", "output_text", "refusal"):
            return text
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise RequestError(f": 'content' has a part of type {kind!r:.40}, expected text")


def check_unicode(text: str) -> None:
    """Raise a RequestError for text without a UTF-8 encoding, such as half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f": character {error.start} is {text[error.start]!r}, half of a character") from error


def _call(call: Any) -> dict[str, Any]:
    if not isinstance(call, Mapping) or tool_name(call) is None:
        raise RequestError(f": a call is {call!r:.80}, expected {{'function': {{'name': ..., 'arguments': ...}}}}")
    read = _plain(": a call", call)
    function = read.get("function", read)
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _json(": 'arguments' of a call", arguments) if arguments.strip() else {}
    if not isinstance(arguments, Mapping):
        raise RequestError(f": 'arguments' of a call is a {type(arguments).__name__}, expected an object")
    kept = {"id": read["id"]} if "id" in read else {}
    return {**kept, "type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}


def _json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{name} is {text!r:.60}, expected JSON ({error})") from error


def _plain(name: str, value: Mapping[str, Any]) -> Any:
    try:
        return _without_none(value)
    except RecursionError as error:
        raise RequestError(f"{name} is nested too deeply") from error


def _without_none(value: Any) -> Any:
    """Remove the None values that Arrow adds for missing fields."""
    if isinstance(value, Mapping):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list) else value
