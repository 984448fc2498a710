"""Chats in OpenAI's message format: tool calls, content parts and turns that are not trained on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from collm.errors import RequestError

Message = Mapping[str, Any]

_RESERVED = {
    *("conversation", "conversations", "messages", "tools", "documents", "chat_template", "add_generation_prompt"),
    *("continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs"),
}
"""Variables of a template that are passed already or would change the type of the result."""


class Chat(list[Message]):
    """A list of messages, with tools and with options for rendering it when an answer follows.

    Attributes:
        tools: function definitions in OpenAI's form, or None.
        add_generation_prompt: end with the opening of the assistant's turn.
        continue_final_message: leave the last message open, so that the answer continues it.
        template_kwargs: further variables of the template.

    Raises:
        RequestError: both options are true, or a variable is reserved.
    """

    def __init__(
        self,
        messages: Iterable[Message] = (),
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(messages)
        self.tools = tools
        self.add_generation_prompt = add_generation_prompt
        self.continue_final_message = continue_final_message
        self.template_kwargs = template_kwargs or {}
        if add_generation_prompt and continue_final_message:
            raise RequestError(
                "add_generation_prompt and continue_final_message are both true, but an answer either begins a "
                "message or continues one; set one of them to false"
            )
        reserved = sorted(_RESERVED.intersection(self.template_kwargs))
        if reserved:
            raise RequestError(f"chat_template_kwargs has the reserved variable {reserved[0]!r}; leave it out")

    @classmethod
    def of(cls, messages: Sequence[Message]) -> Chat:
        """The messages as a `Chat`, which a plain list of them may be already."""
        return messages if isinstance(messages, Chat) else cls(messages)


def read_message(message: Any) -> tuple[dict[str, Any], bool]:
    """Normalise a message of a training row as in `as_message`. Returns it with whether it is a training target.

    The field `weight` (OpenAI's) or `train` disables training on the message.

    Raises:
        RequestError: as in `as_message`, or an assistant's message that is a target is empty.
    """
    given, learned = message, True
    if isinstance(message, Mapping):
        given = dict(message)
        for name in ("weight", "train"):
            value = given.pop(name, None)
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
    calls = fields.pop("tool_calls", None)
    if calls:
        if not isinstance(calls, Sequence) or isinstance(calls, str):
            raise RequestError(f": 'tool_calls' is a {type(calls).__name__}, expected a list of calls")
        fields["tool_calls"] = [_call(call) for call in calls]
    missing = "" if fields["role"] == "assistant" else None
    content = fields.get("content", fields.pop("refusal", missing))
    fields["content"] = _text(content)
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
    return [_without_none("'tools'", tool) for tool in tools]


def tool_name(tool: Mapping[str, Any]) -> str | None:
    """The name of a function definition or of a call, in OpenAI's form or bare."""
    function = tool.get("function")
    name = (function if isinstance(function, Mapping) else tool).get("name")
    return name if isinstance(name, str) and name else None


def check_unicode(text: str, where: str = "") -> None:
    """Raise a RequestError that begins with `where` for text without a UTF-8 encoding (half of a surrogate pair)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{where}: character {error.start} is {text[error.start]!r}, half of a character") from error


def _text(content: Any) -> str:
    """The text of a message's content, a string or a list of parts."""
    if not isinstance(content, Sequence):
        raise RequestError(f": 'content' is {content!r:.40}, expected a string")
    texts = [content] if isinstance(content, str) else []
    for part in content if not texts else ():
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, Mapping) else None
        if not isinstance(text, str) or kind not in (None, "text", "input_text", "output_text", "refusal"):
            raise RequestError(f": 'content' has a part of type {kind!r:.40}, expected text")
        texts.append(text)
    check_unicode("".join(texts))
    return "".join(texts)


def _call(call: Any) -> dict[str, Any]:
    if not isinstance(call, Mapping) or tool_name(call) is None:
        raise RequestError(f": a call is {call!r:.80}, expected {{'function': {{'name': ..., 'arguments': ...}}}}")
    read = _without_none(": a call", call)
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


def _without_none(name: str, value: Mapping[str, Any]) -> Any:
    """Remove the None values that Arrow adds for missing fields, at every depth."""

    def removed(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: removed(inner) for key, inner in value.items() if inner is not None}
        return [removed(inner) for inner in value] if isinstance(value, list) else value

    try:
        return removed(value)
    except RecursionError as error:
        raise RequestError(f"{name} is nested too deeply") from error
