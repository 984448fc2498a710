"""What a report says: systems beside each other, the curve, answers with the author of every token."""

from __future__ import annotations

from dataclasses import dataclass, field

from collm.core.calibration import CalibrationPoint
from collm.errors import DataError


@dataclass(frozen=True)
class Row:
    """One system in the table.

    Attributes:
        accuracy: in [0, 1]; low and high are the ends of its 95 % interval.
        deferral_rate: share of generated tokens written by assistants.
        tokens_per_s: generated tokens per second.
        note: a few words under the name.

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


@dataclass(frozen=True)
class Token:
    """A token's text, who wrote it (an index into `Report.authors`) and the defer prob it was decided at."""

    text: str
    author: int
    defer_prob: float

    def __post_init__(self) -> None:
        _check_shares(self, "defer_prob")


@dataclass(frozen=True)
class Example:
    """One answer; `correct` is None where nobody judged it."""

    prompt: str
    reference: str
    tokens: list[Token]
    correct: bool | None = None


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        name: of its place in the page.
        heading: above it.
        columns: their headings; the first names the rows.
    """

    name: str
    heading: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


@dataclass(frozen=True)
class Report:
    """What the page says; an empty list leaves its section out.

    Attributes:
        summary: what was found, in sentences; an empty line starts a new paragraph.
        astray: answers that an assistant's token made worse than the base's own.
        tables: shown after the examples; one without rows is left out.
        authors: names; author 0 is the base.
        operating_point: the deferral rate the collaboration runs at, None if it has none.
        details: how to get the same again: versions, seed, command.
    """

    title: str
    summary: str
    rows: list[Row] = field(default_factory=list)
    curve: list[CalibrationPoint] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    astray: list[Example] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    authors: list[str] = field(default_factory=list)
    operating_point: float | None = None
    details: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.operating_point is not None:
            _check_shares(self, "operating_point")
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
