"""`collm report`: the page of an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The --out of 'collm eval'.")],
    out: Annotated[Path | None, typer.Option(help="The page. Default: RUN/report.html.")] = None,
    price: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=READ[:WRITTEN]",
            help="Cost axis in prices, not FLOPs: of a million tokens that a model (base, assistant, assistant-2) "
            "reads, and writes. One for each model.",
        ),
    ] = None,
) -> None:
    """Write one HTML file that works offline: systems, curve, who wrote which token, what is deferred."""
    from collm.cli.terminal import log_to_terminal
    from collm.evaluation.page import write_report
    from collm.evaluation.run_charts import Prices
    from collm.evaluation.run_report import report_of

    log_to_terminal()
    path = out or run / "report.html"
    write_report(path, report_of(run, Prices.parse(price) if price else None))
    typer.echo(str(path))
