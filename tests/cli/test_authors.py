"""Colours by author in a terminal, plain text elsewhere."""

from __future__ import annotations

import io

from rich.console import Console

from collm.cli.authors import coloured, legend, style_of
from collm.core.types import TokenStep


def printed(*, terminal: bool) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, color_system="standard" if terminal else None)
    steps = [
        TokenStep(i, text, author, 0.5, -1.0) for i, (text, author) in enumerate([("The ", 0), ("Pa", 1), ("ris", 2)])
    ]
    console.print(coloured(steps), legend(["base", "first", "second"]))
    return out.getvalue()


def test_every_author_has_a_style_of_its_own_and_the_base_none() -> None:
    styles = [style_of(author) for author in range(7)]
    assert styles[0] == ""
    assert len(set(styles)) == 7
    assert style_of(7) == style_of(1)


def test_a_terminal_shows_colours_and_a_pipe_plain_text() -> None:
    assert printed(terminal=False) == "The Paris written by: base  first  second  \n"
    coloured_text = printed(terminal=True)
    assert "The \x1b[1;32mPa\x1b[0m\x1b[1;35mris\x1b[0m" in coloured_text
