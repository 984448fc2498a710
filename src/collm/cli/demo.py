"""`collm demo`: a real model learns when to use a calculator."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collm.evaluation.report import Report

SHOWN = 8
"""Answers in the terminal."""


def demo(
    out: Annotated[Path, typer.Option(help="Output directory for the model, report.html and results.json.")],
    seed: Annotated[int, typer.Option(help="Seed of the data and of training.")] = 0,
) -> None:
    """Train SmolLM2-135M-Instruct to use a calculator, evaluate it, and chat with it."""
    import sys

    import transformers

    from collm.cli.chat import chat
    from collm.cli.terminal import log_to_terminal
    from collm.demo.real import run_demo

    log_to_terminal()
    transformers.utils.logging.disable_progress_bar()
    report, directory = run_demo(out, seed=seed, say=lambda stage: typer.echo(f"{stage} .."))
    show(report, "right results with 95% interval, numbers never seen in training", out)
    typer.echo(f"collm chat {directory}")
    if sys.stdin.isatty() and sys.stdout.isatty():
        chat(collaboration=str(directory), max_tokens=256)


def show(report: Report, title: str, out: Path) -> None:
    """Print the table of a report in `out`, and the first answers in their authors' colours."""
    from collm.cli.terminal import Console, coloured, legend, results_table

    console = Console()
    console.print(results_table(report.rows, title))
    for example in report.examples[:SHOWN]:
        console.print(f"\n[dim]{example.prompt}[/dim]")
        console.print(coloured(example.tokens))
    console.print("", legend(report.authors), "", report.summary, "", f"{out / 'report.html'}", sep="\n", markup=False)
