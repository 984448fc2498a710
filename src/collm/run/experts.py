"""One assistant more or less in a trained collaboration, whose base and other assistants stay."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from collm.collaboration import CoLLM
from collm.core.head import DeferralHead
from collm.core.types import author_name
from collm.errors import ConfigError
from collm.evaluation.calibration import EVEN_ODDS
from collm.evaluation.metrics import metric_named, suitable_metric
from collm.models.loading import ModelSpec
from collm.run.calibrate import VALIDATION, PastRun
from collm.run.data import score_run, split_rows
from collm.run.options import Addition, RunConfig
from collm.run.train import ROWS, RunResult, finish, open_run
from collm.training.config import CoLLMConfig
from collm.training.data import Row
from collm.training.gain import fit_gain
from collm.training.new_rows import fit_new_rows
from collm.training.scores import Scores, stored_examples


@dataclass(frozen=True)
class Change:
    """How the answers to validation prompts changed: those that kept their tokens, and the mean of the metric."""

    kind: str
    prompts: int
    same: int
    metric: str
    before: float
    after: float

    def __str__(self) -> str:
        scores = f"{self.metric} {self.before:.3f} before, {self.after:.3f} now"
        return f"{self.kind} prompts: {self.same} of {self.prompts} answers have the same tokens; {scores}"


def add_assistants(
    source: Path, added: Addition, out: Path, *, trust_code: bool = False, quiet: bool = False
) -> tuple[RunResult, list[Change]]:
    """Add assistants to the collaboration of a run. Only their rows of the head are fitted.

    The run in `source` stays as it is. The new one in `out` has the rows that the fit reads, their scores, and a
    collaboration of its own. An interrupted call resumes its scoring.

    Returns:
        The new run, and how answers to the validation prompts of the run before and of the new data changed.

    Raises:
        ConfigError: options that contradict each other or the run, or `out` holds another run.
        CollmError: an error of a step.
    """
    past = PastRun.read(source, trust_code=trust_code)
    old = CoLLM.from_pretrained(source / "collaboration", trust_code=True)
    seed, costs, num_old = past.training["seed"], past.training["deferral_cost"], len(old.assistants)
    if added.deferral_cost is not None:
        costs = costs if isinstance(costs, list) else [costs] * num_old
        costs = [*costs, *[added.deferral_cost] * len(added.assistant)]
    of_new = replace(past.config, data=added.data, validation=added.validation, validation_split=None)
    (before, _), (new, held_out) = (split_rows(one, seed=seed) for one in (past.config, of_new))
    count = len(new) if added.sample is None else added.sample
    rows = [*random.Random(seed).sample(before, min(len(before), count)), *new]

    given, args = _options(past, old, out, [*past.config.assistant, *added.assistant], costs)
    with open_run(given, args, quiet=quiet, rows=(rows, [*past.rows(), *held_out])) as (config, prepared):
        base, *assistants = score_run(config, prepared, out, list(config.authors), quiet=quiet)[0]
        head = old.head.with_rows([*range(num_old), *[None] * len(added.assistant)])
        metrics = _fit(head, base, assistants, args, added)
        result = finish(_like(old, config, head), metrics, config, prepared, out, quiet=quiet)
    changes = [_change(*one, old, result.model, config) for one in (("old", past.rows()), ("new", held_out))]
    return result, changes


def drop_assistant(
    source: Path, assistant: str, out: Path, *, trust_code: bool = False, quiet: bool = False
) -> tuple[RunResult, list[Change]]:
    """Remove an assistant, by its author name or its source, from the collaboration of a run. All else stays.

    Raises:
        ConfigError: there is no such assistant, it is the only one, or `out` holds another run.
        CollmError: an error of a step.
    """
    past = PastRun.read(source, trust_code=trust_code)
    old = CoLLM.from_pretrained(source / "collaboration", trust_code=True)
    names = {author_name(k): name for k, name in enumerate(past.config.assistant, start=1)}
    kept = [k for k, one in enumerate(names.items()) if assistant not in one]
    if len(kept) != len(names) - 1 or not kept:
        listed = ", ".join(f"{author} ({name})" for author, name in names.items())
        raise ConfigError(f"cannot drop {assistant} from {source}; expected one of several assistants, it has {listed}")

    costs = past.training["deferral_cost"]
    costs = [costs[k] for k in kept] if isinstance(costs, list) else costs
    given, args = _options(past, old, out, [past.config.assistant[k] for k in kept], costs)
    rows = split_rows(past.config, seed=args.seed)[0], past.rows()
    with open_run(given, args, quiet=quiet, rows=rows) as (config, prepared):
        result = finish(_like(old, config, old.head.with_rows(kept)), {}, config, prepared, out, quiet=quiet)
    return result, [_change("old", past.rows(), old, result.model, config)]


def _options(
    past: PastRun, old: CoLLM, out: Path, assistants: list[str], costs: list[float] | float
) -> tuple[RunConfig, CoLLMConfig]:
    """The options of the new run, whose rows are in its directory, and those of training that concern the head."""
    assert isinstance(old.base, ModelSpec)
    rows, validation = (str(out.resolve() / name) for name in (ROWS, VALIDATION))
    layout: dict[str, Any] = {"format": "rows", "prompt_field": "prompt", "completion_field": "completion"}
    layout |= {"data": rows, "validation": validation, "data_split": None, "validation_split": None}
    layout |= {"base": old.base.name, "assistant": assistants, "scores": None, "cache_hidden_states": True}
    gain = past.training["objective"] == "gain"
    of_head = {"objective": "gain", "gain_clip": past.training["gain_clip"]} if gain else {"deferral_cost": costs}
    kept = {name: past.training[name] for name in ("seed", "max_length", "use_cpu")}
    return replace(past.config, **layout), CoLLMConfig(output_dir=str(out), method="head", **of_head, **kept)


def _like(old: CoLLM, config: RunConfig, head: DeferralHead) -> CoLLM:
    """The same collaboration with other assistants and another head."""
    same = {name: getattr(old, name) for name in ("template", "accept_differences", "source")}
    return CoLLM(old.base, config.assistants, head, old.tokenizer, **same)


def _fit(
    head: DeferralHead, base: Scores, assistants: Sequence[Scores], args: CoLLMConfig, added: Addition
) -> dict[str, float]:
    """Fit the last rows of the head."""
    count = len(added.assistant)
    if args.objective != "gain":
        data, costs = stored_examples(base, assistants), args.deferral_costs(head.num_assistants)
        return fit_new_rows(head, count, data, costs=costs, seed=args.seed, old_biases=added.old_biases)
    if added.old_biases or added.deferral_cost is not None:
        raise ConfigError("old_biases and deferral_cost have no effect on a head that predicts gains; leave them out")
    data = stored_examples(base, assistants[-count:])
    return fit_gain(head, data, clip=args.resolved("gain_clip"), seed=args.seed, new=count)


def _change(kind: str, rows: Sequence[Row], old: CoLLM, new: CoLLM, config: RunConfig) -> Change:
    """Compare the answers of two collaborations, each at its default threshold."""
    metric = config.metric or suitable_metric([row.completion for row in rows])
    measure, prompts, answers, scores = metric_named(metric), [row.prompt for row in rows], [], []
    for model in (old, new):
        threshold = EVEN_ODDS if model.calibration is None else None
        found = model.generate(prompts, config.params, threshold=threshold, max_batch=config.max_batch)
        scores.append(sum(measure(one.text, row.completion) for one, row in zip(found, rows, strict=True)) / len(rows))
        answers.append([one.token_ids for one in found])
    return Change(kind, len(rows), sum(map(list.__eq__, *answers)), metric, *scores)
