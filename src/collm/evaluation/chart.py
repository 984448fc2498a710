"""A chart as an inline SVG that takes its colours and font from the page around it."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterable, Sequence
from html import escape
from importlib.util import find_spec
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collm.evaluation.report import Chart, Point

# Colours nobody would choose, replaced in the finished drawing by those the page defines for light and dark.
_INK, _CURVE, _PAGE = "#010203", "#040506", "#070809"
_PAGE_COLOURS = {_INK: "currentColor", _CURVE: "var(--curve)", _PAGE: "var(--page)"}

_FONT_PT = 10
_MARK_PT = 7
_OFFSETS_PT = sorted(
    (
        (dx, dy)
        for dx in (0, -9, 9, -20, 20, -40, 40, -70, 70, -110, 110, -150, 150)
        for dy in (0, -11, 11, -20, 20, -34, 34, -50, 50)
    ),
    key=lambda offset: math.hypot(*offset),
)[1:]  # where a label may stand, seen from its point, the nearest first

Place = tuple[float, float]
"""In points, from the bottom left."""
Box = tuple[float, float, float, float]
"""Left, bottom, right, top, in points."""


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def draw_chart(chart: Chart) -> str:
    """One <svg> element: the curve, its interval as a band, every mark labelled, dashed lines and the place in use.

    Needs matplotlib, which `can_draw` asks for.
    """
    import matplotlib
    from matplotlib.figure import Figure

    curve = sorted(chart.curve, key=lambda point: point.x)
    settings = {"svg.fonttype": "none", "svg.hashsalt": "collm", "font.size": _FONT_PT, "figure.dpi": 72}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # Text stays text, so what matplotlib's own font lacks the reader's may have.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(5.8, 4.0), layout="constrained", facecolor="none")
        axes = figure.add_subplot(facecolor="none")
        _draw_axes(axes, chart)
        _draw_points(axes, curve, chart)
        _draw_place_in_use(axes, chart)
        figure.draw_without_rendering()  # settles the layout, so that points have their places
        _draw_labels(axes, curve, chart)
        drawing = io.StringIO()
        figure.savefig(drawing, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _inlined(drawing.getvalue(), chart, _described(curve, chart))


def _draw_axes(axes: Any, chart: Chart) -> None:
    points = [*chart.curve, *chart.marks]
    ends = [end for point in points for end in (point.low, point.high)]
    ends += [y for corners in chart.lines.values() for _, y in corners]
    margin = max(0.02, 0.06 * (max(ends) - min(ends)))
    furthest = 1.0 if chart.unit == "%" else max(point.x for point in points) or 1.0
    axes.set_xlim(-0.03 * furthest, 1.03 * furthest)
    axes.set_ylim(min(ends) - margin, max(ends) + margin)
    axes.set_xlabel(chart.x_label, color=_INK)
    axes.set_ylabel(chart.y_label, color=_INK)
    axes.yaxis.set_major_formatter(_percents)
    axes.xaxis.set_major_formatter(_percents if chart.unit == "%" else lambda value, _: f"{value:,g}")
    axes.grid(color=_INK, alpha=0.12, linewidth=0.6)
    axes.tick_params(length=0, labelcolor=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color=_INK, alpha=0.4)


def _percents(share: float, _: int) -> str:
    return f"{100 * share:g}%" if -1e-9 < share < 1 + 1e-9 else ""


def _draw_points(axes: Any, curve: Sequence[Point], chart: Chart) -> None:
    for corners in chart.lines.values():
        axes.plot(*zip(*corners, strict=True), color=_INK, alpha=0.6, linewidth=1, linestyle=(0, (1, 2)))
    places = [point.x for point in curve]
    axes.fill_between(
        places, [point.low for point in curve], [point.high for point in curve], color=_CURVE, alpha=0.18, linewidth=0
    )
    axes.plot(places, [point.y for point in curve], color=_CURVE, linewidth=2, marker="o", markersize=4)
    for mark in chart.marks:
        axes.plot([mark.x] * 2, [mark.low, mark.high], color=_INK, alpha=0.6, linewidth=1)
        axes.plot(mark.x, mark.y, "D", color=_PAGE, markeredgecolor=_INK, markersize=_MARK_PT - 1)


def _draw_place_in_use(axes: Any, chart: Chart) -> None:
    if chart.in_use is None:
        return
    axes.axvline(chart.in_use, color=_INK, linewidth=1, linestyle=(0, (4, 3)))
    share = (chart.in_use - axes.get_xlim()[0]) / (axes.get_xlim()[1] - axes.get_xlim()[0])
    side = "left" if share < 0.15 else "right" if share > 0.85 else "center"
    above_the_axes = {"transform": axes.get_xaxis_transform(), "va": "bottom", "ha": side}
    axes.text(chart.in_use, 1.01, f"in use: {chart.worded(chart.in_use)}", color=_INK, **above_the_axes)


def _draw_labels(axes: Any, curve: Sequence[Point], chart: Chart) -> None:
    """The names where they hide least: the nearest free place around their point, with a line to it."""
    marks = [_placed(axes, (mark.x, mark.y)) for mark in chart.marks]
    path = [_placed(axes, (point.x, point.y)) for point in curve]
    lines = {name: [_placed(axes, corner) for corner in corners] for name, corners in chart.lines.items()}
    taken = [_around(x, y, 5) for x, y in marks] + [_around(x, y, 2) for x, y in _walked(path)]
    taken += [_around(x, y, 1) for corners in lines.values() for x, y in _walked(corners)]
    inside: Box = tuple(axes.get_window_extent().extents)
    middle = (inside[0] + inside[2]) / 2
    labels = _one_label_per_place(zip(marks, (mark.name for mark in chart.marks), strict=True))
    for name, corners in lines.items():
        walked = _walked(corners)
        labels[walked[len(walked) // 2]] = name
    # From the middle outwards: points at an edge have the places left that reach inwards over the others.
    for (x, y), text in sorted(labels.items(), key=lambda label: abs(label[0][0] - middle)):
        places = [(_label_box(text, x + dx, y + dy, dx), dx, dy) for dx, dy in _OFFSETS_PT]
        box, dx, dy = min(places, key=lambda place: _badness(place[0], taken, inside))
        taken.append(box)
        line = {"arrowstyle": "-", "color": _INK, "alpha": 0.5, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 4}
        axes.annotate(
            text,
            xy=(x, y),
            xycoords="figure pixels",
            xytext=(dx, dy),
            textcoords="offset points",
            ha="left" if dx > 0 else "right" if dx < 0 else "center",
            va="center",
            color=_INK,
            parse_math=False,  # "$" is a dollar
            arrowprops=line if math.hypot(dx, dy) > 12 else None,
        ).set_in_layout(False)


def _placed(axes: Any, point: Place) -> Place:
    """Where a point comes to lie, in points."""
    x, y = axes.transData.transform(point)
    return float(x), float(y)


def _one_label_per_place(named: Iterable[tuple[Place, str]]) -> dict[Place, str]:
    """Names of points whose marks touch become the lines of one label, at the first of them."""
    labels: dict[Place, str] = {}
    for point, name in named:
        place = next((place for place in labels if math.dist(place, point) < _MARK_PT), point)
        labels[place] = f"{labels[place]}\n{name}" if place in labels else name
    return labels


def _around(x: float, y: float, radius: float) -> Box:
    return x - radius, y - radius, x + radius, y + radius


def _walked(path: Sequence[Place]) -> list[Place]:
    """Points along the path, some 1/20 of each leg apart."""
    steps = [step / 20 for step in range(20)]
    legs = [(ax + s * (bx - ax), ay + s * (by - ay)) for (ax, ay), (bx, by) in pairwise(path) for s in steps]
    return legs + list(path[-1:])


def _label_box(text: str, x: float, y: float, dx: float) -> Box:
    """Where a label anchored at (x, y) comes to lie; its width is estimated, the reader's font is not known."""
    lines = text.split("\n")
    width, height = 0.53 * _FONT_PT * max(map(len, lines)), 1.3 * _FONT_PT * len(lines)
    left = x if dx > 0 else x - width if dx < 0 else x - width / 2
    return left, y - height / 2, left + width, y + height / 2


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _badness(box: Box, taken: Sequence[Box], inside: Box) -> float:
    """Area hidden plus area outside the axes; among equals min() keeps the first, nearest place."""
    area = (box[2] - box[0]) * (box[3] - box[1])
    return sum(_overlap(box, other) for other in taken) + 10 * (area - _overlap(box, inside))


def _described(curve: Sequence[Point], chart: Chart) -> str:
    """What the drawing shows, for those who do not see it."""
    parts = []
    if curve:
        best = max(curve, key=lambda point: point.y)
        parts.append(
            f"Over {len(curve)} points the highest is {100 * best.y:.1f}%, at {chart.worded(best.x)} ({best.name})."
        )
    if chart.in_use is not None:
        parts.append(f"In use is {chart.worded(chart.in_use)}.")
    parts += [f"{mark.name}: {100 * mark.y:.1f}% at {chart.worded(mark.x)}." for mark in chart.marks]
    for name, corners in chart.lines.items():
        ends = " to ".join(f"{100 * y:.1f}% at {chart.worded(x)}" for x, y in (corners[0], corners[-1]))
        parts.append(f"{name}: from {ends}.")
    return " ".join(parts)


def _inlined(drawing: str, chart: Chart, description: str) -> str:
    """The <svg> element alone, sized and coloured by the page, with a title and a description."""
    svg = drawing[drawing.index("<svg") :]
    svg = re.sub(r'(?<=\bid=")|(?<=href="#)|(?<=url\(#)', f"{chart.name}-", svg)  # charts of a page share its ids
    for sentinel, colour in _PAGE_COLOURS.items():
        svg = svg.replace(sentinel, colour)
    svg = re.sub(r"<style.*?</style>", "", svg, count=1, flags=re.DOTALL)  # would apply to the whole page
    view_box = re.search(r'viewBox="[^"]*"', svg)
    assert view_box is not None, "matplotlib writes a viewBox"
    opening = (
        f'<svg class="chart" {view_box[0]} role="img" aria-labelledby="{chart.name}-title {chart.name}-description">'
        f'<title id="{chart.name}-title">{escape(chart.heading)}</title>'
        f'<desc id="{chart.name}-description">{escape(description)}</desc>'
    )
    return opening + svg[svg.index(">") + 1 :].strip()
