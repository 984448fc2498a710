"""How the terminal shows who wrote what: a colour for each author, nothing when the output is no terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.text import Text

if TYPE_CHECKING:
    from collm.core.types import TokenStep

STYLES = ("", "bold green", "bold magenta", "bold cyan", "bold yellow", "bold blue", "bold red")


def style_of(author: int) -> str:
    """Rich style of an author; the base is plain."""
    return STYLES[0] if author == 0 else STYLES[1 + (author - 1) % (len(STYLES) - 1)]


def coloured(steps: Iterable[TokenStep]) -> Text:
    """The text of these steps, each in its author's style."""
    text = Text()
    for step in steps:
        text.append(step.text, style_of(step.author))
    return text


def legend(num_assistants: int) -> Text:
    """Which colour is whom."""
    names = ["base", *(f"assistant {k}" if num_assistants > 1 else "assistant" for k in range(1, num_assistants + 1))]
    text = Text("written by: ", "dim")
    for author, name in enumerate(names):
        text.append(name, style_of(author)).append("  ")
    return text
