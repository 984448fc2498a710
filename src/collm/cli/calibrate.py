"""`collm calibrate`: measure thresholds on a validation set and keep the best."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from collm.cli.usage import allow_only


def calibrate(
    context: typer.Context,
    collaboration: Annotated[str, typer.Argument(metavar="DIR", help="The collaboration, a directory.")],
    data: Annotated[
        str | None,
        typer.Option(help="Validation rows: JSON, JSONL, data set directory or Hub name. Default: as DIR's run says."),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split of a data set.")] = None,
    prompt_field: Annotated[str, typer.Option(help="Name of the prompt's field.")] = "prompt",
    completion_field: Annotated[str, typer.Option(help="Name of the completion's field.")] = "completion",
    format_: Annotated[
        str, typer.Option("--format", help="rows, tulu, gsm8k, gsm8k-plain, math or bioasq, as published.")
    ] = "rows",
    bad_rows: Annotated[str, typer.Option(help="stop at a row that cannot be used, or skip and count it.")] = "stop",
    metric: Annotated[
        str, typer.Option(help="exact_match, contains, last_number, token_f1 or module:function.")
    ] = "exact_match",
    rate: Annotated[
        list[float] | None, typer.Option(help="Deferral rate to aim at; may be repeated. Default: 0, 0.1 .. 1.")
    ] = None,
    max_batch: Annotated[int, typer.Option(help="Most prompts decoded at once.")] = 16,
    limit: Annotated[int | None, typer.Option(help="Use the first so many rows.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of a completion.")] = 256,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends a completion; may be repeated.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, auto.")] = None,
    trust_tools: Annotated[
        bool, typer.Option("--trust-tools", help="Run assistants that are functions collm does not bring.")
    ] = False,
) -> None:
    """Generate the validation set at thresholds for deferral rates 0, 0.1 .. 1 and keep the best.

    Without --data, on the rows and with the options of the run that made DIR.
    """
    from rich.console import Console

    from collm import run
    from collm.cli.tables import calibration_table
    from collm.collaboration import CoLLM
    from collm.core.types import SamplingParams
    from collm.evaluation.calibration import DEFERRAL_RATES

    if data is None:
        allow_only(context, "collaboration", "device", "trust_tools", why="without --data the run of DIR says the rest")
    model = CoLLM.from_pretrained(collaboration, device=device, trust_tools=trust_tools)
    if data is None:
        measured = run.calibrate_run(model, Path(collaboration).resolve().parent)
        model.save_calibration(collaboration)
        Console(highlight=False).print(calibration_table(measured))
        return
    source = run.DataConfig(data, split, prompt_field, completion_field, format=format_, bad_rows=bad_rows)
    rows = source.rows(data, split)[:limit]
    params = SamplingParams(max_new_tokens=max_new_tokens, stop=stop or ())
    calibration = run.calibrate_rows(
        model, rows, data, metric=metric, params=params, rates=rate or DEFERRAL_RATES, max_batch=max_batch
    )
    model.save_calibration(collaboration)
    Console(highlight=False).print(calibration_table(calibration))
