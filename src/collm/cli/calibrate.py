"""`collm calibrate`: measure thresholds on a validation set and keep the best."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from collm.cli.servers import EngineOption, ServersOption, servers_named
from collm.cli.usage import allow_none, allow_only


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
    budget: Annotated[
        list[float] | None,
        typer.Option(help="Deferral rate to find the best threshold within, besides the best of all; may be repeated."),
    ] = None,
    refine: Annotated[
        int | None,
        typer.Option(help="Thresholds to add beside the best, and beside that of each budget.  [default: 3]"),
    ] = None,
    check: Annotated[
        float | None, typer.Option(help="Hold this share of the rows back and check the chosen thresholds on it.")
    ] = None,
    check_data: Annotated[
        str | None, typer.Option(help="Check the chosen thresholds on these rows, given as --data.")
    ] = None,
    teacher_forced: Annotated[
        bool, typer.Option("--teacher-forced", help="Only show all thresholds on the gold completions; chooses none.")
    ] = False,
    max_batch: Annotated[int, typer.Option(help="Most prompts decoded at once.")] = 16,
    limit: Annotated[int | None, typer.Option(help="Use the first so many rows.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of a completion.")] = 256,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends a completion; may be repeated.")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, auto; or one for each model: cuda:0,cuda:1.")
    ] = None,
    engine: EngineOption = None,
    servers: ServersOption = None,
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="Run functions that files name: of tools and metrics.")
    ] = False,
) -> None:
    """Generate the validation set at thresholds for deferral rates 0, 0.1 .. 1 and near the best, which is kept.

    Without --data, on the rows and with the options of the run that made DIR.
    """
    from dataclasses import replace

    from collm import run
    from collm.cli.tables import calibration_table, teacher_forced_table
    from collm.cli.terminal import Console
    from collm.collaboration import CoLLM
    from collm.core.params import SamplingParams
    from collm.evaluation.calibration import DEFERRAL_RATES

    if check is not None and check_data is not None:
        raise typer.BadParameter("--check and --check-data both came; check on a share of the rows, or on others")
    if teacher_forced:
        generating = {"metric", "rate", "refine", "check", "check_data", "max_batch", "max_new_tokens", "stop"}
        allow_none(context, *generating, why="--teacher-forced generates nothing")
    chosen = {"budget", "refine", "check", "check_data", "teacher_forced"}
    if data is None:
        allow_only(
            context,
            "collaboration",
            "device",
            "engine",
            "servers",
            "trust_code",
            *chosen,
            why="without --data the run of DIR says the rest",
        )
    model = CoLLM.from_pretrained(
        collaboration, engine=engine, servers=servers_named(servers), device=device, trust_code=trust_code
    )
    out = Console()
    past = None
    if data is None:
        past = run.PastRun.read(Path(collaboration).resolve().parent, trust_code=trust_code)
        source: run.DataConfig = past.config
        validation = past.validation()
    else:
        source = run.DataConfig(data, split, prompt_field, completion_field, format=format_, bad_rows=bad_rows)
        params = SamplingParams(max_new_tokens=max_new_tokens, stop=stop or ())
        rows = source.rows(data, split)[:limit]
        validation = run.Validation(rows, data, metric, params, rate or DEFERRAL_RATES, max_batch=max_batch)
    if teacher_forced:
        curve = past.curve(model) if past else validation.curve(model)
        out.print(teacher_forced_table(curve, budget or validation.budgets))
        return
    validation = replace(
        validation,
        budgets=budget or validation.budgets,
        refine=validation.refine if refine is None else refine,
    )
    held_back = None
    if check is not None:
        validation, held_back = validation.split(check)
    elif check_data is not None:
        held_back = replace(validation, rows=source.rows(check_data, None), source=check_data)
    calibration = validation.calibrate(model)
    model.save_calibration(collaboration)
    if held_back is not None:
        calibration = held_back.check(model)
        model.save_calibration(collaboration)
    out.print(calibration_table(calibration))
    for one in calibration.checks:
        out.print(one.words(calibration.metric_name), soft_wrap=True)
