"""`collm calibrate`: measure thresholds on a validation set and keep the best."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated

import typer

from collm.cli.options import Fields, Loading, given_options, refuse, with_options
from collm.core.calibration import CalibrationOptions
from collm.run.options import RowFormat

CALIBRATING = {one.name for one in fields(CalibrationOptions)}


@dataclass(frozen=True)
class Choosing:
    """Which rows thresholds are chosen and checked on.

    Attributes:
        data: validation rows: JSON, JSONL, data set directory or Hub name, by default those of DIR's run.
        limit: use only the first rows, up to this number.
        check: hold back this share of the rows and check the chosen thresholds on it.
        check_data: check the chosen thresholds on these rows, which have the format of --data.
        teacher_forced: only show all thresholds on the gold completions. Choose none.
    """

    data: str | None = None
    limit: int | None = None
    check: float | None = None
    check_data: str | None = None
    teacher_forced: bool = False


@with_options
def calibrate(
    context: typer.Context,
    collaboration: Annotated[str, typer.Argument(metavar="DIR", help="The collaboration: a directory.")],
    choosing: Choosing,
    options: CalibrationOptions,
    layout: Annotated[RowFormat, Fields("data_split prompt_field completion_field format bad_rows")],
    loading: Annotated[Loading, Fields("device trust_code", "engine servers")],
) -> None:
    """Decode a validation set at several thresholds and store the best one.

    Without --data, the rows are those of the training run that made DIR, and so are the options that are not given.
    """
    from collm.cli.terminal import Console, calibration_table, log_to_terminal, teacher_forced_table
    from collm.evaluation.calibration import check_on
    from collm.run.calibrate import PastRun, calibrate_on, curve_on
    from collm.run.data import hold_back
    from collm.training.data import Row
    from collm.training.scoring import progress_bar

    log_to_terminal()
    _check_usage(context, choosing)
    model, console, past = loading.load(collaboration), Console(), None
    rows, held_back = list[Row](), list[Row]()
    if choosing.data is None:
        past = PastRun.read(Path(collaboration).resolve().parent, trust_code=loading.trust_code)
        changed = {name: getattr(options, name) for name in CALIBRATING & given_options(context).keys()}
        layout = options = config = replace(past.config, **changed)
        source, rows = config.validation_source, past.rows()
    else:
        source, rows = choosing.data, layout.load(choosing.data, layout.data_split)
    rows = rows[: choosing.limit]
    if choosing.teacher_forced:
        curve = curve_on(model, rows) if past is None else past.curve(model)
        console.print(teacher_forced_table(curve, options.budgets))
        return
    if choosing.check is not None:
        rows, held_back = hold_back(rows, choosing.check)
    elif choosing.check_data is not None:
        held_back = layout.load(choosing.check_data, None)
    calibration = calibrate_on(model, rows, options, source=source)
    model.save_calibration(collaboration)
    if held_back:
        with progress_bar(f"checking on {len(held_back)} rows", "texts") as progress:
            calibration = check_on(model, held_back, options, on_completion=progress)
        model.save_calibration(collaboration)
    console.print(calibration_table(calibration))
    for one in calibration.checks:
        console.print(one.summary(calibration.metric_name), soft_wrap=True)


def _check_usage(context: typer.Context, choosing: Choosing) -> None:
    if choosing.check is not None and choosing.check_data is not None:
        raise typer.BadParameter("--check and --check-data are both given; use one of them")
    if choosing.teacher_forced:
        generating = {"metric", "rates", "refine", "check", "check_data", "max_batch", "max_tokens", "stop"}
        refuse(context, "--teacher-forced generates nothing", none=generating)
        refuse(context, "--teacher-forced reads the gold completions with the models in this process", none={"servers"})
    if choosing.data is None:
        of_rows = {"data_split", "prompt_field", "completion_field", "format", "bad_rows"}
        refuse(context, "without --data the rows are those that the run of DIR stored", none=of_rows)
        if choosing.teacher_forced:
            refuse(context, "without --data, --teacher-forced shows all rows of the run", none={"limit"})
