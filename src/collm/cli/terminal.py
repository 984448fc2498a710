"""What a terminal shows of texts that models, rows and files of strangers hold: never their control sequences.

Each token has its author's colour. Where the output is no terminal, it holds the text of models unchanged.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from collm.errors import ConfigError
from collm.redaction import visible

if TYPE_CHECKING:
    from collm.core.types import TokenStep
    from collm.evaluation.report import Token

STYLES = ("bold green", "bold magenta", "bold cyan", "bold yellow", "bold blue", "bold red")
"""Rich styles of the assistants. The base is plain."""


def style_of(author: int) -> str:
    return STYLES[(author - 1) % len(STYLES)] if author else ""


def coloured(steps: Iterable[TokenStep | Token]) -> Text:
    """The text of these steps, each in its author's style."""
    return Text.assemble(*((step.text, style_of(step.author)) for step in steps))


def legend(names: Sequence[str]) -> Text:
    """Which colour is whom."""
    authors = [part for author, name in enumerate(names) for part in ((name, style_of(author)), "  ")]
    return Text.assemble("written by: ", *authors, style="dim")


class Console(RichConsole):
    """A rich console whose texts cannot control the terminal, though its colours do."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            shown = segment.control or not self.is_terminal
            yield segment if shown else Segment(visible(segment.text), segment.style)

    def show(self, steps: Iterable[TokenStep | Token]) -> None:
        """Print text of authors in their colours. Piped, it is written as it is: rich would change tabs and more."""
        if self.is_terminal:
            self.print(coloured(steps), end="")
            return
        self.file.write("".join(step.text for step in steps))
        self.file.flush()


def not_text(error: UnicodeDecodeError) -> ConfigError:
    """The error of standard input that cannot be decoded."""
    return ConfigError(f"standard input is not {error.encoding} text ({error}); convert it to UTF-8")


def log_to_terminal() -> None:
    """What the package logs, on stderr, a line each."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Visible("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


class _Visible(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))
