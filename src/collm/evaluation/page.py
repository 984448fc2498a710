"""The report as one HTML page: tables, marked tokens and a legend, readable by eye, keyboard and screen reader."""

from __future__ import annotations

import io
import os
import re
import warnings
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from collm.atomic import write_text
from collm.core.types import deferral_rate
from collm.errors import MissingExtra
from collm.evaluation.report import Chart, Report
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
    loader, options = PackageLoader("collm.evaluation", "."), {"trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, finalize=_printable, **options)
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
            x = [point.x for point in points]
            low, high = [point.low for point in points], [point.high for point in points]
            axes.fill_between(x, low, high, color=_CURVE, alpha=0.2, linewidth=0)
            axes.plot(x, [point.y for point in points], color=_CURVE, marker="o", markersize=3)
        for mark, shape in zip(chart.marks, cycle(_SHAPES), strict=False):
            axes.vlines(mark.x, mark.low, mark.high, color=_INK, linewidth=1)
            axes.plot(mark.x, mark.y, shape, color=_INK, markersize=6, label=visible(mark.name))
        for (name, corners), style in zip(chart.lines.items(), cycle((":", "--", "-.")), strict=False):
            axes.plot(*zip(*corners, strict=True), linestyle=style, color=_INK, label=name)
        if chart.in_use is not None:
            label = f"in use: {chart.worded(chart.in_use)}"
            axes.axvline(chart.in_use, color=_INK, linewidth=0.8, alpha=0.4, label=label)
        axes.set(xlabel=chart.x_label, ylabel=chart.y_label)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        if chart.unit == "%":
            axes.xaxis.set_major_formatter(PercentFormatter(1))
        if axes.get_legend_handles_labels()[0]:
            figure.legend(loc="outside lower center", ncols=2)
        stream = io.StringIO()
        unstated = dict.fromkeys(["Date", "Creator", "Format", "Type"])
        figure.savefig(stream, format="svg", transparent=True, metadata=unstated)
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor").replace(_CURVE, "var(--curve)")
    # Styles would hold for the whole page, and other pictures have groups of the same names.
    return Markup(re.sub(r'<style.*?</style>| xmlns(:\w+)?="[^"]*"|(?<=<g) id="[^"]*"', "", svg, flags=re.DOTALL))
