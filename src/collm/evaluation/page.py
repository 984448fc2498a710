"""The report as one HTML page: tables, marked tokens and a legend, readable by eye, keyboard and screen reader."""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from collm.atomic import write_text
from collm.core.types import BASE, deferral_rate
from collm.evaluation.chart import draw
from collm.evaluation.report import Report, Token

_COLOURS = 6
_UNDERLINES = 5
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_PICTURES = {**{code: chr(0x2400 + code) for code in range(0x20)}, 0x7F: "\u2421"}


def write_report(path: str | os.PathLike[str], report: Report) -> None:
    """Write the page to `path`, whole or not at all. Missing directories are created.

    The page loads nothing from the network, and its content security policy forbids it to. The same report gives the
    same bytes.

    Raises:
        MissingExtra: the report has a chart, and matplotlib is not installed.
        WriteError: the file cannot be written. An existing file stays as it was.
    """
    write_text(Path(path), render_page(report))


def render_page(report: Report) -> str:
    """The whole page. Every text of the report is escaped."""
    return (
        _environment()
        .get_template("report.html")
        .render(
            report=report,
            paragraphs=[part for part in re.split(r"\n\s*\n", report.summary.strip()) if part],
            drawings=[(one, draw(one)) for one in report.charts if one.curve or one.marks],
        )
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("collm.evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "author_class": _author_class,
        "css": "{:.2%}".format,
        "percent": "{:.1%}".format,
        "rate": lambda per_s: f"{per_s:,.0f}" if per_s >= 100 else f"{per_s:.3g}",
        "share_of_assistants": lambda tokens: deferral_rate([token.author for token in tokens]),
        "unmarked": _unmarked,
        "visible": _visible,
    }
    return environment


def _printable(value: Any) -> Any:
    """Control characters as their pictures, in every text that a template inserts."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return _UNPRINTABLE.sub(lambda found: _PICTURES.get(ord(found[0]), "\ufffd"), value)


def _author_class(author: int) -> str:
    """Assistants differ by colour and by underline. The base has neither."""
    if author == BASE:
        return "base"
    return f"assistant colour-{(author - 1) % _COLOURS} underline-{(author - 1) % _UNDERLINES}"


def _unmarked(token: Token) -> str:
    """The spaces before a word, which are not marked: at the end of a line the mark would be a stub."""
    word = token.text.lstrip(" ") or token.text
    return token.text[: len(token.text) - len(word)]


def _visible(text: str) -> str:
    """White space at the ends of a text as marks, because it tells one token from another."""
    return text.replace("\n", "⏎").replace(" ", "\u00a0") if text.strip() != text else text
