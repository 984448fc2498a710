"""Tables for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from collm.core.calibration import Calibration
    from collm.evaluation.report import Row


def calibration_table(calibration: Calibration) -> Table:
    """Every measured threshold, the chosen one marked."""
    table = Table(title=f"{calibration.metric_name} on {calibration.num_prompts} validation prompts")
    for heading in ("threshold", "deferral rate", calibration.metric_name, "interval", ""):
        table.add_column(heading, justify="right")
    best = calibration.best()
    for point in calibration.points:
        table.add_row(
            f"{point.threshold:.4g}",
            f"{point.deferral_rate:.1%}",
            f"{point.metric:.3f}",
            f"{point.low:.3f} - {point.high:.3f}",
            "default" if point is best else "",
            style="bold" if point is best else "",
        )
    return table


def results_table(rows: Sequence[Row]) -> Table:
    """Systems beside each other."""
    table = Table(
        title="whole answers right with 95% interval, entities never seen in training",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
    )
    for heading in ("system", "accuracy", "interval", "deferral", "tokens/s"):
        table.add_column(heading, justify="left" if heading == "system" else "right", no_wrap=True)
    for row in rows:
        style = "bold" if row.name.startswith("collaboration") else ""
        interval = f"{100 * row.low:.1f}-{row.high:.1%}"
        table.add_row(
            row.name,
            f"{row.accuracy:.1%}",
            interval,
            f"{row.deferral_rate:.1%}",
            f"{row.tokens_per_s:.0f}",
            style=style,
        )
    return table
