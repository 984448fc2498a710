"""Accuracy against deferral rate as an inline SVG that takes its colours and font from the page around it."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterable, Sequence
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from collm.errors import MissingExtra

if TYPE_CHECKING:
    from collm.core.calibration import CalibrationPoint
    from collm.evaluation.report import Row

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

Point = tuple[float, float]
Box = tuple[float, float, float, float]
"""Left, bottom, right, top, in points."""


def require_matplotlib() -> None:
    """Raise MissingExtra where nothing could be drawn: to be asked before long work rather than after it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingExtra("matplotlib", "eval") from error


def draw_curve(curve: Sequence[CalibrationPoint], rows: Sequence[Row], operating_point: float | None) -> str:
    """One <svg> element: the curve, its interval as a band, and every row as a labelled point.

    Args:
        operating_point: the deferral rate in use, drawn as a vertical line.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    curve = sorted(curve, key=lambda point: point.deferral_rate)
    settings = {"svg.fonttype": "none", "svg.hashsalt": "collm", "font.size": _FONT_PT, "figure.dpi": 72}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # Text stays text, so what matplotlib's own font lacks the reader's may have.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(5.8, 4.0), layout="constrained", facecolor="none")
        axes = figure.add_subplot(facecolor="none")
        _draw_axes(axes, curve, rows)
        _draw_points(axes, curve, rows)
        _draw_operating_point(axes, operating_point)
        figure.draw_without_rendering()  # settles the layout, so that points have their places
        _draw_labels(axes, curve, rows)
        drawing = io.StringIO()
        figure.savefig(drawing, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _inlined(drawing.getvalue(), _described(curve, rows, operating_point))


def _draw_axes(axes: Any, curve: Sequence[CalibrationPoint], rows: Sequence[Row]) -> None:
    points: list[CalibrationPoint | Row] = [*curve, *rows]
    ends = [end for point in points for end in (point.low, point.high)]
    margin = max(0.02, 0.06 * (max(ends) - min(ends)))
    axes.set_xlim(-0.03, 1.03)
    axes.set_ylim(min(ends) - margin, max(ends) + margin)
    axes.set_xlabel("Deferral rate", color=_INK)
    axes.set_ylabel("Accuracy", color=_INK)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{100 * value:g}%" if -1e-9 < value < 1 + 1e-9 else "")
    axes.grid(color=_INK, alpha=0.12, linewidth=0.6)
    axes.tick_params(length=0, labelcolor=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color=_INK, alpha=0.4)


def _draw_points(axes: Any, curve: Sequence[CalibrationPoint], rows: Sequence[Row]) -> None:
    rates = [point.deferral_rate for point in curve]
    low, high = [point.low for point in curve], [point.high for point in curve]
    axes.fill_between(rates, low, high, color=_CURVE, alpha=0.18, linewidth=0)
    axes.plot(rates, [point.metric for point in curve], color=_CURVE, linewidth=2, marker="o", markersize=4)
    for row in rows:
        axes.plot([row.deferral_rate] * 2, [row.low, row.high], color=_INK, alpha=0.6, linewidth=1)
        axes.plot(row.deferral_rate, row.accuracy, "D", color=_PAGE, markeredgecolor=_INK, markersize=_MARK_PT - 1)


def _draw_operating_point(axes: Any, rate: float | None) -> None:
    if rate is None:
        return
    axes.axvline(rate, color=_INK, linewidth=1, linestyle=(0, (4, 3)))
    side = "left" if rate < 0.15 else "right" if rate > 0.85 else "center"
    above_the_axes = {"transform": axes.get_xaxis_transform(), "va": "bottom", "ha": side}
    axes.text(rate, 1.01, f"in use: {100 * rate:.1f}%", color=_INK, **above_the_axes)


def _draw_labels(axes: Any, curve: Sequence[CalibrationPoint], rows: Sequence[Row]) -> None:
    """The rows' names where they hide least: the nearest free place around their point, with a line to it."""
    points = [tuple(axes.transData.transform((row.deferral_rate, row.accuracy))) for row in rows]
    path = [tuple(axes.transData.transform((point.deferral_rate, point.metric))) for point in curve]
    taken = [_around(x, y, 5) for x, y in points] + [_around(x, y, 2) for x, y in _walked(path)]
    inside: Box = tuple(axes.get_window_extent().extents)
    middle = (inside[0] + inside[2]) / 2
    labels = _one_label_per_place(zip(points, (row.name for row in rows), strict=True))
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


def _one_label_per_place(named: Iterable[tuple[Point, str]]) -> dict[Point, str]:
    """Names of points whose marks touch become the lines of one label, at the first of them."""
    labels: dict[Point, str] = {}
    for point, name in named:
        place = next((place for place in labels if math.dist(place, point) < _MARK_PT), point)
        labels[place] = f"{labels[place]}\n{name}" if place in labels else name
    return labels


def _around(x: float, y: float, radius: float) -> Box:
    return x - radius, y - radius, x + radius, y + radius


def _walked(path: Sequence[Point]) -> list[Point]:
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


def _described(curve: Sequence[CalibrationPoint], rows: Sequence[Row], operating_point: float | None) -> str:
    """What the drawing shows, for those who do not see it."""
    parts = []
    if curve:
        best = max(curve, key=lambda point: point.metric)
        parts.append(
            f"Over {len(curve)} thresholds the accuracy is highest, {100 * best.metric:.1f}%, "
            f"at a deferral rate of {100 * best.deferral_rate:.1f}%."
        )
    if operating_point is not None:
        parts.append(f"The deferral rate in use is {100 * operating_point:.1f}%.")
    parts += [f"{row.name}: {100 * row.accuracy:.1f}% at {100 * row.deferral_rate:.1f}%." for row in rows]
    return " ".join(parts)


def _inlined(drawing: str, description: str) -> str:
    """The <svg> element alone, sized and coloured by the page, with a title and a description."""
    svg = drawing[drawing.index("<svg") :]
    for sentinel, colour in _PAGE_COLOURS.items():
        svg = svg.replace(sentinel, colour)
    svg = re.sub(r"<style.*?</style>", "", svg, count=1, flags=re.DOTALL)  # would apply to the whole page
    view_box = re.search(r'viewBox="[^"]*"', svg)
    assert view_box is not None, "matplotlib writes a viewBox"
    opening = (
        f'<svg class="curve" {view_box[0]} role="img" aria-labelledby="curve-title curve-description">'
        '<title id="curve-title">Accuracy against deferral rate</title>'
        f'<desc id="curve-description">{escape(description)}</desc>'
    )
    return opening + svg[svg.index(">") + 1 :].strip()
