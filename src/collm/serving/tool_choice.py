"""Which tools a chat may call, how its template writes calls, and what keeps an answer to a call that must come."""

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
        shown: their definitions, as the chat template takes them.
        written: how the template's model writes calls.
        parallel: whether several calls may come.
        constraint: what keeps the answer to a call; None where it may be text.
        markers: token id -> text of special tokens that stand around calls, which have no text of their own.
    """

    shown: list[dict[str, Any]]
    written: ToolFormat
    parallel: bool
    constraint: StructuredOutputs | None
    markers: dict[int, str]

    def reader(self) -> ToolCallReader:
        """Tells the calls of one answer from its text."""
        return ToolCallReader(self.written)


def tool_choice(
    tools: Sequence[Tool] | None,
    choice: Literal["none", "auto", "required"] | NamedTool | None,
    parallel: bool | None,
    target: Target,
) -> ToolChoice | None:
    """What a request says of tools; None where none can be called.

    Raises:
        APIError: a choice without tools, a name that is none of theirs, or a template that shows no tools.
    """
    if not tools:
        if choice in (None, "none", "auto"):
            return None
        raise invalid("tool_choice asks for a call, and there are no tools; add tools", "tool_choice")
    if choice == "none":
        return None
    model = target.served.model
    written = tool_format(model.template.chat or "")
    if written is None:
        raise invalid(
            f"the chat template of {target.served.name} shows no tools in a form that is known here; leave tools out",
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
