"""`collm calibrate`: measure thresholds on a validation set and keep the best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from collm.cli.servers import EngineOption, ServersOption, servers_named
from collm.cli.usage import allow_none, allow_only

if TYPE_CHECKING:
    from collm.collaboration import CoLLM
    from collm.run import DataConfig, PastRun, Validation


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
    from collm import run
    from collm.collaboration import CoLLM
    from collm.core.params import SamplingParams
    from collm.evaluation.calibration import DEFERRAL_RATES

    if check is not None and check_data is not None:
        raise typer.BadParameter("--check and --check-data both came; check on a share of the rows, or on others")
    _check_usage(context, generates=not teacher_forced, has_data=data is not None)
    model = CoLLM.from_pretrained(
        collaboration, engine=engine, servers=servers_named(servers), device=device, trust_code=trust_code
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
    """Wrong usage where an option would have no effect."""
    if not generates:
        generating = {"metric", "rate", "refine", "check", "check_data", "max_batch", "max_new_tokens", "stop"}
        allow_none(context, *generating, why="--teacher-forced generates nothing")
    if not has_data:
        loading = {"collaboration", "device", "engine", "servers", "trust_code"}
        choosing = {"budget", "refine", "check", "check_data", "teacher_forced"}
        allow_only(context, *loading, *choosing, why="without --data the run of DIR says the rest")


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
