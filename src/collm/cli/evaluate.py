"""`collm eval`: the collaboration beside every baseline on a task."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from collm.cli import options

if TYPE_CHECKING:
    from collm.evaluation.compare import Comparison
    from collm.evaluation.tasks.task import Task


def evaluate(
    collaboration: options.CollaborationArgument,
    task: Annotated[str, typer.Option(help="gsm8k, rows, or your own as module:Class.")],
    out: Annotated[Path, typer.Option(help="Output directory. An interrupted evaluation resumes from it.")],
    data: Annotated[
        str | None,
        typer.Option(help="A file, a directory or a Hub name. Default for gsm8k: the published data set."),
    ] = None,
    compare: Annotated[
        str,
        typer.Option(
            help="Comma-separated systems: base, assistant, random, sft=PATH, proxy=PATH, threshold=0.4 or POLICY."
        ),
    ] = "base,assistant",
    split: Annotated[str | None, typer.Option(help="Split of the data set. Default: the task's test split.")] = None,
    limit: Annotated[int | None, typer.Option(help="Evaluate a random sample of this many items.")] = None,
    shots: Annotated[int, typer.Option(help="Number of few-shot examples, taken from the train split.")] = 0,
    shots_data: Annotated[str | None, typer.Option(help="Take the few-shot examples from this data instead.")] = None,
    metric: Annotated[
        str | None,
        typer.Option(help="For task rows: exact_match, contains, last_number, token_f1 or module:function."),
    ] = None,
    format_: Annotated[str | None, typer.Option("--format", help="For task gsm8k: gsm8k or gsm8k-plain.")] = None,
    prompt_field: Annotated[str | None, typer.Option(help="For task rows: name of the prompt field.")] = None,
    completion_field: Annotated[str | None, typer.Option(help="For task rows: name of the completion field.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="For task rows: maximum tokens of an answer.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="For task rows: text that ends an answer. Can be given several times.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Send each item as a chat message of the user.")] = False,
    threshold: options.ThresholdOption = None,
    budget: options.BudgetOption = None,
    curve: Annotated[bool, typer.Option("--curve", help="Also evaluate every threshold of the calibration.")] = False,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed for sampled items, few-shot examples and tokens.")] = 0,
    max_batch: options.MaxBatchOption = 16,
    device: options.DeviceOption = None,
    engine: options.EngineOption = None,
    servers: options.ServersOption = None,
    trust_code: options.TrustCodeOption = False,
) -> None:
    """Compare the collaboration with other systems on a task: scores, intervals and costs."""
    from collm.collaboration import CoLLM
    from collm.core.params import SamplingParams
    from collm.core.policies import ThresholdPolicy
    from collm.errors import ConfigError
    from collm.evaluation import compare as comparing
    from collm.evaluation.systems import names_in, systems_named, thresholds_named
    from collm.training.scoring import progress_bar

    chosen = _task(
        task,
        metric=metric,
        format=format_,
        prompt_field=prompt_field,
        completion_field=completion_field,
        max_new_tokens=max_new_tokens,
        stop=tuple(stop) if stop else None,
    )
    items = chosen.load(data, split=split, limit=limit, shots=shots, shots_source=shots_data, seed=seed)
    model = CoLLM.from_pretrained(
        collaboration, engine=engine, servers=options.servers_named(servers), device=device, trust_code=trust_code
    )
    operating = model.threshold(threshold, budget)
    names = names_in(compare)
    if curve:
        if model.calibration is None:
            raise ConfigError(f"{collaboration} is not calibrated, so there is no curve; run 'collm calibrate' first")
        names += thresholds_named(model, model.calibration, names, operating)
    settings = {"command": _command(), "collaboration": collaboration, "data": data or chosen.source}
    with progress_bar("answering") as progress:
        found = comparing.compare(
            systems_named(model, names, ThresholdPolicy(operating)),
            chosen,
            items,
            out,
            threshold=operating,
            params=SamplingParams(temperature=temperature),
            chat=chat,
            max_batch=max_batch,
            seed=seed,
            settings={**settings, "limit": limit, "shots": shots},
            progress=lambda name: progress,
        )
    _show(found, out)


def _task(name: str, **options: Any) -> Task:
    """By name, with the options that were given."""
    from collm.evaluation.tasks.named import task_named

    return task_named(name, **{option: value for option, value in options.items() if value is not None})


def _command() -> str:
    """The command line, without its secrets."""
    from collm.redaction import redacted_command

    return shlex.join(["collm", *redacted_command(sys.argv[1:])])


def _show(found: Comparison, out: Path) -> None:
    from collm.cli.tables import comparison_tables
    from collm.cli.terminal import Console
    from collm.evaluation.verdict import verdict

    console = Console()
    console.print(*comparison_tables(found), sep="\n")
    console.print(verdict(found.task, found.measure, found.results), markup=False)
    console.print(f"collm report {out}", markup=False)
