"""`collm demo`: the whole path on a small world of real facts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option(help="Directory for models, report.html and results.json.")],
    assistants: Annotated[int, typer.Option(min=1, max=2, help="1: geography; 2: geography and chemistry.")] = 1,
    seeds: Annotated[int, typer.Option(min=1, help="Repeat with this many seeds, pooled in the table.")] = 1,
    seed: Annotated[int, typer.Option(help="The first seed.")] = 0,
) -> None:
    """Train a pair of tiny models on real facts and compare the collaboration with every baseline."""
    import transformers

    from collm.cli.authors import coloured, legend
    from collm.cli.tables import results_table
    from collm.cli.terminal import Console, log_to_terminal
    from collm.demo.run import run_demo

    log_to_terminal()
    transformers.utils.logging.disable_progress_bar()  # tiny models load in an instant
    report = run_demo(out, num_assistants=assistants, seeds=range(seed, seed + seeds))
    console = Console()
    console.print(results_table(report.rows))
    for example in report.examples[:6]:
        console.print(f"\n[dim]{example.prompt}[/dim]")
        console.print(coloured(example.tokens))
    console.print("", legend(report.authors), "", report.summary, "", f"{out / 'report.html'}", sep="\n", markup=False)
