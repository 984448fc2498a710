"""Pictures of charts, drawn by matplotlib in the colours of the page."""

from __future__ import annotations

import io
import re
import warnings
from itertools import cycle
from typing import Any

from markupsafe import Markup

from collm.errors import MissingExtra
from collm.evaluation.report import Chart
from collm.redaction import visible

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


def draw(chart: Chart) -> Markup:
    """A chart as an SVG element without colours of its own. The order of its points does not matter.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
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
