"""`collm report`: the page of an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The --out of 'collm eval'.")],
    out: Annotated[Path | None, typer.Option(help="The page. Default: RUN/report.html.")] = None,
) -> None:
    """Write one HTML file that works offline: systems, curve, who wrote which token, what is deferred."""
    from collm.evaluation.page import write_report
    from collm.evaluation.run_report import report_of

    path = out or run / "report.html"
    write_report(path, report_of(run))
    typer.echo(str(path))
