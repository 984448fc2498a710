"""The content of a report: a table of systems, charts, answers with the author of every token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from collm.core.types import Completion, deferral_rate
from collm.engine.candidates import Candidates
from collm.errors import DataError
from collm.evaluation.intervals import bootstrap_interval


@dataclass(frozen=True)
class SystemRow:
    """One system in the table.

    Attributes:
        accuracy: in [0, 1]. low and high are its 95 % interval.
        deferral_rate: share of generated tokens written by assistants.
        tokens_per_s: generated tokens per second.
        note: a short text under the name.

    Raises:
        DataError: a share is outside [0, 1].
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
        interval = bootstrap_interval(scores)
        authors = [author for completion in completions for author in completion.authors]
        speed = len(authors) / seconds
        return cls(name, interval.mean, interval.low, interval.high, deferral_rate(authors), speed, note)


@dataclass(frozen=True)
class Token:
    """A token of an answer.

    Attributes:
        author: index into `Report.authors`.
        defer_prob: the defer prob at this token.
        candidates: most probable tokens of each author; empty if they are unknown.
    """

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
    """One answer, token by token.

    Attributes:
        score: in [0, 1]: 1 for a right answer, 0 for a wrong one. None if there is no score.
    """

    prompt: str
    reference: str
    tokens: list[Token]
    score: float | None = None


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        name: its id in the page.
        note: its caption.
        columns: headings. The first column names the rows.
    """

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
    """Shares over an axis.

    Attributes:
        name: its id in the page.
        note: a sentence or two under the heading.
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
        used = [] if self.in_use is None else [self.in_use]
        for x in [*used, *(point.x for point in [*self.curve, *self.marks])]:
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
