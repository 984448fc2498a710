"""Tables for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

    from collm.core.calibration import Calibration
    from collm.evaluation.compare import Comparison
    from collm.evaluation.intervals import Interval
    from collm.evaluation.report import Row
    from collm.evaluation.results import SystemResult
    from collm.evaluation.teacher_forced import TeacherForcedCurve
    from collm.training.inspection import Inspection


def _table(
    title: str,
    headings: Sequence[str],
    *,
    left: Container[str] = ("system",),
    wrapped: Container[str] = (),
    caption: str | None = None,
    narrow: bool = False,
) -> Table:
    """A table without rows. Cells are on the right, and on one line, unless their heading is in `left` or `wrapped`."""
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0) if narrow else (0, 1))
    for heading in headings:
        justify: Literal["left", "right"] = "left" if heading in left else "right"
        table.add_column(heading, justify=justify, overflow="fold", no_wrap=heading not in wrapped)
    return table


def calibration_table(calibration: Calibration) -> Table:
    """Every measured threshold, the chosen one marked."""
    from collm.core.calibration import threshold_text

    title = f"{calibration.metric_name} on {calibration.num_prompts} validation prompts"
    headings = ("threshold", "deferral rate", "interval", calibration.metric_name, "interval", "best")
    table = _table(title, headings, left={"best"}, wrapped={"best"}, narrow=True)
    for point in calibration.points:
        uses = calibration.uses(point)
        table.add_row(
            threshold_text(point.threshold),
            f"{point.deferral_rate:.1%}",
            f"{100 * point.rate_low:.1f} - {point.rate_high:.1%}",
            f"{point.metric:.3f}",
            f"{point.low:.3f} - {point.high:.3f}",
            ", ".join(uses),
            style="bold" if uses else "",
        )
    return table


def teacher_forced_table(curve: TeacherForcedCurve, budgets: Sequence[float]) -> Table:
    """The curve at rates 0, 0.1 .. 1, its best point, and its best points within budgets."""
    from collm.core.calibration import threshold_text

    title = f"{curve.num_tokens:,} gold tokens, {len(curve):,} thresholds; nothing generated"
    caption = f"right = the gold token is the argmax of who writes there; choosing rightly: {curve.reachable:.2%}"
    headings = ("threshold", "deferral rate", "right", "mean NLL", "best")
    table = _table(title, headings, left={"best"}, wrapped=headings, caption=caption)
    best = {curve.best(): "of all"}
    for budget in budgets:
        point = curve.best(budget)
        best[point] = ", ".join(filter(None, [best.get(point), f"within {budget:.4g}"]))
    points = {*curve.at_rates([tenth / 10 for tenth in range(11)]), *best}
    for point in sorted(points, key=lambda point: (point.deferral_rate, -point.threshold)):
        threshold, rate = threshold_text(point.threshold), f"{point.deferral_rate:.1%}"
        cells = (threshold, rate, f"{point.accuracy:.2%}", f"{point.nll:.4f}")
        table.add_row(*cells, best.get(point, ""), style="bold" if point in best else "")
    return table


def inspection_table(inspection: Inspection) -> Table:
    """Base and assistants beside each other: how well each predicts, and who is right where the other is not."""
    from collm.core.types import author_name

    number = f"{inspection.summaries[0].num_targets:,} target tokens"
    headings = ("", "mean NLL", "right", "both", "base only", "assistant only", "neither")
    table = _table(number, headings, left={""}, narrow=True, caption="right = the gold token is the argmax")
    for number_of_author, summary in enumerate(inspection.summaries):
        cells = [f"{summary.mean_nll_nats:.4f}", f"{summary.accuracy:.2%}"]
        if number_of_author:
            cells += [f"{share:.2%}" for share in inspection.agreements[number_of_author - 1]]
        table.add_row(author_name(number_of_author), *cells)
    table.add_row("best author", f"{inspection.best_nll_nats:.4f}", f"{inspection.best_accuracy:.2%}")
    return table


def comparison_tables(comparison: Comparison) -> list[Table]:
    """Systems beside each other: scores, what each model did for an item, and the task's other measures if it has some.

    Thresholds, of which a curve has many, are left to the report.
    """
    from collm.evaluation.systems import is_threshold, short_names

    shown = [result for result in comparison.results if not is_threshold(result.name)]
    names = short_names([result.name for result in shown])
    named = [(names[result.name], result) for result in shown]
    tables = [_scores_table(comparison, named), _costs_table(named)]
    return tables if set(shown[0].measures) <= {comparison.measure} else [*tables, _measures_table(named)]


def _scores_table(comparison: Comparison, named: Sequence[tuple[str, SystemResult]]) -> Table:
    """The main measure and the difference to the collaboration."""
    measure = comparison.measure or "answers"
    headings = ("system", measure, "difference", "deferral")
    table = _table(f"{comparison.task}, {len(comparison.items)} items", headings, wrapped={"system"}, narrow=True)
    table.columns[0].min_width = 13
    for name, result in named:
        score = result.measures.get(measure)
        table.add_row(
            name,
            "" if score is None else f"{100 * score.mean:.1f} ({_ends(score)})",
            "" if result.difference is None else f"{100 * result.difference.mean:+.1f} ({_ends(result.difference)})",
            f"{result.deferral_rate:.1%}",
        )
    return table


def _costs_table(named: Sequence[tuple[str, SystemResult]]) -> Table:
    """How long an item took, and what each model did for it."""
    title, caption = "costs of an item", "read, written: tokens; passes: of a batch, shared by its items"
    headings = ("system", "FLOP", "latency", "tok/s", "model", "read", "written", "passes")
    table = _table(title, headings, left={"system", "model"}, wrapped={"system"}, caption=caption, narrow=True)
    for name, result in named:
        beside = (name, _scaled(result.flops), f"{result.seconds:.3g}s", f"{result.tokens_per_s:.0f}")
        for model, used in result.models.items():
            did = (f"{used[key]:,.1f}" for key in ("tokens_read", "tokens_written", "forward_passes"))
            table.add_row(*beside, model, *did)
            beside = ("", "", "", "")
    return table


def _measures_table(named: Sequence[tuple[str, SystemResult]]) -> Table:
    """All measures, without their intervals."""
    headings = ("", *(name for name, _ in named))
    table = _table("all measures, in %", headings, left={""}, wrapped=headings, narrow=True)
    for measure in named[0][1].measures:
        table.add_row(measure, *(f"{100 * result.measures[measure].mean:.1f}" for _, result in named))
    return table


def _scaled(number: float) -> str:
    """Three digits and a prefix: 1.25G."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if number < 999.5 or prefix == "P":
            return f"{number:.3g}{prefix}"
        number /= 1000
    raise AssertionError("the last prefix takes any number")


def _ends(interval: Interval) -> str:
    return f"{100 * interval.low:.1f}..{100 * interval.high:.1f}"


def results_table(rows: Sequence[Row], title: str) -> Table:
    """Systems beside each other."""
    table = _table(title, ("system", "accuracy", "interval", "deferral", "tokens/s"))
    for row in rows:
        shares = (f"{row.accuracy:.1%}", f"{100 * row.low:.1f}-{row.high:.1%}", f"{row.deferral_rate:.1%}")
        style = "bold" if row.name.startswith("collaboration") else ""
        table.add_row(row.name, *shares, f"{row.tokens_per_s:.0f}", style=style)
    return table
