"""`collm calibrate`: measure thresholds on a validation set and keep the best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from collm.cli import options
from collm.cli.usage import refuse

if TYPE_CHECKING:
    from collm.collaboration import CoLLM
    from collm.run import DataConfig, PastRun, Validation


def calibrate(
    context: typer.Context,
    collaboration: Annotated[str, typer.Argument(metavar="DIR", help="The collaboration: a directory.")],
    data: Annotated[
        str | None,
        typer.Option(help="Validation rows: JSON, JSONL, data set directory or Hub name. Default: those of DIR's run."),
    ] = None,
    split: options.SplitOption = None,
    prompt_field: options.PromptFieldOption = "prompt",
    completion_field: options.CompletionFieldOption = "completion",
    format_: options.FormatOption = "rows",
    bad_rows: options.BadRowsOption = "stop",
    metric: Annotated[
        str, typer.Option(help="exact_match, contains, last_number, token_f1 or module:function.")
    ] = "exact_match",
    rate: Annotated[
        list[float] | None,
        typer.Option(help="Deferral rate to aim at. Can be given several times. Default: 0, 0.1, .. 1."),
    ] = None,
    budget: Annotated[
        list[float] | None,
        typer.Option(help="Also find the best threshold within this deferral rate. Can be given several times."),
    ] = None,
    refine: Annotated[
        int | None,
        typer.Option(help="Number of thresholds to add near the best one, and near that of each budget.  [default: 3]"),
    ] = None,
    check: Annotated[
        float | None, typer.Option(help="Hold back this share of the rows and check the chosen thresholds on it.")
    ] = None,
    check_data: Annotated[
        str | None, typer.Option(help="Check the chosen thresholds on these rows, which have the format of --data.")
    ] = None,
    teacher_forced: Annotated[
        bool, typer.Option("--teacher-forced", help="Only show all thresholds on the gold completions. Choose none.")
    ] = False,
    limit: Annotated[int | None, typer.Option(help="Use only the first rows, up to this number.")] = None,
    max_batch: options.MaxBatchOption = 16,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum number of tokens of a completion.")] = 256,
    stop: options.StopOption = None,
    device: options.DeviceOption = None,
    engine: options.EngineOption = None,
    servers: options.ServersOption = None,
    trust_code: options.TrustCodeOption = False,
) -> None:
    """Decode a validation set at several thresholds and store the best one.

    Without --data, the rows and the options are those of the training run that made DIR.
    """
    from collm import run
    from collm.collaboration import CoLLM
    from collm.core.params import SamplingParams
    from collm.evaluation.calibration import DEFERRAL_RATES

    if check is not None and check_data is not None:
        raise typer.BadParameter("--check and --check-data are both given; use one of them")
    _check_usage(context, generates=not teacher_forced, has_data=data is not None)
    model = CoLLM.from_pretrained(
        collaboration, engine=engine, servers=options.servers_named(servers), device=device, trust_code=trust_code
    )
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
    validation = replace(
        validation,
        budgets=budget or validation.budgets,
        refine=validation.refine if refine is None else refine,
    )
    if teacher_forced:
        _show_curve(model, past or validation, validation.budgets)
    else:
        validation, held_back = _held_back(validation, source, check, check_data)
        _choose(model, collaboration, validation, held_back)


def _check_usage(context: typer.Context, *, generates: bool, has_data: bool) -> None:
    """Refuse options that would have no effect."""
    if not generates:
        generating = {"metric", "rate", "refine", "check", "check_data", "max_batch", "max_new_tokens", "stop"}
        refuse(context, "--teacher-forced generates nothing", none=generating)
        refuse(context, "--teacher-forced reads the gold completions with the models in this process", none={"servers"})
    if not has_data:
        loading = {"collaboration", "device", "engine", "servers", "trust_code"}
        choosing = {"budget", "refine", "check", "check_data", "teacher_forced"}
        refuse(context, "without --data the run of DIR says the rest", only=loading | choosing)


def _show_curve(model: CoLLM, rows: PastRun | Validation, budgets: Sequence[float]) -> None:
    from collm.cli.tables import teacher_forced_table
    from collm.cli.terminal import Console

    Console().print(teacher_forced_table(rows.curve(model), budgets))


def _held_back(
    validation: Validation, source: DataConfig, check: float | None, check_data: str | None
) -> tuple[Validation, Validation | None]:
    """Rows to choose thresholds on, and others, if wanted, to check them on."""
    if check is not None:
        return validation.split(check)
    if check_data is not None:
        return validation, replace(validation, rows=source.rows(check_data, None), source=check_data)
    return validation, None


def _choose(model: CoLLM, collaboration: str, validation: Validation, held_back: Validation | None) -> None:
    """Calibrate, check, and keep in the collaboration's directory what either found, at once."""
    from collm.cli.tables import calibration_table
    from collm.cli.terminal import Console

    calibration = validation.calibrate(model)
    model.save_calibration(collaboration)
    if held_back is not None:
        calibration = held_back.check(model)
        model.save_calibration(collaboration)
    out = Console()
    out.print(calibration_table(calibration))
    for one in calibration.checks:
        out.print(one.summary(calibration.metric_name), soft_wrap=True)
