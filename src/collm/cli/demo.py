"""`collm demo`: train and evaluate tiny models on real facts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collm.evaluation.report import Report

SHOWN = 8
"""Answers in the terminal."""


def demo(
    out: Annotated[Path, typer.Option(help="Output directory for models, report.html and results.json.")],
    real: Annotated[bool, typer.Option("--real", help="Train SmolLM2 to use a calculator, then chat with it.")] = False,
    assistants: Annotated[int, typer.Option(min=1, max=2, help="1: geography. 2: geography and chemistry.")] = 1,
    tokenizers: Annotated[
        str, typer.Option(help="same: all models share a tokenizer. different: each model has its own.")
    ] = "same",
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds. The table pools their results.")] = 1,
    seed: Annotated[int, typer.Option(help="First seed.")] = 0,
) -> None:
    """Train tiny models on real facts and compare the collaboration with every baseline.

    With --real, SmolLM2-135M-Instruct learns when to use a calculator, is evaluated, and can be chatted with.
    """
    import sys

    import transformers

    from collm.cli.chat import chat
    from collm.cli.terminal import log_to_terminal
    from collm.demo.real import run_real_demo
    from collm.demo.run import run_demo
    from collm.errors import ConfigError

    log_to_terminal()
    transformers.utils.logging.disable_progress_bar()  # tiny models load in an instant
    if not real:
        report = run_demo(out, num_assistants=assistants, tokenizers=tokenizers, seeds=range(seed, seed + seeds))
        _show(report, "whole answers right with 95% interval, entities never seen in training", out)
        return
    if assistants != 1 or seeds != 1 or tokenizers != "same":
        raise ConfigError("--assistants, --tokenizers and --seeds have no effect with --real; leave them out")
    report = run_real_demo(out, seed=seed, say=lambda stage: typer.echo(f"{stage} .."))
    _show(report, "right results with 95% interval, numbers never seen in training", out)
    collaboration = str(out / "run" / "collaboration")
    typer.echo(f"collm chat {collaboration}")
    if sys.stdin.isatty() and sys.stdout.isatty():
        chat(collaboration, max_new_tokens=256)


def _show(report: Report, title: str, out: Path) -> None:
    from collm.cli.tables import results_table
    from collm.cli.terminal import Console, coloured, legend

    console = Console()
    console.print(results_table(report.rows, title))
    for example in report.examples[:SHOWN]:
        console.print(f"\n[dim]{example.prompt}[/dim]")
        console.print(coloured(example.tokens))
    console.print("", legend(report.authors), "", report.summary, "", f"{out / 'report.html'}", sep="\n", markup=False)
