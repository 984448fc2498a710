"""Where everything in a chart lies; the template chart.svg draws it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from collm.evaluation.report import Chart, Point

Place = tuple[float, float]
"""x and y in pixels, from the top left."""
Box = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels."""

WIDTH, HEIGHT = 418, 288
INSIDE: Box = (50, 20, 412, 246)
"""The area between the axes."""
LINE_HEIGHT = 13

_CHARACTER_WIDTH = 5.3  # an estimate: the font is the reader's
_MARK_SIZE = 7
_MAX_TICKS = 6
_OFFSETS = sorted(
    (
        (dx, dy)
        for dx in (0, -9, 9, -20, 20, -40, 40, -70, 70, -110, 110, -150, 150)
        for dy in (0, -11, 11, -20, 20, -34, 34, -50, 50)
    ),
    key=lambda offset: math.hypot(*offset),
)[1:]  # of a label from its point, the nearest first


@dataclass(frozen=True)
class Label:
    """The names of a point: one per line, the first at `place`, which is where they begin, end or have their middle."""

    lines: list[str]
    place: Place
    anchor: Literal["start", "middle", "end"]
    leader: tuple[Place, Place] | None = None


@dataclass(frozen=True)
class Drawing:
    """A chart in pixels.

    Attributes:
        x_ticks, y_ticks: position along the axis, and text.
        curve, band: corners of the line, and of the area between the ends of its intervals.
        marks: place, top and bottom of the interval.
        lines: corners of each dashed line.
        in_use: of the value in use.
        labels: of marks and dashed lines.
        description: the chart in words.
    """

    chart: Chart
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    curve: list[Place]
    band: list[Place]
    marks: list[tuple[Place, float, float]]
    lines: list[list[Place]]
    in_use: Label | None
    labels: list[Label]
    description: str


@dataclass(frozen=True)
class _Axis:
    """Values from `low` to `high` on pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, most: float) -> list[float]:
        """Multiples of 1, 2 or 5 times a power of ten, from 0 to `most`."""
        rough = (self.high - self.low) / _MAX_TICKS
        power = 10 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
        first, last = math.ceil(max(self.low, 0) / step), math.floor(min(self.high, most) / step + 1e-9)
        return [step * n for n in range(first, last + 1)]


def draw(chart: Chart) -> Drawing:
    """Lay out a chart. The order of its points does not matter."""
    points = sorted(chart.curve, key=lambda point: point.x)
    x, y = _axes(chart)
    curve = [(x(point.x), y(point.y)) for point in points]
    marks = [((x(mark.x), y(mark.y)), y(mark.high), y(mark.low)) for mark in chart.marks]
    lines = {name: [(x(cx), y(cy)) for cx, cy in corners] for name, corners in chart.lines.items()}
    low, high = [(x(point.x), y(point.low)) for point in points], [(x(point.x), y(point.high)) for point in points]
    named = [(place, mark.name) for (place, _, _), mark in zip(marks, chart.marks, strict=True)]
    return Drawing(
        chart=chart,
        x_ticks=[(x(value), _tick(value, chart.unit)) for value in x.ticks(1.0 if chart.unit == "%" else math.inf)],
        y_ticks=[(y(value), _tick(value, "%")) for value in y.ticks(1.0)],
        curve=curve,
        band=[*low, *reversed(high)],
        marks=marks,
        lines=list(lines.values()),
        in_use=None if chart.in_use is None else _label_in_use(chart, x(chart.in_use)),
        labels=_labels(named, curve, lines),
        description=_description(points, chart),
    )


def _axes(chart: Chart) -> tuple[_Axis, _Axis]:
    left, top, right, bottom = INSIDE
    points = [*chart.curve, *chart.marks]
    furthest = 1.0 if chart.unit == "%" else max(point.x for point in points) or 1.0
    ends = [end for point in points for end in (point.low, point.high)]
    ends += [y for corners in chart.lines.values() for _, y in corners]
    margin = max(0.02, 0.06 * (max(ends) - min(ends)))
    return (
        _Axis(-0.03 * furthest, 1.03 * furthest, left, right),
        _Axis(min(ends) - margin, max(ends) + margin, bottom, top),
    )


def _tick(value: float, unit: str) -> str:
    return f"{100 * value:g}%" if unit == "%" else f"{value:,g}"


def _label_in_use(chart: Chart, x: float) -> Label:
    """A label over the axes, which does not reach over their ends."""
    assert chart.in_use is not None
    left, top, right, _ = INSIDE
    share = (x - left) / (right - left)
    anchor: Literal["start", "middle", "end"] = "start" if share < 0.15 else "end" if share > 0.85 else "middle"
    return Label([f"in use: {chart.worded(chart.in_use)}"], (x, top - 6), anchor)


def _labels(marks: Sequence[tuple[Place, str]], curve: Sequence[Place], lines: dict[str, list[Place]]) -> list[Label]:
    """Each label at the free place that is nearest to its point."""
    taken = [_around(place, 5) for place, _ in marks] + [_around(place, 2) for place in _walked(curve)]
    taken += [_around(place, 1) for corners in lines.values() for place in _walked(corners)]
    names = _one_label_per_place(marks)
    for name, corners in lines.items():
        walked = _walked(corners)
        names[walked[len(walked) // 2]] = [name]
    labels = []
    # From the middle outwards: points at an edge have the places left that reach inwards over the others.
    middle = (INSIDE[0] + INSIDE[2]) / 2
    for (x, y), texts in sorted(names.items(), key=lambda named: abs(named[0][0] - middle)):
        boxes = [(_label_box(texts, x + dx, y + dy, dx), dx, dy) for dx, dy in _OFFSETS]
        box, dx, dy = min(boxes, key=lambda one: _badness(one[0], taken))
        taken.append(box)
        first_line = (x + dx, box[1] + LINE_HEIGHT / 2)
        leader = ((x, y), (x + dx, y + dy)) if math.hypot(dx, dy) > 12 else None
        labels.append(Label(texts, first_line, "start" if dx > 0 else "end" if dx < 0 else "middle", leader))
    return labels


def _one_label_per_place(marks: Iterable[tuple[Place, str]]) -> dict[Place, list[str]]:
    """Points whose marks touch share a label, at the first of them."""
    names: dict[Place, list[str]] = {}
    for point, name in marks:
        place = next((place for place in names if math.dist(place, point) < _MARK_SIZE), point)
        names.setdefault(place, []).append(name)
    return names


def _around(place: Place, radius: float) -> Box:
    x, y = place
    return x - radius, y - radius, x + radius, y + radius


def _walked(path: Sequence[Place]) -> list[Place]:
    """The corners of a path and 19 points between each two of them."""
    steps = [step / 20 for step in range(20)]
    legs = [(ax + s * (bx - ax), ay + s * (by - ay)) for (ax, ay), (bx, by) in pairwise(path) for s in steps]
    return legs + list(path[-1:])


def _label_box(lines: Sequence[str], x: float, y: float, dx: float) -> Box:
    width, height = _CHARACTER_WIDTH * max(map(len, lines)), LINE_HEIGHT * len(lines)
    left = x if dx > 0 else x - width if dx < 0 else x - width / 2
    return left, y - height / 2, left + width, y + height / 2


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _badness(box: Box, taken: Sequence[Box]) -> float:
    """The area that a label hides, plus ten times its area outside the axes."""
    area = (box[2] - box[0]) * (box[3] - box[1])
    return sum(_overlap(box, other) for other in taken) + 10 * (area - _overlap(box, INSIDE))


def _description(curve: Sequence[Point], chart: Chart) -> str:
    parts = []
    if curve:
        best = max(curve, key=lambda point: point.y)
        parts.append(f"Over {len(curve)} points the highest is {best.y:.1%}, at {chart.worded(best.x)} ({best.name}).")
    if chart.in_use is not None:
        parts.append(f"In use is {chart.worded(chart.in_use)}.")
    parts += [f"{mark.name}: {mark.y:.1%} at {chart.worded(mark.x)}." for mark in chart.marks]
    for name, corners in chart.lines.items():
        ends = " to ".join(f"{y:.1%} at {chart.worded(x)}" for x, y in (corners[0], corners[-1]))
        parts.append(f"{name}: from {ends}.")
    return " ".join(parts)
