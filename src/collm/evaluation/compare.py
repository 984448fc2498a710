"""`collm eval`: several systems answer the same items with the same stopping; what each scored, and what it cost."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from collm.artefact import library_versions
from collm.atomic import atomic_file
from collm.collaboration import CoLLM
from collm.core.policies import Policy
from collm.core.types import BASE, Completion, ModelUsage, SamplingParams, deferral_rate
from collm.errors import DataError
from collm.evaluation.answers import Answer, AnswerFile, Answers, answer_path
from collm.evaluation.intervals import Interval, paired_difference
from collm.evaluation.systems import COLLABORATION, System
from collm.evaluation.tasks.task import Task, TaskItem
from collm.evaluation.verdict import verdict
from collm.models.language_model import LanguageModel
from collm.models.members import author_name, spec_of

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class SystemResult:
    """One system's row.

    Attributes:
        measures: of the task, each with its 95 % interval.
        difference: of the main measure, this system's minus the collaboration's, item by item; None for itself.
        deferral_rate: share of the generated tokens that assistants wrote.
        models: by model, per item: tokens read and written, forward passes, calls of a program.
        flops: per item, estimated as 2 x parameters (without the input embedding) x tokens read, summed over models.
        tokens_per_s: generated tokens per second of batches of `max_batch`.
        seconds: mean time per item from the start of its batch to its last token.
    """

    name: str
    num_items: int
    measures: dict[str, Interval]
    difference: Interval | None
    deferral_rate: float
    models: dict[str, dict[str, float]]
    flops: float
    tokens_per_s: float
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """What `collm eval` found.

    Attributes:
        measure: the task's main measure, None where it has none.
        results: the collaboration first.
        answers: by system, its answers in the order of the items.
        authors: names of the collaboration's, the base first.
        threshold: of the collaboration.
    """

    task: str
    measure: str | None
    items: Sequence[TaskItem]
    results: list[SystemResult]
    answers: dict[str, list[Answer]]
    authors: list[str]
    threshold: float
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the items and their answers, for JSON."""
        return {
            "task": self.task,
            "measure": self.measure,
            "num_items": len(self.items),
            "authors": self.authors,
            "threshold": self.threshold,
            "settings": self.settings,
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
    progress: Callable[[str], OnProgress] | None = None,
) -> Comparison:
    """Have every system answer every item.

    What is answered is kept in `out`/answers/NAME.jsonl at once, so an interrupted evaluation goes on where it was. The
    results go to `out`/results.json.

    Args:
        systems: the collaboration first, as `systems_named` gives them.
        task: says how items are rendered, stopped and scored.
        threshold: the collaboration's, for the record.
        chat: ask as the user of a chat, for a collaboration trained on chats.
        params: how tokens are drawn; max_new_tokens and stop are the task's. Greedy by default.
        seed: item i draws with seed + i where anything is drawn, whatever has been answered before.
        progress: called with a system's name for a callback that is told items done and to do.

    Raises:
        DataError: no items, or two of one id.
        ConfigError: `out` holds answers to something else.
        ModelFailure: a model failed at an item: the run stops, nothing is scored as wrong; what is answered is kept.
    """
    _check(items)
    asking = _Asking(task, items, params or SamplingParams(), chat, max_batch, seed)
    answers: dict[str, list[Answer]] = {}
    results: list[SystemResult] = []
    num_assistants = len(systems[0].load().assistants)
    authors = [author_name(author, num_assistants) for author in range(1 + num_assistants)]
    for system in systems:
        report = progress(system.name) if progress else None
        found, model = asking.answers(system, out, rate=_rate(answers), report=report)
        answers[system.name] = [found.items[item.id] for item in items]
        results.append(_result(system, model, task, items, answers, found, authors))
    settings = {
        "temperature": asking.params.temperature,
        "seed": seed,
        "chat": chat,
        "max_batch": max_batch,
        "versions": library_versions(),
    }
    comparison = Comparison(task.name, task.measure, items, results, answers, authors, threshold, settings)
    _write(out / "items.json", [{"id": item.id, "prompt": item.prompt, "reference": item.reference} for item in items])
    _write(out / "results.json", comparison.to_dict())
    return comparison


def _write(path: Path, content: Any) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _check(items: Sequence[TaskItem]) -> None:
    if not items:
        raise DataError("the task has no items; expected at least one")
    seen: dict[str, str] = {}
    for item in items:
        if item.id in seen:
            raise DataError(f"{item.where} and {seen[item.id]} have the same id {item.id!r}; give each its own")
        seen[item.id] = item.where


def _rate(answers: Mapping[str, Sequence[Answer]]) -> float:
    """The collaboration's deferral rate, once it has answered."""
    return deferral_rate([author for answer in answers.get(COLLABORATION, ()) for author in answer.authors])


@dataclass(frozen=True)
class _Asking:
    """What all systems are asked, and how."""

    task: Task
    items: Sequence[TaskItem]
    params: SamplingParams
    chat: bool
    max_batch: int
    seed: int

    def answers(self, system: System, out: Path, *, rate: float, report: OnProgress | None) -> tuple[Answers, CoLLM]:
        """All answers of one system, and its model; answers that a file holds already are not made again."""
        model, policy = system.load(), system.at_rate(rate)
        stop = self.task.stop_for(self.items[0], model.template, chat=self.chat)
        params = replace(self.params, max_new_tokens=self.task.max_new_tokens, stop=stop)
        identity = {
            "system": f"{system.name}: {policy}",
            "models": _digest(model),
            "task": self.task.name,
            "items": _fingerprint(self.items),
            "chat": self.chat,
            "params": asdict(params),
            "seed": self.seed,
        }
        draws = policy.draws or params.temperature > 0
        drawing = {
            item.id: replace(params, seed=self.seed + place if draws else None) for place, item in enumerate(self.items)
        }
        file = AnswerFile(answer_path(out, system.name), identity)
        left = [item for item in self.items if item.id not in file.answers.items]
        for start in range(0, len(left), self.max_batch):
            self._batch(left[start : start + self.max_batch], system, model, policy, drawing, file)
            if report is not None:
                report(len(file.answers.items), len(self.items))
        return file.answers, model

    def _batch(
        self,
        batch: Sequence[TaskItem],
        system: System,
        model: CoLLM,
        policy: Policy,
        drawing: Mapping[str, SamplingParams],
        file: AnswerFile,
    ) -> None:
        prompts = [self.task.render(item, model.template, model.tokenizer, chat=self.chat) for item in batch]
        started = time.perf_counter()

        def keep(index: int, completion: Completion) -> None:
            item, seconds = batch[index], time.perf_counter() - started
            answer = Answer.of(item.id, completion, self.task.score(item, completion.text), seconds)
            file.add(replace(answer, authors=[author or system.writes_as for author in answer.authors]))

        params = [drawing[item.id] for item in batch]
        done = model.generate(prompts, params, policy=policy, max_batch=self.max_batch, on_completion=keep)
        file.close_batch([item.id for item in batch], done.usage, started)


def _fingerprint(items: Sequence[TaskItem]) -> str:
    content = [[item.id, item.prompt, item.reference, item.shots] for item in items]
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()


def _digest(model: CoLLM) -> str:
    """Of the head, and of where the models come from."""
    digest = hashlib.sha256(json.dumps([str(spec_of(member)) for member in (model.base, *model.assistants)]).encode())
    for tensor in model.head.state_dict().values():
        digest.update(tensor.cpu().float().numpy().tobytes())
    return digest.hexdigest()


def _result(
    system: System,
    model: CoLLM,
    task: Task,
    items: Sequence[TaskItem],
    answers: Mapping[str, Sequence[Answer]],
    found: Answers,
    authors: Sequence[str],
) -> SystemResult:
    mine = answers[system.name]
    measured = sum(len(batch.ids) for batch in found.batches)
    usage = _usage(system, found, authors)
    tokens = {name: _per_item(used, measured) for name, used in usage.items()}
    by_batch = {id_ for batch in found.batches for id_ in batch.ids}
    written = sum(len(answer.authors) for answer in mine if answer.id in by_batch)
    return SystemResult(
        name=system.name,
        num_items=len(items),
        measures=task.aggregate([(item, one.text, one.scores) for item, one in zip(items, mine, strict=True)]),
        difference=None if system.name == COLLABORATION else _difference(task, mine, answers[COLLABORATION]),
        deferral_rate=deferral_rate([author for answer in mine for author in answer.authors]),
        models=tokens,
        flops=sum(_flops(system, model, name) * used["tokens_read"] for name, used in tokens.items()),
        tokens_per_s=written / max(sum(batch.seconds for batch in found.batches), 1e-9),
        seconds=sum(answer.seconds for answer in mine) / len(mine),
    )


def _usage(system: System, found: Answers, authors: Sequence[str]) -> dict[str, ModelUsage]:
    """By model, over all batches; a model alone is called by its own name, and its idle assistant left out."""
    total: dict[str, ModelUsage] = {}
    for batch in found.batches:
        for name, used in batch.usage.items():
            before = total.get(name, ModelUsage())
            total[name] = ModelUsage(*(getattr(before, key) + value for key, value in asdict(used).items()))
    busy = {name: used for name, used in total.items() if any(asdict(used).values())}
    if system.writes_as != BASE and "base" in busy:
        return {authors[system.writes_as]: busy["base"]}
    return busy


def _per_item(used: ModelUsage, items: int) -> dict[str, float]:
    kept = ("tokens_read", "tokens_written", "forward_passes", "calls")
    return {name: getattr(used, name) / max(items, 1) for name in kept}


def _flops(system: System, model: CoLLM, name: str) -> float:
    """Per token read: two for each weight but those of the input embedding."""
    if system.writes_as != BASE:
        name = "base"
    member = next(member for member in model.members if member.name == name)
    if not isinstance(member, LanguageModel):
        return 0.0
    return 2.0 * member.weights_per_token


def _difference(task: Task, mine: Sequence[Answer], theirs: Sequence[Answer]) -> Interval | None:
    """Over the items that have the main measure."""
    measure = task.measure or ""
    pairs = [
        (one.scores[measure], other.scores[measure])
        for one, other in zip(mine, theirs, strict=True)
        if measure in one.scores and measure in other.scores
    ]
    return paired_difference(*map(list, zip(*pairs, strict=True))) if pairs else None
