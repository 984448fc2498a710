"""`collm forecast`: whether a collaboration will pay, before any training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from collm.cli.options import Fields, refuse, with_options
from collm.run.options import RowFormat


@dataclass(frozen=True)
class Forecasting:
    """What is forecast, and from what.

    Attributes:
        base: the model that would be trained, in the form of 'collm train'.
        assistants: an assistant, a model or tool:..; once for each.
        data: rows like those to train on.
        rows: maximum number of rows, drawn at random.
        scores: keep the scores in this directory. Without --base, forecast from the scores of a run that are there.
        max_length: maximum number of tokens of an example, as in training.
        gain_clip: largest gain of a token in nats, as in training.
        dtype: data type of the models: auto, float32, bfloat16 or float16.
        device: device of the models: cpu, cuda, cuda:1 or auto.
        html: write a page with the curve to this file.
        json: print JSON.
    """

    base: str | None = None
    assistants: Sequence[str] | None = field(default=None, metadata={"flag": "--assistant"})
    data: str | None = None
    rows: int = field(default=200, metadata={"min": 5})
    scores: Path | None = None
    max_length: int = 2048
    gain_clip: float = 8.0
    dtype: str = "auto"
    device: str | None = None
    html: Path | None = None
    json: bool = False


@with_options
def forecast(
    context: typer.Context,
    how: Forecasting,
    layout: Annotated[
        RowFormat, Fields("data_split prompt_field completion_field format bad_rows template chat_template")
    ],
) -> None:
    """Say whether a collaboration will pay, before any training: what each author is better at, and at what speed."""
    import json
    from dataclasses import asdict

    from collm.cli.terminal import Console, log_to_terminal, table
    from collm.evaluation.forecast import forecast as from_scores
    from collm.evaluation.forecast_report import forecast_report
    from collm.evaluation.report import write_report
    from collm.run.forecast import forecast_run
    from collm.run.options import RunConfig
    from collm.training.inspection import stored_scores

    log_to_terminal()
    if how.base is None and how.scores is not None:
        refuse(context, "without --base nothing is scored", only={"scores", "gain_clip", "html", "json"})
        base, *assistants = stored_scores(how.scores)
        found = from_scores(base, assistants, clip=how.gain_clip)
    elif how.base is None or how.data is None or not how.assistants:
        raise typer.BadParameter("expected --base, --assistant and --data; or --scores SCORES of a run")
    else:
        models = {"base": how.base, "assistant": [*how.assistants], "dtype": how.dtype, "device": how.device}
        scores = how.scores and str(how.scores)
        options = {**vars(layout), **models, "calibrate": False, "cache_hidden_states": True, "scores": scores}
        config = RunConfig(data=how.data, **options)
        found = forecast_run(config, rows=how.rows, max_length=how.max_length, clip=how.gain_clip)
    report = forecast_report(found)
    if how.html is not None:
        write_report(how.html, report)
    if how.json:
        typer.echo(json.dumps({**asdict(found), "verdict": found.verdict}, indent=2))
        return
    console = Console()
    console.print(*(table(one.heading, one.columns, one.rows, one.note) for one in report.tables), sep="\n")
    for paragraph in reversed(report.summary.split("\n\n")):
        console.print(paragraph, markup=False)
