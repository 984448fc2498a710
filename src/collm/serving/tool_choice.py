"""The tools of a chat: their format in the template, and the grammar of required calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from collm.core.params import StructuredOutputs
from collm.models.tool_calls import ToolCallReader
from collm.models.tool_formats import ToolFormat, grammar, tool_format
from collm.serving.collaborations import Target
from collm.serving.errors import invalid
from collm.serving.schemas import NamedTool, Tool


@dataclass(frozen=True)
class ToolChoice:
    """Tools of a chat.

    Attributes:
        shown: their definitions for the chat template.
        written: the template's format of calls.
        parallel: whether several calls are allowed.
        constraint: the grammar of a required call; None if the answer can be text.
        markers: token id -> text of the special tokens around calls.
    """

    shown: list[dict[str, Any]]
    written: ToolFormat
    parallel: bool
    constraint: StructuredOutputs | None
    markers: dict[int, str]

    def reader(self) -> ToolCallReader:
        """A parser that separates calls from text."""
        return ToolCallReader(self.written)


def tool_choice(
    tools: Sequence[Tool] | None,
    choice: Literal["none", "auto", "required"] | NamedTool | None,
    parallel: bool | None,
    target: Target,
) -> ToolChoice | None:
    """The tools of a request; None if none can be called.

    Raises:
        APIError: a choice without tools, an unknown name, or a template without tools.
    """
    if not tools:
        if choice in (None, "none", "auto"):
            return None
        raise invalid("tool_choice requires a call, but there are no tools; add tools", "tool_choice")
    if choice == "none":
        return None
    model = target.served.model
    written = tool_format(model.template.chat_for(tools) or "")
    if written is None:
        raise invalid(
            f"the chat template of {target.served.name} has no known format of tools; leave tools out",
            "tools",
        )
    shown = [tool.model_dump(exclude_none=True) for tool in tools]
    names = [tool.function.name for tool in tools]
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise invalid(
            f"tool_choice names {choice.function.name[:80]!r}, expected one of {', '.join(names)}", "tool_choice"
        )
    special = {
        str(token): token_id for token_id, token in model.tokenizer.added_tokens_decoder.items() if token.special
    }
    constraint = None
    if choice == "required" or isinstance(choice, NamedTool):
        callable_tools = [
            one for one in shown if choice == "required" or one["function"]["name"] == choice.function.name
        ]
        several = parallel is not False and choice == "required"
        constraint = StructuredOutputs(grammar=grammar(written, callable_tools, parallel=several, special=special))
    markers = {token_id: text for text, token_id in special.items() if text in written.markers}
    return ToolChoice(shown, written, parallel is not False, constraint, markers)
