"""Tool call formats of common chat templates, and their grammars."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class ToolFormat:
    """The format in which a model writes tool calls.

    Attributes:
        kind: "tags" is an object between two markers, "bare" an object without markers, "list" a marker and a list of
            objects, "named" a marker, a name and an object of arguments.
        opening, closing: the markers; `closing` is empty if nothing closes a call.
        arguments: key of the arguments in an object.
        call_id: marker of an id between name and arguments; empty if the format has no id.
    """

    kind: Literal["tags", "bare", "list", "named"]
    opening: str
    closing: str = ""
    arguments: str = "arguments"
    call_id: str = ""

    @property
    def markers(self) -> set[str]:
        """Markers, which may be special tokens of a tokenizer."""
        return {self.opening, self.closing, self.call_id, ARGUMENTS} - {""}


ARGUMENTS = "[ARGS]"
# Hermes, Qwen 2.5 and 3, and SmolLM3 write <tool_call> with JSON, Llama 3 writes JSON with "parameters".
HERMES = ToolFormat("tags", "<tool_call>", "</tool_call>")
LLAMA = ToolFormat("bare", "<|python_tag|>", arguments="parameters")
MISTRAL = ToolFormat("list", "[TOOL_CALLS]")
MISTRAL_NAMED = ToolFormat("named", "[TOOL_CALLS]")
MISTRAL_WITH_IDS = ToolFormat("named", "[TOOL_CALLS]", call_id="[CALL_ID]")


def tool_format(chat_template: str) -> ToolFormat | None:
    """Detect the format of a chat template; None if it does not support tools or the format is unknown."""
    if "tools" not in chat_template:
        return None
    if HERMES.opening in chat_template:
        tagged = "<function=" in chat_template or "<arg_key>" in chat_template  # Qwen3-Coder and GLM do not write JSON
        return None if tagged else HERMES
    if MISTRAL.opening in chat_template:
        if MISTRAL_WITH_IDS.call_id in chat_template:
            return MISTRAL_WITH_IDS
        return MISTRAL_NAMED if ARGUMENTS in chat_template else MISTRAL
    if LLAMA.opening in chat_template or ('"parameters"' in chat_template and "ipython" in chat_template):
        return LLAMA
    return None


def grammar(
    written: ToolFormat, tools: Sequence[Mapping[str, Any]], *, parallel: bool, special: Mapping[str, int]
) -> str:
    """A Lark grammar for llguidance of a call of these tools, or of several if `parallel`.

    `special` has the ids of the tokenizer's special tokens, which grammars refer to by id.
    """

    def marker(text: str) -> str:
        return f"<[{special[text]}]>" if text in special else json.dumps(text)

    opening, closing = marker(written.opening), marker(written.closing)
    call_id = f"{marker(written.call_id)} /[a-zA-Z0-9]{{9}}/ " if written.call_id else ""
    rules = []
    for n, function in enumerate(tool["function"] for tool in tools):
        parameters = {"type": "object", **(function.get("parameters") or {})}
        if written.kind == "named":
            rules += [f"tool_{n}: {json.dumps(function['name'])} {call_id}{marker(ARGUMENTS)} arguments_{n}"]
            rules += [f"arguments_{n}: %json {json.dumps({**parameters, **_TEMPLATE_SPACES})}"]
        else:
            schema = {
                "type": "object",
                "properties": {"name": {"const": function["name"]}, written.arguments: {"$ref": _PARAMETERS}},
                "required": ["name", written.arguments],
                "additionalProperties": False,
                "$defs": {"parameters": _rebased(parameters)},
            }
            rules += [f"tool_{n}: %json {json.dumps({**schema, **_TEMPLATE_SPACES})}"]
    call, between = {
        "tags": (f'{opening} "\\n" tool "\\n" {closing}', '"\\n"'),
        "bare": ("tool", '"; "'),
        "list": ("tool", '", "'),
        "named": (f"{opening} tool", '""'),
    }[written.kind]
    calls = f"call ({between} call)*" if parallel else "call"
    start = f'{opening} " " "[" {calls} "]"' if written.kind == "list" else calls
    names = " | ".join(f"tool_{n}" for n in range(len(tools)))
    return "\n".join([f"start: {start}", f"call: {call}", f"tool: {names}", *rules])


_PARAMETERS = "#/$defs/parameters"
_TEMPLATE_SPACES = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}
"""The separators of chat templates."""


def _rebased(schema: Any) -> Any:
    """Rebase the references of a schema that becomes part of a larger one."""
    if isinstance(schema, Mapping):
        moved = {key: _rebased(value) for key, value in schema.items()}
        reference = schema.get("$ref")
        if isinstance(reference, str) and reference.startswith("#"):
            moved["$ref"] = _PARAMETERS + reference[1:]
        return moved
    return [_rebased(one) for one in schema] if isinstance(schema, list) else schema
