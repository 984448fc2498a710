"""How models write calls of tools: the formats of common chat templates, and grammars of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class ToolFormat:
    """How a model writes calls.

    Attributes:
        kind: "tags" has an object between two markers, "bare" one without any, "list" a list of objects behind a
            marker, "named" a name and an object of arguments behind it.
        opening, closing: the markers; closing is empty where nothing closes a call.
        arguments: the key of the arguments in an object.
        call_id: the marker of an id between name and arguments; empty where there is none.
    """

    kind: Literal["tags", "bare", "list", "named"]
    opening: str
    closing: str = ""
    arguments: str = "arguments"
    call_id: str = ""

    @property
    def markers(self) -> set[str]:
        """Texts that may be special tokens, which have no text of their own."""
        return {self.opening, self.closing, self.call_id, ARGUMENTS} - {""}


ARGUMENTS = "[ARGS]"
HERMES = ToolFormat("tags", "<tool_call>", "</tool_call>")
LLAMA = ToolFormat("bare", "<|python_tag|>", arguments="parameters")
MISTRAL = ToolFormat("list", "[TOOL_CALLS]")
MISTRAL_NAMED = ToolFormat("named", "[TOOL_CALLS]")
MISTRAL_WITH_IDS = ToolFormat("named", "[TOOL_CALLS]", call_id="[CALL_ID]")


def tool_format(chat_template: str) -> ToolFormat | None:
    """The format that a chat template teaches; None where it shows no tools, or in none that is known here.

    <tool_call> with JSON: Hermes, Qwen 2.5 and 3, SmolLM3. JSON with "parameters": Llama 3. [TOOL_CALLS]: Mistral.
    """
    if "tools" not in chat_template:
        return None
    if HERMES.opening in chat_template:
        tagged = "<function=" in chat_template or "<arg_key>" in chat_template  # Qwen3-Coder and GLM write no JSON
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
    """A Lark grammar, for llguidance, of one call of one of the tools, or of several calls.

    Args:
        tools: function definitions, as OpenAI has them; arguments follow their `parameters`.
        parallel: whether several calls may come.
        special: text -> id of the tokenizer's special tokens, which grammars name by their ids.
    """

    def marker(text: str) -> str:
        return f"<[{special[text]}]>" if text in special else json.dumps(text)

    opening, closing = marker(written.opening), marker(written.closing)
    rules = [_rule(f"tool_{n}", tool["function"], written) for n, tool in enumerate(tools)]
    names = " | ".join(f"tool_{n}" for n in range(len(tools)))
    if written.kind == "tags":
        call, between = f'{opening} "\\n" tool "\\n" {closing}', '"\\n"'
    elif written.kind == "list":
        call, between = "tool", '", "'
    elif written.kind == "bare":
        call, between = "tool", '"; "'
    else:
        call, between = f"{opening} tool", '""'
        with_id = f"{marker(written.call_id)} /[a-zA-Z0-9]{{9}}/ " if written.call_id else ""
        rules = [
            f"tool_{n}: {json.dumps(tool['function']['name'])} {with_id}{marker(ARGUMENTS)} arguments_{n}\n"
            f"arguments_{n}: %json {json.dumps(_spaced(_parameters(tool['function'])))}"
            for n, tool in enumerate(tools)
        ]
    calls = f"call ({between} call)*" if parallel else "call"
    start = f'{opening} " " "[" {calls} "]"' if written.kind == "list" else calls
    return "\n".join([f"start: {start}", f"call: {call}", f"tool: {names}", *rules])


def _rule(name: str, function: Mapping[str, Any], written: ToolFormat) -> str:
    schema = {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, written.arguments: {"$ref": _PARAMETERS}},
        "required": ["name", written.arguments],
        "additionalProperties": False,
        "$defs": {"parameters": _moved(_parameters(function))},
    }
    return f"{name}: %json {json.dumps(_spaced(schema))}"


_PARAMETERS = "#/$defs/parameters"


def _parameters(function: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", **(function.get("parameters") or {})}


def _moved(schema: Any) -> Any:
    """A schema whose references start where it stands in a larger one."""
    if isinstance(schema, Mapping):
        moved = {key: _moved(value) for key, value in schema.items()}
        reference = schema.get("$ref")
        if isinstance(reference, str) and reference.startswith("#"):
            moved["$ref"] = _PARAMETERS + reference[1:]
        return moved
    return [_moved(one) for one in schema] if isinstance(schema, list) else schema


def _spaced(schema: Mapping[str, Any]) -> dict[str, Any]:
    """With the spaces that chat templates write, and no others."""
    spaces = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    return {**schema, "x-guidance": spaces}
