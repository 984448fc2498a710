"""`collm report`: the HTML report of an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PRICE_HELP = (
    "Price of a million tokens that a model (base, assistant, assistant-2) reads, and writes. The cost axis then shows "
    "prices instead of FLOPs. Needed for each model."
)


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The --out directory of 'collm eval'.")],
    out: Annotated[Path | None, typer.Option(help="Output file. Default: RUN/report.html.")] = None,
    price: Annotated[list[str] | None, typer.Option(metavar="NAME=READ[:WRITTEN]", help=PRICE_HELP)] = None,
) -> None:
    """Write an HTML report: results of all systems, charts, the author of each token, and statistics of deferral."""
    from collm.cli.terminal import log_to_terminal
    from collm.evaluation.report import write_report
    from collm.evaluation.run_report import parse_prices, report_of

    log_to_terminal()
    path = out or run / "report.html"
    write_report(path, report_of(run, parse_prices(price) if price else None))
    typer.echo(str(path))
