"""A report: a table of systems, charts, and answers with the author of every token, as one HTML page."""

from __future__ import annotations

import io
import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from collm.atomic import write_text
from collm.core.types import Completion, deferral_rate
from collm.engine.candidates import Candidates
from collm.errors import DataError, MissingExtra
from collm.evaluation.intervals import bootstrap_interval
from collm.redaction import visible

_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_PICTURES = {**{code: chr(0x2400 + code) for code in range(0x20)}, 0x7F: "\u2421"}
_INK, _CURVE = "#010203", "#040506"
"""Colours that stand for those of the page."""
_SHAPES = ("D", "o", "s", "^", "v", "P", "X", "*", "p", "<")
_LOOK: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "collm",
    "text.parse_math": False,
    "font.size": 10,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
}


@dataclass(frozen=True)
class SystemRow:
    """One system in the table: its accuracy with a 95 % interval, the share of generated tokens by assistants, and the
    generated tokens per second. The note stands under the name. A DataError if a share is outside [0, 1].
    """

    name: str
    accuracy: float
    low: float
    high: float
    deferral_rate: float
    tokens_per_s: float
    note: str = ""

    def __post_init__(self) -> None:
        _check_shares(self, "accuracy", "low", "high", "deferral_rate")

    @classmethod
    def of(
        cls, name: str, scores: Sequence[float], completions: Sequence[Completion], seconds: float, note: str = ""
    ) -> SystemRow:
        """The row of a system, from its completions, their scores in [0, 1] and the time to generate them."""
        authors = [author for completion in completions for author in completion.authors]
        interval, rate = bootstrap_interval(scores), deferral_rate(authors)
        return cls(name, interval.mean, interval.low, interval.high, rate, len(authors) / seconds, note)


@dataclass(frozen=True)
class Token:
    """A token of an answer, by an author of `Report.authors`, with the most probable tokens of each author if known."""

    text: str
    author: int
    defer_prob: float
    candidates: Sequence[Candidates] = ()

    def __post_init__(self) -> None:
        _check_shares(self, "defer_prob")

    @staticmethod
    def of(completion: Completion) -> list[Token]:
        """The tokens of a completion that have a text."""
        tokens = zip(completion.token_texts, completion.authors, completion.defer_probs, strict=True)
        return [Token(*token) for token in tokens if token[0]]


@dataclass(frozen=True)
class ShownAnswer:
    """One answer, token by token. Its score is 1 if it is right, 0 if it is wrong, None if there is none."""

    prompt: str
    reference: str
    tokens: list[Token]
    score: float | None = None


@dataclass(frozen=True)
class Table:
    """A table of texts with its id in the page and its caption. The first column names the rows."""

    name: str
    heading: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class ChartPoint:
    """A share y at a place x, with its 95 % interval and its name."""

    name: str
    x: float
    y: float
    low: float
    high: float

    def __post_init__(self) -> None:
        _check_shares(self, "y", "low", "high")


@dataclass(frozen=True)
class Chart:
    """Shares over an axis. The name is the id in the page. The note stands under the heading.

    Attributes:
        curve: points joined by a line, with their intervals as a band.
        marks: points with labels.
        lines: dotted lines by name, as corners (x, y).
        in_use: the value in use, marked on the x axis.
        unit: the unit of x: "%" for shares from 0 to 1.
    """

    name: str
    heading: str
    note: str
    x_label: str
    y_label: str
    curve: Sequence[ChartPoint]
    marks: Sequence[ChartPoint] = ()
    lines: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    in_use: float | None = None
    unit: str = "%"

    def __post_init__(self) -> None:
        used = self.in_use or 0.0
        for x in [used, *(point.x for point in [*self.curve, *self.marks])]:
            if not (0 <= x <= 1 or (self.unit != "%" and 0 <= x < math.inf)):
                expected = "a share from 0 to 1 (a percentage over 100)" if self.unit == "%" else "at least 0"
                raise DataError(f"chart {self.name!r} has a point at {x} {self.unit}, expected {expected}")

    def worded(self, x: float) -> str:
        """A value on the x axis with its unit."""
        return f"{100 * x:.1f}%" if self.unit == "%" else f"{x:,.3g} {self.unit}"


def deferral_chart(
    curve: Sequence[ChartPoint],
    rows: Sequence[SystemRow],
    rate: float,
    lines: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    measure: str = "Accuracy",
) -> Chart:
    """A chart of a measure against deferral rate, with thresholds as the curve and systems as marks."""
    return Chart(
        name="curve",
        heading=f"{measure} against deferral rate",
        note=("The line is the collaboration at different thresholds, the band its 95% interval. " if curve else "")
        + "The marks are the systems of the table.",
        x_label="Deferral rate",
        y_label=measure,
        curve=curve,
        marks=[ChartPoint(row.name, row.deferral_rate, row.accuracy, row.low, row.high) for row in rows],
        lines=lines or {},
        in_use=rate,
    )


@dataclass(frozen=True)
class Report:
    """The content of the page. A section without content is left out.

    Attributes:
        summary: the findings in sentences. An empty line starts a new paragraph.
        measure: name of the rows' accuracy; None if there are no scores.
        note: said of the rows, after what their bars mean.
        astray: answers with assistant tokens that are worse than those of the base alone.
        charts: shown after the rows.
        tables: shown after the examples.
        authors: names of the authors, the base first.
        details: how to reproduce the results: versions, seed, command.
    """

    title: str
    summary: str
    rows: list[SystemRow] = field(default_factory=list)
    measure: str | None = "Accuracy"
    note: str = ""
    charts: list[Chart] = field(default_factory=list)
    examples: list[ShownAnswer] = field(default_factory=list)
    astray: list[ShownAnswer] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    authors: list[str] = field(default_factory=list)
    details: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for token in (token for example in [*self.examples, *self.astray] for token in example.tokens):
            if not 0 <= token.author < len(self.authors):
                raise DataError(
                    f"token {token.text!r} is by author {token.author}, but the report names "
                    f"{len(self.authors)} authors; add their names, the base first"
                )


def _check_shares(record: object, *names: str) -> None:
    for name in names:
        value = getattr(record, name)
        if not 0 <= value <= 1:  # also true for NaN
            owner = type(record).__name__
            raise DataError(f"{owner}.{name} is {value}, expected a share from 0 to 1 (a percentage over 100)")


def write_report(path: str | os.PathLike[str], report: Report) -> None:
    """Write the page to `path`, whole or not at all. Missing directories are created.

    The page loads nothing from the network, and its content security policy forbids it to. The same report gives the
    same bytes. A MissingExtra if the report has a chart, and matplotlib is not installed.
    """
    write_text(Path(path), render_page(report))


def render_page(report: Report) -> str:
    """The whole page. Every text of the report is escaped."""
    paragraphs = [part for part in re.split(r"\n\s*\n", report.summary.strip()) if part]
    drawings = [(chart, _drawn(chart)) for chart in report.charts if chart.curve or chart.marks]
    return _template().render(report=report, paragraphs=paragraphs, drawings=drawings)


@cache
def _template() -> Template:
    safe: dict[str, Any] = {"autoescape": True, "undefined": StrictUndefined, "finalize": _printable}
    loader = PackageLoader("collm.evaluation", ".")
    environment = Environment(loader=loader, trim_blocks=True, lstrip_blocks=True, **safe)
    environment.filters |= {
        "css": "{:.2%}".format,
        "percent": "{:.1%}".format,
        "rate": lambda per_s: f"{per_s:,.0f}" if per_s >= 100 else f"{per_s:.3g}",
        "share_of_assistants": lambda tokens: deferral_rate([token.author for token in tokens]),
        # White space at the ends of a text as marks, because it tells one token from another.
        "visible": lambda text: text.replace("\n", "⏎").replace(" ", "\u00a0") if text.strip() != text else text,
    }
    return environment.get_template("report.html")


def _printable(value: Any) -> Any:
    """Control characters as their pictures, in every text that a template inserts."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return _UNPRINTABLE.sub(lambda found: _PICTURES.get(ord(found[0]), "\ufffd"), value)


def _drawn(chart: Chart) -> Markup:
    """A chart as an SVG element in the colours of the page. The order of its points does not matter."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from matplotlib.ticker import PercentFormatter
    except ImportError as error:
        raise MissingExtra("matplotlib", "eval") from error
    with rc_context(_LOOK), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the reader's font has it
        figure = Figure(figsize=(5.6, 4.4), layout="constrained")
        axes = figure.subplots()
        points = sorted(chart.curve, key=lambda point: point.x)
        if points:
            x, y, low, high = zip(*((point.x, point.y, point.low, point.high) for point in points), strict=True)
            axes.fill_between(x, low, high, color=_CURVE, alpha=0.2, linewidth=0)
            axes.plot(x, y, color=_CURVE, marker="o", markersize=3)
        for mark, shape in zip(chart.marks, cycle(_SHAPES), strict=False):
            axes.vlines(mark.x, mark.low, mark.high, color=_INK, linewidth=1)
            axes.plot(mark.x, mark.y, shape, color=_INK, markersize=6, label=visible(mark.name))
        for (name, corners), style in zip(chart.lines.items(), cycle((":", "--", "-.")), strict=False):
            axes.plot(*zip(*corners, strict=True), linestyle=style, color=_INK, label=name)
        if (used := chart.in_use) is not None:
            axes.axvline(used, color=_INK, linewidth=0.8, alpha=0.4, label=f"in use: {chart.worded(used)}")
        axes.set(xlabel=chart.x_label, ylabel=chart.y_label)
        for axis in (axes.yaxis, axes.xaxis)[: 2 if chart.unit == "%" else 1]:
            axis.set_major_formatter(PercentFormatter(1))
        if axes.get_legend_handles_labels()[0]:
            figure.legend(loc="outside lower center", ncols=2)
        unstated = dict.fromkeys(["Date", "Creator", "Format", "Type"])
        figure.savefig(stream := io.StringIO(), format="svg", transparent=True, metadata=unstated)
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor").replace(_CURVE, "var(--curve)")
    # Styles would hold for the whole page, and other pictures have groups of the same names.
    return Markup(re.sub(r'<style.*?</style>| xmlns(:\w+)?="[^"]*"|(?<=<g) id="[^"]*"', "", svg, flags=re.DOTALL))
