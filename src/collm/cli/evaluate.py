"""`collm eval`: the collaboration beside every baseline on a task."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from collm.cli.servers import EngineOption, ServersOption, servers_named

if TYPE_CHECKING:
    from collm.evaluation.compare import Comparison
    from collm.evaluation.tasks.task import Task


def evaluate(
    collaboration: Annotated[str, typer.Argument(metavar="DIR", help="The collaboration: a directory or Hub name.")],
    task: Annotated[str, typer.Option(help="gsm8k, math, bioasq, alpaca_eval, multiple_choice, or rows.")],
    out: Annotated[Path, typer.Option(help="Directory for answers and results; an interrupted evaluation resumes.")],
    data: Annotated[
        str | None,
        typer.Option(help="A file, a directory or a Hub name. Default: of gsm8k and math, where they are published."),
    ] = None,
    compare: Annotated[
        str, typer.Option(help="Commas between: base, assistant, random, sft=PATH, proxy=PATH, threshold=0.4, POLICY.")
    ] = "base,assistant",
    split: Annotated[str | None, typer.Option(help="Split of the data. Default: the task's test split.")] = None,
    limit: Annotated[int | None, typer.Option(help="Ask so many items, drawn by --seed.")] = None,
    shots: Annotated[int, typer.Option(help="Answered questions shown before each item, from the train split.")] = 0,
    shots_data: Annotated[str | None, typer.Option(help="Where shots come from instead.")] = None,
    metric: Annotated[
        str | None, typer.Option(help="For rows: exact_match, contains, last_number, token_f1 or module:function.")
    ] = None,
    format_: Annotated[str | None, typer.Option("--format", help="For gsm8k: gsm8k or gsm8k-plain.")] = None,
    prompt_field: Annotated[str | None, typer.Option(help="For rows: name of the prompt's field.")] = None,
    completion_field: Annotated[str | None, typer.Option(help="For rows: name of the completion's field.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="For rows: most tokens of an answer.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="For rows: text that ends an answer; may be repeated.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask as the user of a chat.")] = False,
    threshold: Annotated[float | None, typer.Option(help="Of the collaboration. Default: the calibrated one.")] = None,
    budget: Annotated[float | None, typer.Option(help="Deferral rate allowed, in place of a threshold.")] = None,
    curve: Annotated[bool, typer.Option("--curve", help="Also answer at every threshold of the calibration.")] = False,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of drawn items, shots and tokens.")] = 0,
    max_batch: Annotated[int, typer.Option(help="Most prompts decoded at once.")] = 16,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, auto; or one for each model: cuda:0,cuda:1.")
    ] = None,
    engine: EngineOption = None,
    servers: ServersOption = None,
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="Run functions that files name: of tools and metrics.")
    ] = False,
) -> None:
    """Answer a task with the collaboration and with what it is compared to; scores, intervals and costs of each."""
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
        collaboration, engine=engine, servers=servers_named(servers), device=device, trust_code=trust_code
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
