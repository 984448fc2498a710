"""`collm eval`: the collaboration beside every baseline on a task."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from collm.cli.options import CollaborationArgument, Decoding, Fields, Loading, with_options
from collm.core.params import SamplingParams
from collm.redaction import redacted_command

TASK_OPTIONS = "metric format prompt_field completion_field max_new_tokens stop"


@dataclass(frozen=True)
class Answering:
    """Which systems answer which items of a task, and how.

    Attributes:
        data: a file, a directory or a Hub name. Default for gsm8k: the published data set.
        split: split of the data set, by default the task's test split.
        limit: evaluate a random sample of this many items.
        shots: number of few-shot examples, taken from the train split.
        shots_data: take the few-shot examples from this data instead.
        chat: send each item as a chat message of the user.
        max_batch: maximum number of prompts decoded at once.
        seed: seed for sampled items, few-shot examples and tokens.
        metric: for task rows: exact_match, contains, last_number, token_f1 or module:function.
        format: for task gsm8k: gsm8k or gsm8k-plain.
        prompt_field: for task rows: name of the prompt field.
        completion_field: for task rows: name of the completion field.
        max_new_tokens: for task rows: maximum number of tokens of an answer.
        stop: for task rows: text that ends an answer.
        compare: comma-separated systems: base, assistant, random, sft=PATH, proxy=PATH, threshold=0.4 or POLICY.
        curve: also evaluate every threshold of the calibration.
    """

    data: str | None = None
    split: str | None = None
    limit: int | None = None
    shots: int = 0
    shots_data: str | None = None
    chat: bool = False
    max_batch: int = 16
    seed: int = 0
    metric: str | None = None
    format: str | None = None
    prompt_field: str | None = None
    completion_field: str | None = None
    max_new_tokens: int | None = None
    stop: list[str] | None = None
    compare: str = "base,assistant"
    curve: bool = False


@with_options
def evaluate(
    collaboration: CollaborationArgument,
    task: Annotated[str, typer.Option(help="gsm8k, rows, or your own as module:Class.")],
    out: Annotated[Path, typer.Option(help="Output directory. An interrupted evaluation resumes from it.")],
    how: Annotated[
        Answering, Fields("data split limit shots shots_data chat max_batch seed compare curve", TASK_OPTIONS, "Tasks")
    ],
    decoding: Annotated[Decoding, Fields("threshold budget")],
    params: Annotated[SamplingParams, Fields("temperature")],
    loading: Annotated[Loading, Fields("device trust_code", "engine servers")],
) -> None:
    """Compare the collaboration with other systems on a task: scores, intervals and costs."""
    from collm.cli.tables import comparison_tables
    from collm.cli.terminal import Console
    from collm.core.policies import ThresholdPolicy
    from collm.evaluation.compare import Evaluation, compare
    from collm.evaluation.systems import names_in, systems_named, thresholds_named
    from collm.evaluation.tasks.named import task_named
    from collm.training.scoring import progress_bar

    given = {name: getattr(how, name) for name in TASK_OPTIONS.split()}
    chosen = task_named(task, **{name: value for name, value in given.items() if value is not None})
    shots: dict[str, Any] = {"shots": how.shots, "shots_source": how.shots_data}
    items = chosen.load(how.data, split=how.split, limit=how.limit, seed=how.seed, **shots)
    model = loading.load(collaboration)
    threshold, names = model.threshold(decoding.threshold, decoding.budget), names_in(how.compare)
    if how.curve:
        names += thresholds_named(model, names, threshold)
    systems = systems_named(model, names, ThresholdPolicy(threshold))
    evaluation = Evaluation(chosen, items, params, how.chat, how.max_batch, how.seed)
    command = shlex.join(["collm", *redacted_command(sys.argv[1:])])
    settings: dict[str, Any] = {"command": command, "collaboration": collaboration}
    settings |= {"data": how.data or chosen.source, "limit": how.limit, "shots": how.shots}
    with progress_bar("answering") as progress:
        found = compare(systems, evaluation, out, settings=settings, on_answer=progress)
    console = Console()
    console.print(*comparison_tables(found), sep="\n")
    console.print(found.verdict, markup=False)
    console.print(f"collm report {out}", markup=False)
