"""`collm eval`, its report, and `collm lm-eval`: the collaboration beside every baseline on a task."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from collm.cli.options import CollaborationArgument, Decoding, Fields, Loading, with_options
from collm.core.params import SamplingParams
from collm.redaction import redacted_command

PRICE_HELP = (
    "Price of a million tokens that a model (base, assistant, assistant-2) reads, and writes. The cost axis then shows "
    "prices instead of FLOPs. Needed for each model."
)
LM_EVAL_MODEL = "collm"
"""Name of the model type in lm-evaluation-harness."""
TASK_OPTIONS = "metric format prompt_field completion_field max_tokens stop"


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
        metric: for task rows: exact_match, contains, last_number, token_f1 or module:function, by default one that
            suits the rows.
        format: for task gsm8k: gsm8k or gsm8k-plain.
        prompt_field: for task rows: name of the prompt field.
        completion_field: for task rows: name of the completion field.
        max_tokens: for task rows: maximum number of tokens of an answer.
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
    max_tokens: int | None = None
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
    decoding: Annotated[Decoding, Fields("threshold budget price")],
    params: Annotated[SamplingParams, Fields("temperature")],
    loading: Annotated[Loading, Fields("device trust_code", "engine servers")],
) -> None:
    """Compare the collaboration with other systems on a task: scores, intervals and costs."""
    from collm.cli.terminal import Console, comparison_tables, log_to_terminal
    from collm.core.policies import ThresholdPolicy
    from collm.evaluation.compare import Evaluation, compare
    from collm.evaluation.metrics import suitable_metric
    from collm.evaluation.systems import names_in, systems_named, thresholds_named
    from collm.evaluation.tasks import task_named
    from collm.evaluation.tasks.rows import RowsTask
    from collm.training.scoring import progress_bar

    log_to_terminal()
    given = {name: getattr(how, name) for name in TASK_OPTIONS.split()}
    chosen = task_named(task, **{name: value for name, value in given.items() if value is not None})
    shots: dict[str, Any] = {"shots": how.shots, "shots_source": how.shots_data}
    items = chosen.load(how.data, split=how.split, limit=how.limit, seed=how.seed, **shots)
    if isinstance(chosen, RowsTask) and how.metric is None:
        chosen = replace(chosen, metric=suitable_metric([item.reference for item in items]))
    model = loading.load(collaboration)
    threshold = model.threshold(decoding.threshold, decoding.budget, decoding.price)
    names = names_in(how.compare)
    if how.curve:
        names += thresholds_named(model, names, threshold)
    systems = systems_named(model, names, ThresholdPolicy(threshold))
    evaluation = Evaluation(chosen, items, params, how.chat, how.max_batch, how.seed)
    command = shlex.join(["collm", *redacted_command(sys.argv[1:])])
    settings: dict[str, Any] = {"command": command, "collaboration": collaboration}
    settings |= {"data": how.data or chosen.source, "limit": how.limit, "shots": how.shots}
    with progress_bar("answering", "answers") as progress:
        found = compare(systems, evaluation, out, settings=settings, on_answer=progress)
    console = Console()
    console.print(*comparison_tables(found), sep="\n")
    console.print(found.verdict, markup=False)
    console.print(f"collm report {out}", markup=False)


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The --out directory of 'collm eval'.")],
    out: Annotated[Path | None, typer.Option(help="Output file. Default: RUN/report.html.")] = None,
    price: Annotated[list[str] | None, typer.Option(metavar="NAME=READ[:WRITTEN]", help=PRICE_HELP)] = None,
) -> None:
    """Write an HTML report: results of all systems, charts, the author of each token, and statistics of deferral."""
    from collm.cli.terminal import log_to_terminal
    from collm.evaluation.report import write_report
    from collm.evaluation.run_report import parse_prices, report_of

    log_to_terminal()
    path = out or run / "report.html"
    write_report(path, report_of(run, parse_prices(price) if price else None))
    typer.echo(str(path))


def lm_eval(context: typer.Context, collaboration: CollaborationArgument) -> None:
    """Run lm-evaluation-harness on a collaboration. Arguments after DIR, such as --tasks gsm8k, go to `lm-eval run`.

    --model_args takes threshold, budget, policy, dtype, trust_code, max_length and add_bos_token. `collm lm-eval DIR
    --help` lists all options of the harness.
    """
    from collm.errors import ConfigError
    from collm.evaluation.harness import HarnessLM  # raises a MissingExtra if the harness is not installed

    # isort: split
    from lm_eval._cli import HarnessCLI
    from lm_eval.api.registry import model_registry
    from lm_eval.utils import setup_logging

    setup_logging()
    if LM_EVAL_MODEL not in model_registry:  # versions after 0.4.13 find it themselves, as an entry point
        model_registry.register(LM_EVAL_MODEL, target=HarnessLM)
    model_args = json.dumps({"pretrained": collaboration})  # as JSON a name stays as it is, whatever it holds
    sys.argv = ["lm-eval", "run", "--model_args", model_args, "--model", LM_EVAL_MODEL, *context.args]
    harness = HarnessCLI()
    chosen = harness.parse_args()
    if chosen.model != LM_EVAL_MODEL or chosen.model_args["pretrained"] != collaboration:
        raise ConfigError(f"the model is {collaboration}; leave --model and pretrained=.. out, or run lm-eval itself")
    if not (chosen.tasks or chosen.config):
        raise ConfigError("no task is given; add --tasks NAME,.. ('lm-eval ls tasks' lists them)")
    harness.execute(chosen)
