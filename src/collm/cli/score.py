"""`collm score`: what a frozen model says about every target token of a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def score(
    data: Annotated[str, typer.Argument(metavar="DATA", help="JSON, JSONL, data set directory or Hub name.")],
    model: Annotated[str, typer.Option(help="The model to score with: path or Hub id, with @revision.")],
    out: Annotated[Path, typer.Option(help="Directory for the scores; an interrupted run resumes there.")],
    tokenizer: Annotated[
        str | None, typer.Option(help="The base whose tokenizer and template training will use. Default: the model.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split of a data set.")] = None,
    prompt_field: Annotated[str, typer.Option(help="Name of the prompt's field.")] = "prompt",
    completion_field: Annotated[str, typer.Option(help="Name of the completion's field.")] = "completion",
    template: Annotated[str, typer.Option(help="Prompt template, as in training.")] = "{prompt}",
    max_length: Annotated[int, typer.Option(help="Most tokens of an example, as in training.")] = 2048,
    max_batch_tokens: Annotated[int, typer.Option(help="Most tokens in a batch, padding included.")] = 16384,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, auto.")] = None,
) -> None:
    """Score a data set with one model: gold log-probability and whether its argmax is gold, per target token.

    `collm train` does this by itself for what is missing in its scores directory.
    """
    from collm import run

    config = run.DataConfig(data, split, prompt_field, completion_field, template)
    spec = run.parse_model(model, dtype=dtype, device=device)
    base = spec if tokenizer is None else run.parse_model(tokenizer)
    scores = run.score_data(config, spec, base, out, max_length=max_length, max_batch_tokens=max_batch_tokens)
    summary = scores.summary()
    typer.echo(
        f"{summary.num_targets} target tokens: mean NLL {summary.mean_nll_nats:.4f} nats, "
        f"argmax is gold for {summary.accuracy:.2%}; written to {out}"
    )
