"""`collm demo`: the whole path on a small world of real facts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option(help="Directory for models, report.html and results.json.")],
    real: Annotated[
        bool, typer.Option("--real", help="SmolLM2 from the package index learns to ask a calculator; then a chat.")
    ] = False,
    assistants: Annotated[int, typer.Option(min=1, max=2, help="1: geography; 2: geography and chemistry.")] = 1,
    seeds: Annotated[int, typer.Option(min=1, help="Repeat with this many seeds, pooled in the table.")] = 1,
    seed: Annotated[int, typer.Option(help="The first seed.")] = 0,
) -> None:
    """Train a pair of tiny models on real facts and compare the collaboration with every baseline.

    With --real the base is SmolLM2-135M-Instruct: it learns when to let a calculator write, is measured, and talks.
    """
    import transformers

    from collm.cli.terminal import log_to_terminal
    from collm.errors import ConfigError

    log_to_terminal()
    transformers.utils.logging.disable_progress_bar()  # tiny models load in an instant
    if not real:
        _tiny(out, assistants, seeds, seed)
    elif assistants != 1 or seeds != 1:
        raise ConfigError("--assistants and --seeds have no effect with --real; leave them out")
    else:
        _real(out, seed)


def _tiny(out: Path, assistants: int, seeds: int, seed: int) -> None:
    from collm.cli.authors import coloured, legend
    from collm.cli.tables import results_table
    from collm.cli.terminal import Console
    from collm.demo.run import run_demo

    report = run_demo(out, num_assistants=assistants, seeds=range(seed, seed + seeds))
    console = Console()
    console.print(results_table(report.rows))
    for example in report.examples[:6]:
        console.print(f"\n[dim]{example.prompt}[/dim]")
        console.print(coloured(example.tokens))
    console.print("", legend(report.authors), "", report.summary, "", f"{out / 'report.html'}", sep="\n", markup=False)


def _real(out: Path, seed: int) -> None:
    """The real model's demo, and at a terminal a chat with it."""
    import sys

    from collm.cli.authors import coloured, legend
    from collm.cli.chat import author_names, chat
    from collm.cli.tables import real_demo_table
    from collm.cli.terminal import Console
    from collm.demo.real import run_real_demo
    from collm.evaluation.report import Token

    console = Console()
    made = run_real_demo(out, seed=seed, say=lambda stage: console.print(f"[dim]{stage} ..[/dim]"))
    console.print(real_demo_table(made.rows))
    for question, answer in made.examples:
        console.print(f"\n[dim]{question}[/dim]")
        tokens = zip(answer.token_texts, answer.authors, answer.defer_probs, strict=True)
        console.print(coloured(Token(*token) for token in tokens))
    collaboration = out / "run" / "collaboration"
    console.print("", legend(author_names(made.model)), "")
    console.print(f"collm chat {collaboration}", markup=False, soft_wrap=True)
    if sys.stdin.isatty() and sys.stdout.isatty():
        chat(str(collaboration), max_new_tokens=256)
