"""How the terminal shows who wrote what: a colour for each author, nothing when the output is no terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from rich.text import Text

STYLES = ("", "bold green", "bold magenta", "bold cyan", "bold yellow", "bold blue", "bold red")


class Written(Protocol):
    """A token's text and who wrote it."""

    @property
    def text(self) -> str: ...

    @property
    def author(self) -> int: ...


def style_of(author: int) -> str:
    """Rich style of an author; the base is plain."""
    return STYLES[0] if author == 0 else STYLES[1 + (author - 1) % (len(STYLES) - 1)]


def coloured(steps: Iterable[Written]) -> Text:
    """The text of these steps, each in its author's style."""
    text = Text()
    for step in steps:
        text.append(step.text, style_of(step.author))
    return text


def legend(names: Sequence[str]) -> Text:
    """Which colour is whom."""
    text = Text("written by: ", "dim")
    for author, name in enumerate(names):
        text.append(name, style_of(author)).append("  ")
    return text
