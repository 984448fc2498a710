"""`collm calibrate`: measure thresholds on a validation set and keep the best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from collm.cli.options import Fields, Loading, RowFormat, refuse, with_options
from collm.core.params import SamplingParams

if TYPE_CHECKING:
    from collm.collaboration import CoLLM
    from collm.run import DataConfig, Validation


@dataclass(frozen=True)
class Choosing:
    """How thresholds are chosen and checked.

    Attributes:
        data: validation rows: JSON, JSONL, data set directory or Hub name, by default those of DIR's run.
        limit: use only the first rows, up to this number.
        metric: metric of the completions: exact_match, contains, last_number, token_f1 or module:function.
        max_batch: maximum number of prompts decoded at once.
        rate: deferral rate to aim at, by default 0, 0.1, .. 1.
        budget: also find the best threshold within this deferral rate.
        refine: number of thresholds to add near the best one, and near that of each budget, by default 3.
        check: hold back this share of the rows and check the chosen thresholds on it.
        check_data: check the chosen thresholds on these rows, which have the format of --data.
        teacher_forced: only show all thresholds on the gold completions. Choose none.
    """

    data: str | None = None
    limit: int | None = None
    metric: str = "exact_match"
    max_batch: int = 16
    rate: Sequence[float] = ()
    budget: Sequence[float] = ()
    refine: int | None = None
    check: float | None = None
    check_data: str | None = None
    teacher_forced: bool = False


@with_options
def calibrate(
    context: typer.Context,
    collaboration: Annotated[str, typer.Argument(metavar="DIR", help="The collaboration: a directory.")],
    choosing: Choosing,
    rows: Annotated[RowFormat, Fields("split prompt_field completion_field format bad_rows")],
    params: Annotated[SamplingParams, Fields("max_new_tokens stop")],
    loading: Annotated[Loading, Fields("device trust_code", "engine servers")],
) -> None:
    """Decode a validation set at several thresholds and store the best one.

    Without --data, the rows and the options are those of the training run that made DIR.
    """
    from collm import run
    from collm.cli.tables import teacher_forced_table
    from collm.cli.terminal import Console
    from collm.evaluation.calibration import DEFERRAL_RATES, CalibrationOptions

    if choosing.check is not None and choosing.check_data is not None:
        raise typer.BadParameter("--check and --check-data are both given; use one of them")
    _check_usage(context, choosing)
    model = loading.load(collaboration)
    past = None
    if choosing.data is None:
        past = run.PastRun.read(Path(collaboration).resolve().parent, trust_code=loading.trust_code)
        source: run.DataConfig = past.config
        validation = past.validation()
    else:
        source, rates = rows.of(choosing.data), choosing.rate or DEFERRAL_RATES
        found, most = source.rows(choosing.data, rows.split)[: choosing.limit], choosing.max_batch
        options = CalibrationOptions(choosing.metric, params, rates, max_batch=most)
        validation = run.Validation(found, choosing.data, options)
    options = replace(
        validation.options,
        budgets=choosing.budget or validation.options.budgets,
        refine=validation.options.refine if choosing.refine is None else choosing.refine,
    )
    validation = replace(validation, options=options)
    if choosing.teacher_forced:
        Console().print(teacher_forced_table((past or validation).curve(model), options.budgets))
    else:
        validation, held_back = _held_back(validation, source, choosing)
        _choose(model, collaboration, validation, held_back)


def _check_usage(context: typer.Context, choosing: Choosing) -> None:
    """Refuse options that would have no effect."""
    if choosing.teacher_forced:
        generating = {"metric", "rate", "refine", "check", "check_data", "max_batch", "max_new_tokens", "stop"}
        refuse(context, "--teacher-forced generates nothing", none=generating)
        refuse(context, "--teacher-forced reads the gold completions with the models in this process", none={"servers"})
    if choosing.data is None:
        loading = {"collaboration", "device", "engine", "servers", "trust_code"}
        how = {"budget", "refine", "check", "check_data", "teacher_forced"}
        refuse(context, "without --data the run of DIR says the rest", only=loading | how)


def _held_back(validation: Validation, source: DataConfig, choosing: Choosing) -> tuple[Validation, Validation | None]:
    """Rows to choose thresholds on, and others, if wanted, to check them on."""
    if choosing.check is not None:
        return validation.split(choosing.check)
    if choosing.check_data is not None:
        rows = source.rows(choosing.check_data, None)
        return validation, replace(validation, rows=rows, source=choosing.check_data)
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
