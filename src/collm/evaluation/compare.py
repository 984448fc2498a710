"""`collm eval`: several systems answer the same items. Each gets scores and costs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from collm.artefact import library_versions
from collm.atomic import sole_writer, write_text
from collm.collaboration import CoLLM
from collm.core.params import SamplingParams
from collm.core.types import deferral_rate
from collm.errors import CollmError, DataError
from collm.evaluation.answers import Answer, answer_path
from collm.evaluation.generation import Generation, OnProgress
from collm.evaluation.gold import gold_examples, gold_views
from collm.evaluation.insights import shown
from collm.evaluation.reliability import reliability
from collm.evaluation.results import SystemResult, result_of
from collm.evaluation.systems import COLLABORATION, System
from collm.evaluation.tasks.task import Task, TaskItem
from collm.evaluation.verdict import verdict
from collm.training.data import Row
from collm.untrusted import contained


@dataclass(frozen=True)
class Comparison:
    """The result of `collm eval`.

    Attributes:
        measure: the task's main measure; None if it has none.
        results: one per system, the collaboration first.
        answers: the answers of each system, in the order of the items.
        authors: names of the collaboration's authors, the base first.
        threshold: the collaboration's threshold.
        tokens: token-level measures on the items' solutions; None if the data has no solutions.
        left_out: what a report does not show, with the reason.
    """

    task: str
    measure: str | None
    items: Sequence[TaskItem]
    results: list[SystemResult]
    answers: dict[str, list[Answer]]
    authors: list[str]
    threshold: float
    settings: dict[str, Any]
    tokens: dict[str, Any] | None = None
    left_out: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Everything except the items and their answers, for JSON."""
        return {
            "task": self.task,
            "measure": self.measure,
            "num_items": len(self.items),
            "authors": self.authors,
            "threshold": self.threshold,
            "settings": self.settings,
            "tokens": self.tokens,
            "left_out": self.left_out,
            "rows": [asdict(result) for result in self.results],
            "verdict": verdict(self.task, self.measure, self.results),
        }


def compare(
    systems: Sequence[System],
    task: Task,
    items: Sequence[TaskItem],
    out: Path,
    *,
    threshold: float,
    params: SamplingParams | None = None,
    chat: bool = False,
    max_batch: int = 16,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    progress: Callable[[str], OnProgress] | None = None,
) -> Comparison:
    """Let every system answer every item.

    Each answer is written to `out`/answers/NAME.jsonl immediately, so an interrupted evaluation can resume. The results
    are written to `out`/results.json. For the report there are items.json, and candidates.json with the most probable
    tokens of each author for some answers. What only the report shows comes last; if it cannot be computed, it is left
    out with the reason. For a task with an external judge, outputs/NAME.json is the judge's input.

    Args:
        systems: the collaboration first, as from `systems_named`.
        task: renders and scores the items, and defines where answers end.
        threshold: the collaboration's threshold, stored with the results.
        chat: send items as chat messages of the user, for a collaboration trained on chats.
        params: sampling parameters. max_new_tokens and stop are those of the task. Greedy by default.
        seed: with sampling, item i has seed + i, also after a resume.
        settings: stored with the results.
        progress: called with a system's name. Returns a callback for (items done, items in all).

    Raises:
        DataError: no items, or two items with the same id.
        ConfigError: `out` holds the answers of another evaluation, another process writes there, or the collaboration
            cannot decode as a system does.
        ArtefactError: a link in `out` leads out.
        ModelFailure, ToolFailure: a model failed. The run stops and the item is not scored as wrong. Earlier answers
            are kept.
    """
    if not items:
        raise DataError("the task has no items; expected at least one")
    seen: dict[str, str] = {}
    for item in items:
        if item.id in seen:
            raise DataError(f"{item.where} and {seen[item.id]} have the same id {item.id!r}; give each its own")
        seen[item.id] = item.where
    asking = Generation(task, items, params or SamplingParams(), chat, max_batch, seed)
    for system in systems:
        asking.check(system)
    answers, results = _answered(systems, asking, out, progress)
    model = systems[0].load()
    used = {
        **(settings or {}),
        "temperature": asking.params.temperature,
        "seed": seed,
        "chat": chat,
        "max_batch": max_batch,
        "versions": library_versions(),
    }
    found = Comparison(
        task.name, task.main_measure(items), items, results, answers, model.author_names, threshold, used
    )
    _write(out / "items.json", [{"id": item.id, "prompt": item.prompt, "reference": item.reference} for item in items])
    _write(out / "results.json", found.to_dict())
    try:
        found = replace(found, tokens=_tokens(model, asking.solutions()))
    except CollmError as error:
        found.left_out["token measures"] = str(error)
    _write(out / "candidates.json", _candidates(model, asking, found))
    _write(out / "results.json", found.to_dict())
    return found


def _answered(
    systems: Sequence[System], asking: Generation, out: Path, progress: Callable[[str], OnProgress] | None
) -> tuple[dict[str, list[Answer]], list[SystemResult]]:
    """The answers and the result of each system, in order."""
    task, items = asking.task, asking.items
    answers: dict[str, list[Answer]] = {}
    results: list[SystemResult] = []
    with sole_writer(contained(out)):
        for system in systems:
            report = progress(system.name) if progress else None
            authors = [author for answer in answers.get(COLLABORATION, ()) for author in answer.authors]
            found, model = asking.answers(system, out, rate=deferral_rate(authors), report=report)
            answers[system.name] = [found.items[item.id] for item in items]
            results.append(result_of(system, model, task, items, answers, found))
            outputs = task.outputs(items, [answer.text for answer in answers[system.name]], system.name)
            if outputs is not None:
                _write(out / "outputs" / f"{answer_path(out, system.name).stem}.json", outputs)
    return answers, results


def _write(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _tokens(model: CoLLM, solutions: Sequence[Row]) -> dict[str, Any] | None:
    """Token-level measures on solutions (NaN as None), and the reliability of the defer prob."""
    if not solutions:
        return None
    views = gold_views(model, gold_examples(model, solutions))
    measures = {name: None if math.isnan(value) else value for name, value in views.measures().items()}
    return {
        "num_tokens": len(views.base_logprob),
        "measures": measures,
        "reliability": [asdict(one) for one in reliability(views)],
    }


def _candidates(model: CoLLM, asking: Generation, found: Comparison) -> dict[str, Any]:
    """The candidates of the answers that a report shows, by item. Where there are none, `left_out` has the reason."""
    base = {answer.id: answer for answer in found.answers.get("base", ())}
    by_id = {item.id: item for item in found.items}
    answers = {one.id: one for group in shown(found.answers[COLLABORATION], base, found.measure) for one in group}
    candidates = {}
    for id_, answer in answers.items():
        try:
            candidates[id_] = model.candidates(asking.prompt(by_id[id_], model), answer.token_ids)
        except CollmError as error:
            found.left_out[f"candidates of item {id_}"] = str(error)
    return candidates
