"""What a terminal shows of texts that models, rows and files of strangers hold: never their control sequences.

Each token has its author's colour. Where the output is no terminal, it holds the text of models unchanged.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from collm.errors import ConfigError
from collm.redaction import visible

if TYPE_CHECKING:
    from collm.core.calibration import Calibration
    from collm.core.types import TokenStep
    from collm.evaluation.compare import Comparison
    from collm.evaluation.gold import TeacherForcedCurve
    from collm.evaluation.intervals import Interval
    from collm.evaluation.report import SystemRow, Token

STYLES = ("bold green", "bold magenta", "bold cyan", "bold yellow", "bold blue", "bold red")
"""Rich styles of the assistants. The base is plain."""
TEXTS = ("", "system", "model", "best")
"""Headings of columns with texts. They are on the left and may take several lines."""


def style_of(author: int) -> str:
    return STYLES[(author - 1) % len(STYLES)] if author else ""


def coloured(steps: Iterable[TokenStep | Token]) -> Text:
    """The text of these steps, each in its author's style."""
    return Text.assemble(*((step.text, style_of(step.author)) for step in steps))


def legend(names: Sequence[str]) -> Text:
    """Which colour is whom."""
    authors = [part for author, name in enumerate(names) for part in ((name, style_of(author)), "  ")]
    return Text.assemble("written by: ", *authors, style="dim")


class Console(RichConsole):
    """A rich console whose texts cannot control the terminal, though its colours do."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            shown = segment.control or not self.is_terminal
            yield segment if shown else Segment(visible(segment.text), segment.style)

    def show(self, steps: Iterable[TokenStep | Token]) -> None:
        """Print text of authors in their colours. Piped, it is written as it is: rich would change tabs and more."""
        if self.is_terminal:
            self.print(coloured(steps), end="")
            return
        self.file.write("".join(step.text for step in steps))
        self.file.flush()


def not_text(error: UnicodeDecodeError) -> ConfigError:
    """The error of standard input that cannot be decoded."""
    return ConfigError(f"standard input is not {error.encoding} text ({error}); convert it to UTF-8")


def log_to_terminal() -> None:
    """What the package logs, on stderr, a line each."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Visible("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


class _Visible(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def table(
    title: str,
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    caption: str | None = None,
    *,
    wrapped: Container[str] = TEXTS,
    bold: Callable[[Sequence[str]], object] = lambda row: False,
) -> Table:
    """A table. Numbers are on the right, and on one line unless their heading is in `wrapped`."""
    made = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in headings:
        made.add_column(heading, overflow="fold", no_wrap=heading not in wrapped)
        made.columns[-1].justify = "left" if heading in TEXTS else "right"
    for row in rows:
        made.add_row(*row, style="bold" if bold(row) else "")
    return made


def calibration_table(calibration: Calibration) -> Table:
    """Every measured threshold, the chosen ones marked."""
    from collm.core.calibration import BUDGET_NOTE, threshold_text

    rows = []
    for point in calibration.points:
        rate = f"{point.deferral_rate:.1%}", f"{100 * point.rate_low:.1f} - {point.rate_high:.1%}"
        metric = f"{point.metric:.3f}", f"{point.low:.3f} - {point.high:.3f}"
        judged = () if point.rejected is None else (f"{point.rejected:.1%}", f"{point.assistant_passes:.2f}")
        rows.append((threshold_text(point.threshold), *rate, *metric, *judged, ", ".join(calibration.uses(point))))
    name = calibration.metric_name
    judged = () if calibration.judge is None else ("rejected", "passes")
    headings = ("threshold", "deferral rate", "interval", name, "interval", *judged, "best")
    title, note = (
        f"{name} on {calibration.num_prompts} validation prompts",
        BUDGET_NOTE if calibration.budgets else None,
    )
    return table(title, headings, rows, note, bold=lambda row: row[-1])


def teacher_forced_table(curve: TeacherForcedCurve, budgets: Sequence[float]) -> Table:
    """The curve at rates 0, 0.1 .. 1, its best point, and its best points within budgets."""
    from collm.core.calibration import threshold_text

    best = {curve.best(): ["of all"]}
    for budget in budgets:
        best.setdefault(curve.best(budget), []).append(f"within {budget:.4g}")
    points, rows = {*curve.at_rates([tenth / 10 for tenth in range(11)]), *best}, []
    for point in sorted(points, key=lambda point: (point.deferral_rate, -point.threshold)):
        measured = f"{point.deferral_rate:.1%}", f"{point.accuracy:.2%}", f"{point.nll:.4f}"
        rows.append((threshold_text(point.threshold), *measured, ", ".join(best.get(point, []))))
    title = f"{curve.num_tokens:,} gold tokens, {len(curve):,} thresholds; nothing generated"
    caption = f"right = the gold token is the argmax of who writes there; choosing rightly: {curve.reachable:.2%}"
    headings = ("threshold", "deferral rate", "right", "mean NLL", "best")
    return table(title, headings, rows, caption, wrapped=headings, bold=lambda row: row[-1])


def comparison_tables(comparison: Comparison) -> list[Table]:
    """Systems beside each other: scores, what each model did for an item, and the task's other measures if it has some.

    Thresholds, of which a curve has many, are left to the report.
    """
    from collm.evaluation.results import DIFFERENCES_NOTE

    found = comparison.shortened()
    measure, scores, costs = found.measure or "answers", [], []
    for result in found.shown:
        intervals = _interval(result.measures.get(measure)), _interval(result.difference, "+")
        judged = (f"{result.rejected:.1%}",) if any(one.rejected for one in found.shown) else ()
        scores.append((result.name, *intervals, f"{result.deferral_rate:.1%}", *judged))
        beside = (result.name, _scaled(result.flops), f"{result.seconds:.3g}s", f"{result.tokens_per_s:.0f}")
        costs += [(*(("",) * 4 if row else beside), *work) for row, work in enumerate(result.work())]
    of_scores = ("system", measure, "difference", "deferral", *(("rejected",) if len(scores[0]) > 4 else ()))
    title, note = f"{found.task}, {len(found.items)} items", DIFFERENCES_NOTE if len(found.shown) > 1 else None
    tables = [table(title, of_scores, scores, note)]
    tables[0].columns[0].min_width = 13
    of_costs = ("system", "FLOP", "latency", "tok/s", "model", "read", "written", "passes")
    caption = "read, written: tokens; passes: of a batch, shared by its items"
    tables.append(table("costs of an item", of_costs, costs, caption))
    measures = list(found.shown[0].measures)
    if not set(measures) <= {measure}:
        names = ("", *(result.name for result in found.shown))
        means = [(one, *(f"{100 * result.measures[one].mean:.1f}" for result in found.shown)) for one in measures]
        tables.append(table("all measures, in %", names, means, wrapped=names))
    return tables


def results_table(rows: Sequence[SystemRow], title: str) -> Table:
    """Systems beside each other."""
    cells = []
    for row in rows:
        shares = f"{row.accuracy:.1%}", f"{100 * row.low:.1f}-{row.high:.1%}", f"{row.deferral_rate:.1%}"
        cells.append((row.name, *shares, f"{row.tokens_per_s:.0f}"))
    headings = ("system", "accuracy", "interval", "deferral", "tokens/s")
    return table(title, headings, cells, bold=lambda row: row[0].startswith("collaboration"))


def _interval(found: Interval | None, sign: str = "") -> str:
    return f"{100 * found.mean:{sign}.1f} ({100 * found.low:.1f}..{100 * found.high:.1f})" if found else ""


def _scaled(number: float) -> str:
    """Three digits and a prefix: 1.25G."""
    thousands = 0
    while number >= 999.5 and thousands < 5:
        number, thousands = number / 1000, thousands + 1
    return f"{number:.3g}{('', 'k', 'M', 'G', 'T', 'P')[thousands]}"
