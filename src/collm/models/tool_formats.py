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
    """

    kind: Literal["tags", "bare", "list", "named"]
    opening: str
    closing: str = ""
    arguments: str = "arguments"

    @property
    def markers(self) -> set[str]:
        """Texts that may be special tokens, which have no text of their own."""
        return {self.opening, self.closing, ARGUMENTS} - {""}


ARGUMENTS = "[ARGS]"
HERMES = ToolFormat("tags", "<tool_call>", "</tool_call>")
LLAMA = ToolFormat("bare", "<|python_tag|>", arguments="parameters")
MISTRAL = ToolFormat("list", "[TOOL_CALLS]")
MISTRAL_NAMED = ToolFormat("named", "[TOOL_CALLS]")


def tool_format(chat_template: str) -> ToolFormat | None:
    """The format that a chat template teaches; None where it shows no tools, or in none that is known here.

    <tool_call> with JSON: Hermes, Qwen 2.5 and 3, SmolLM3. JSON with "parameters": Llama 3. [TOOL_CALLS]: Mistral.
    """
    if "tools" not in chat_template:
        return None
    if HERMES.opening in chat_template:
        return None if "<function=" in chat_template else HERMES  # Qwen3-Coder writes XML
    if MISTRAL.opening in chat_template:
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
        rules = [
            f"tool_{n}: {json.dumps(tool['function']['name'])} {marker(ARGUMENTS)} arguments_{n}\n"
            f"arguments_{n}: %json {json.dumps(_spaced(_parameters(tool['function'])))}"
            for n, tool in enumerate(tools)
        ]
    calls = f"call ({between} call)*" if parallel else "call"
    start = f'{opening} " " "[" {calls} "]"' if written.kind == "list" else calls
    return "\n".join([f"start: {start}", f"call: {call}", f"tool: {names}", *rules])


def _rule(name: str, function: Mapping[str, Any], written: ToolFormat) -> str:
    parameters = dict(_parameters(function))
    shared: dict[str, Any] = {
        key: parameters.pop(key) for key in ("$defs", "definitions") if key in parameters
    }  # named from the root
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, written.arguments: parameters},
        "required": ["name", written.arguments],
        "additionalProperties": False,
        **shared,
    }
    return f"{name}: %json {json.dumps(_spaced(schema))}"


def _parameters(function: Mapping[str, Any]) -> Mapping[str, Any]:
    return function.get("parameters") or {"type": "object"}


def _spaced(schema: Mapping[str, Any]) -> dict[str, Any]:
    """With the spaces that chat templates write, and no others."""
    spaces = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    return {**schema, "x-guidance": spaces}
