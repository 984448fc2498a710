"""The report as one HTML page: tables, marked tokens and a legend, readable by eye, keyboard and screen reader."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from collm.atomic import atomic_file
from collm.core.types import BASE, deferral_rate
from collm.decoding.candidates import Candidates
from collm.evaluation.chart import can_draw, draw_chart
from collm.evaluation.report import Chart, Example, Report, Row, Table, Token

logger = logging.getLogger(__name__)

_COLOURS = 6
_UNDERLINES = 5
_VERDICTS = {
    True: '<span class="verdict right">✓ right</span>',
    False: '<span class="verdict wrong">✗ wrong</span>',
    None: "",
}
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def write_report(path: str | os.PathLike[str], report: Report) -> None:
    """Write the page to `path`, whole or not at all; missing folders are made.

    The page asks nothing of the network and has the browser hold it to that (a content security policy). The same
    report gives the same bytes. Without matplotlib its charts are tables of their numbers, which is logged once.

    Raises:
        WriteError: the file cannot be written; what was there stays.
    """
    page = render_page(report)
    with atomic_file(Path(path)) as temporary:
        temporary.write_text(page, encoding="utf-8", newline="\n")


def render_page(report: Report) -> str:
    """The whole page; every text from the report is escaped."""
    if report.charts and not can_draw():
        logger.warning("matplotlib is not installed, so the charts are tables of numbers: pip install 'collm[eval]'")
    template = files("collm.evaluation").joinpath("report.html").read_text(encoding="utf-8")
    sections = (
        _table(report.rows, report.measure),
        *map(_chart, report.charts),
        _examples(report),
        _astray(report),
        *(_texts(table) for table in report.tables),
        _details(report.details),
    )
    return Template(template).substitute(
        title=_text(report.title),
        summary="".join(f"<p>{_text(part)}</p>" for part in re.split(r"\n\s*\n", report.summary.strip()) if part),
        sections="\n".join(filter(None, sections)),
    )


def _table(rows: list[Row], measure: str | None) -> str:
    if not rows:
        return ""
    scored = [] if measure is None else [_with_interval(measure)]
    columns = ("System", *scored, "Deferral rate", "Tokens/s")
    body = "".join(_table_row(row, scored=bool(scored)) for row in rows)
    bars = '<span class="wide">The bar is the score, the whisker its 95% interval.</span>' if scored else ""
    caption = f"Every system on the same questions. {bars}"
    return _section("results", "Results", _scrolling("Results, table", _html_table(caption, columns, body)))


def _table_row(row: Row, *, scored: bool) -> str:
    note = f'<span class="note">{_text(row.note)}</span>' if row.note else ""
    bar = (
        '<span class="bar" aria-hidden="true">'
        f'<span class="fill" style="width:{100 * row.accuracy:.2f}%"></span>'
        f'<span class="whisker" style="left:{100 * row.low:.2f}%;width:{100 * (row.high - row.low):.2f}%"></span>'
        "</span>"
    )
    score = [bar + _measured(row.accuracy, row.low, row.high)] if scored else []
    cells = (*score, _percent(row.deferral_rate), _rate(row.tokens_per_s))
    return f'<tr><th scope="row">{_text(row.name)}{note}</th>{_cells(cells)}</tr>\n'


def _chart(chart: Chart) -> str:
    if not chart.curve and not chart.marks:
        return ""
    points = [*sorted(chart.curve, key=lambda point: point.x), *chart.marks]
    body = "".join(
        f'<tr><th scope="row">{_text(point.name)}</th>'
        + _cells((chart.worded(point.x), _measured(point.y, point.low, point.high)))
        + "</tr>\n"
        for point in points
    )
    columns = ("", _text(chart.x_label), _with_interval(chart.y_label))
    numbers = _html_table("In order of the line, then the diamonds.", columns, body)
    figure = f"<figure>{draw_chart(chart)}</figure>" if can_draw() else ""
    return _section(
        chart.name,
        _text(chart.heading),
        f"<p>{_text(chart.note)}</p>{figure}"
        f"<details{'' if figure else ' open'}><summary>The numbers of this chart</summary>"
        f"{_scrolling(f'{_text(chart.heading)}, numbers', numbers)}</details>",
    )


def _examples(report: Report) -> str:
    if not report.examples:
        return ""
    intro = (
        "<p>Each token is marked by who wrote it. Point at a token, or move to it with the Tab and arrow keys, to see "
        "its author and its defer prob, the probability that the head gave to asking an assistant; where they were "
        "kept, also the tokens that each model thought most probable there.</p>"
    )
    return _section("examples", "Who wrote what", intro + _legend(report.authors) + _cards(report.examples, report, 1))


def _astray(report: Report) -> str:
    if not report.astray:
        return ""
    intro = "<p>Answers that score lower than the base's alone, with at least one token by an assistant.</p>"
    first = len(report.examples) + 1
    return _section("astray", "Where an assistant led the answer astray", intro + _cards(report.astray, report, first))


def _cards(examples: list[Example], report: Report, first: int) -> str:
    return "".join(_example(number, example, report.authors) for number, example in enumerate(examples, first))


def _texts(table: Table) -> str:
    if not table.rows:
        return ""
    body = "".join(
        f'<tr><th scope="row"><span class="verbatim">{_visible(name)}</span></th>{_cells(map(_text, cells))}</tr>\n'
        for name, *cells in table.rows
    )
    content = _html_table(_text(table.note), map(_text, table.columns), body)
    return _section(table.name, _text(table.heading), _scrolling(f"{_text(table.heading)}, table", content))


def _visible(text: str) -> str:
    """Blanks at the ends, which tell one token from another, as marks."""
    return _text(text).replace("\n", "⏎").replace(" ", "\u00a0") if text.strip() != text else _text(text)


def _legend(authors: list[str]) -> str:
    entries = "".join(
        f'<li><span class="{_author_class(author)}">{_text(name)}</span>{" (unmarked)" if author == BASE else ""}</li>'
        for author, name in enumerate(authors)
    )
    return f'<ul class="legend" aria-label="Authors and their marks">{entries}</ul>'


def _example(number: int, example: Example, authors: list[str]) -> str:
    rate = deferral_rate([token.author for token in example.tokens])
    tokens = "".join(_token(token, authors) for token in example.tokens)
    return (
        f'<article aria-labelledby="example-{number}"><header><h3 id="example-{number}">Example {number}</h3>'
        f"{_verdict(example)}"
        f'<span class="note">{len(example.tokens)} tokens, {_percent(rate)} by assistants</span></header>'
        f'<dl><dt>Prompt</dt><dd class="text" dir="auto">{_text(example.prompt)}</dd>'
        f'<dt>Answer</dt><dd><ol class="tokens text" dir="auto" role="list" aria-label="Answer, token by token">'
        f"{tokens}</ol></dd>"
        f'<dt>Reference</dt><dd class="text" dir="auto">{_text(example.reference)}</dd></dl></article>\n'
    )


def _verdict(example: Example) -> str:
    if example.score is not None:
        return f'<span class="verdict">score {example.score:.2g}</span>'
    return _VERDICTS[example.correct]


def _token(token: Token, authors: list[str]) -> str:
    """The blank before a word stays unmarked: at the end of a line its mark would be a stub."""
    word = token.text.lstrip(" ") or token.text
    blank = token.text[: len(token.text) - len(word)]
    # A line break, and the empty text of a token that leaves a character incomplete, must be seen as well.
    shown = _text(word).replace("\n", '<span class="glyph">⏎</span>\n') or '<span class="glyph">◌</span>'
    return (
        f'<li class="token" tabindex="0">{blank}<span class="{_author_class(token.author)}">{shown}</span>'
        f'<span class="tip"> {_text(authors[token.author])} · defer prob {token.defer_prob:.3f} '
        f"{_candidates(token, authors)}</span></li>"
    )


def _candidates(token: Token, authors: list[str]) -> str:
    """A line for each author that was asked: what it would have written, and how sure it was."""
    lines = zip(authors, token.candidates, strict=False)
    return "".join(f'<span class="line">{_text(name)}: {_worded(found)} </span>' for name, found in lines if found)


def _worded(candidates: Candidates) -> str:
    return " · ".join(f"<b>{_visible(text) or '◌'}</b> {_percent(prob)}" for text, prob in candidates)


def _author_class(author: int) -> str:
    """Assistants differ by colour and by underline; the base has neither."""
    if author == BASE:
        return "base"
    return f"assistant colour-{(author - 1) % _COLOURS} underline-{(author - 1) % _UNDERLINES}"


def _details(details: dict[str, str]) -> str:
    if not details:
        return ""
    entries = "".join(f"<dt>{_text(name)}</dt><dd><code>{_text(value)}</code></dd>" for name, value in details.items())
    return _section("details", "How this was made", f'<dl class="details">{entries}</dl>')


def _section(name: str, heading: str, content: str) -> str:
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{heading}</h2>{content}</section>'


def _html_table(caption: str, columns: Iterable[str], body: str) -> str:
    head = "".join(f'<th scope="col">{column}</th>' for column in columns)
    return f"<table><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>"


def _scrolling(label: str, table: str) -> str:
    """A table too wide for the window scrolls in its own box, which a keyboard must reach to scroll it."""
    return f'<div class="scrolling" role="region" tabindex="0" aria-label="{label}">{table}</div>'


def _cells(cells: Iterable[str]) -> str:
    return "".join(f"<td>{cell}</td>" for cell in cells)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _with_interval(measure: str) -> str:
    return f'{_text(measure)} <span class="interval">95% interval</span>'


def _measured(share: float, low: float, high: float) -> str:
    return (
        f'<span class="figure">{_percent(share)}</span> '
        f'<span class="interval">{_percent(low)} to {_percent(high)}</span>'
    )


def _rate(per_s: float) -> str:
    return f"{per_s:,.0f}" if per_s >= 100 else f"{per_s:.3g}"


def _text(text: str) -> str:
    """Escaped, with what no page may contain made visible: control characters as their pictures."""
    return escape(_UNPRINTABLE.sub(lambda found: _picture(ord(found[0])), text))


def _picture(code: int) -> str:
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"
