"""`collm eval`: several systems answer the same items. Each gets scores and costs."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from collm.artefact import library_versions
from collm.atomic import sole_writer, write_text
from collm.collaboration import CoLLM
from collm.core.params import SamplingParams
from collm.core.policies import Policy, ThresholdPolicy
from collm.core.types import Completion, deferral_rate
from collm.engine.candidates import Candidates
from collm.errors import CollmError, DataError, ToolFailure
from collm.evaluation.answers import Answer, AnswerFile, BatchCost, answer_path, read_answers
from collm.evaluation.gold import confusion, gold_examples, gold_views, reliability
from collm.evaluation.results import SystemResult, result_of, verdict
from collm.evaluation.systems import COLLABORATION, System, short_names
from collm.evaluation.tasks.task import Task, TaskItem
from collm.models.members import as_member, spec_of
from collm.text.chats import Chat
from collm.text.template import Prompt
from collm.training.data import Row
from collm.training.scoring import OnProgress
from collm.untrusted import contained, read_text

NUM_EXAMPLES = 12  # answers of a kind in a report, at most
MAX_BYTES = 1 << 30  # of a file of an evaluation, at most

Asked = tuple[TaskItem, SamplingParams]


@dataclass(frozen=True)
class Evaluation:
    """The items of a task, each with its own id, and how systems answer them.

    Attributes:
        task: renders and scores the items, and defines where answers end.
        params: sampling parameters. max_tokens and stop are those of the task. Greedy by default.
        chat: send items as chat messages of the user, for a collaboration trained on chats.
        max_batch: maximum number of prompts decoded at once.
        seed: with sampling, item i has seed + i, also after a resume.
    """

    task: Task
    items: Sequence[TaskItem]
    params: SamplingParams = field(default_factory=SamplingParams)
    chat: bool = False
    max_batch: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.items:
            raise DataError("the task has no items; expected at least one")
        seen: dict[str, str] = {}
        for item in self.items:
            if item.id in seen:
                raise DataError(f"{item.where} and {seen[item.id]} have the same id {item.id!r}; give each its own")
            seen[item.id] = item.where

    def check(self, system: System) -> None:
        """Check that the collaboration can decode as a system does. Systems that load other models are left out."""
        if system.called:
            return
        model, policy = system.load(), system.at_rate(rate=0.5)
        engine = model.engine(self.max_batch)
        engine.add(model.request(self.prompt(self.items[0], model), self._sampling(model, policy)[0], policy))
        engine.close()

    def answers(self, system: System, out: Path, *, rate: float, report: OnProgress) -> tuple[AnswerFile, CoLLM]:
        """The answers of a system to all items, and its model. Answers that are already in the file are reused."""
        model, policy = system.load(), system.at_rate(rate)
        params = self._sampling(model, policy)
        content = [[item.id, item.prompt, item.reference, item.shots] for item in self.items]
        identity = {
            "system": f"{system.name}: {policy}",
            "models": _digest(model),
            "task": self.task.name,
            "measure": self.task.measure,
            "items": hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest(),
            "chat": self.chat,
            **asdict(params[0]),
            "seed": self.seed,
        }
        file = AnswerFile(answer_path(out, system.name), identity)
        left = [pair for pair in zip(self.items, params, strict=True) if pair[0].id not in file.answers]
        for start in range(0, len(left), self.max_batch):
            self._batch(left[start : start + self.max_batch], system, model, policy, file)
            report(len(file.answers), len(self.items))
        return file, model

    def prompt(self, item: TaskItem, model: CoLLM) -> Prompt:
        return self.task.render(item, model.template, model.tokenizer, chat=self.chat)

    def solutions(self) -> list[Row]:
        """The items that have solutions, as rows of training data."""
        rows = [item.solution for item in self.items if item.solution is not None]
        for at, row in enumerate(rows):
            if self.chat and isinstance(row.prompt, str):
                question = Chat([{"role": "user", "content": row.prompt}])
                chat = Chat([*question, {"role": "assistant", "content": row.completion}])
                rows[at] = replace(row, prompt=question, messages=chat)
        return rows

    def _sampling(self, model: CoLLM, policy: Policy) -> list[SamplingParams]:
        stop = self.task.stop_for(self.items[0], model.template, chat=self.chat)
        params = replace(self.params, max_tokens=self.task.max_tokens, stop=stop, seed=None)
        if not policy.draws and params.temperature == 0:
            return [params] * len(self.items)
        return [replace(params, seed=self.seed + place) for place in range(len(self.items))]

    def _batch(self, batch: Sequence[Asked], system: System, model: CoLLM, policy: Policy, file: AnswerFile) -> None:
        items, params = zip(*batch, strict=True)
        prompts = [self.prompt(item, model) for item in items]
        failed = {runner.name: runner.usage.failed for runner in model.runners}
        started = time.perf_counter()

        def keep(index: int, completion: Completion) -> None:
            item, seconds = items[index], time.perf_counter() - started
            for runner in model.runners:
                if times := runner.usage.failed - failed[runner.name]:
                    raise ToolFailure(
                        f"{runner.name} failed {times} times while answering {item.where} (see the log), so the "
                        "answer is not scored; fix it and run the same command again"
                    )
            authors = [author or system.writes_as for author in completion.authors]
            probs = [round(prob, 6) for prob in completion.defer_probs]
            tokens = completion.token_ids, completion.token_texts, authors, probs
            scores, rejected = dict(self.task.score(item, completion.text)), len(completion.rejected)
            file.add(Answer(item.id, *tokens, completion.finish_reason, scores, round(seconds, 4), rejected))

        done = model.generate(prompts, params, policy=policy, max_batch=self.max_batch, on_completion=keep)
        seconds = round(time.perf_counter() - started, 4)
        usage = {name: vars(used) for name, used in done.usage.items()}
        file.add_batch(BatchCost([item.id for item in items], usage, seconds))


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
        candidates: the most probable tokens of each author for some of the collaboration's answers, by item.
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
    candidates: dict[str, list[list[Candidates]]] = field(default_factory=dict)

    @property
    def shown(self) -> list[SystemResult]:
        """The results that tables show: all but those of other thresholds."""
        return [result for result in self.results if not result.is_threshold]

    @property
    def verdict(self) -> str:
        return verdict(self.task, self.measure, self.results)

    @classmethod
    def read(cls, directory: Path) -> Comparison:
        """Read what `compare` wrote. A damaged file raises one of `errors.DAMAGED`, or an ArtefactError."""
        contained(directory)
        content, listed, candidates = (
            json.loads(read_text(directory / f"{name}.json", MAX_BYTES)) for name in ("results", "items", "candidates")
        )
        del content["verdict"]
        count, items = content.pop("num_items"), [TaskItem(**item, where="") for item in listed]
        results = [SystemResult.from_dict(row) for row in content.pop("rows")]
        answers = {}
        for name in [result.name for result in results]:
            found = read_answers(directory, name)
            if found.keys() != {item.id for item in items} or len(items) != count:
                raise ValueError(f"{len(found)} answers of {name} to {len(items)} of {count} items")
            answers[name] = [found[item.id] for item in items]
        return cls(**content, items=items, results=results, answers=answers, candidates=candidates)

    def to_dict(self) -> dict[str, Any]:
        """Everything except the items and their answers, for JSON."""
        apart = ("items", "results", "answers", "candidates")
        return {
            **{name: value for name, value in vars(self).items() if name not in apart},
            "num_items": len(self.items),
            "rows": [asdict(result) for result in self.results],
            "verdict": self.verdict,
        }

    def shortened(self) -> Comparison:
        """The same, with only the last part of a path in a system's name, if that is unique."""
        short = short_names([result.name for result in self.results])
        return replace(
            self,
            results=[replace(result, name=short[result.name]) for result in self.results],
            answers={short[name]: found for name, found in self.answers.items()},
        )

    def examples(self) -> tuple[list[Answer], list[Answer]]:
        """The answers that a report shows: the first ones, and the first with assistant tokens that are worse than
        those of the base alone.
        """
        own, measure = self.answers[COLLABORATION], self.measure or ""
        pairs = zip(own, self.answers.get("base", []), strict=False)
        less = [one for one, base in pairs if one.scores.get(measure, math.inf) < base.scores.get(measure, 0.0)]
        return own[:NUM_EXAMPLES], [one for one in less if deferral_rate(one.authors) > 0][:NUM_EXAMPLES]


def compare(
    systems: Sequence[System],
    evaluation: Evaluation,
    out: Path,
    *,
    settings: Mapping[str, Any] | None = None,
    on_answer: OnProgress = lambda done, total: None,
) -> Comparison:
    """Let every system answer every item.

    Each answer is written to `out`/answers/NAME.jsonl immediately, so an interrupted evaluation can resume. The results
    are in `out`/results.json, what the report needs in items.json and candidates.json, and the input of an external
    judge in outputs/NAME.json. What only the report shows comes last; if it fails, it is left out with the reason.

    Args:
        systems: the collaboration first, as from `systems_named`.
        settings: stored with the results.
        on_answer: called with (answers done, answers of all systems).

    Raises:
        ConfigError: `out` holds another evaluation or is in use, or the collaboration cannot decode as a system does.
        ArtefactError: a link in `out` leads out.
        ModelFailure, ToolFailure: a model failed. The item is not scored as wrong, and earlier answers are kept.
    """
    for system in systems:
        evaluation.check(system)
    task, items = evaluation.task, evaluation.items
    answers, results = _answered(systems, evaluation, out, on_answer)
    model, threshold = systems[0].load(), cast(ThresholdPolicy, systems[0].policy).threshold
    used = {
        **(settings or {}),
        "temperature": evaluation.params.temperature,
        **{name: getattr(evaluation, name) for name in ("seed", "chat", "max_batch")},
        "versions": library_versions(),
    }
    about = task.name, task.main_measure(items), items
    found = Comparison(*about, results, answers, model.author_names, threshold, used)
    shown = ("id", "prompt", "reference", "kind")
    _write(out / "items.json", [{name: getattr(item, name) for name in shown} for item in items])
    _write(out / "results.json", found.to_dict())
    try:
        found = replace(found, tokens=_tokens(model, evaluation.solutions(), threshold))
    except CollmError as error:
        found.left_out["token measures"] = str(error)
    _add_candidates(model, evaluation, found)
    _write(out / "candidates.json", found.candidates)
    _write(out / "results.json", found.to_dict())
    return found


def _answered(
    systems: Sequence[System], evaluation: Evaluation, out: Path, report: OnProgress
) -> tuple[dict[str, list[Answer]], list[SystemResult]]:
    task, items = evaluation.task, evaluation.items
    answers: dict[str, list[Answer]] = {}
    results: list[SystemResult] = []
    with sole_writer(contained(out)):
        for number, system in enumerate(systems):

            def of_all(done: int, total: int, before: int = number * len(items)) -> None:
                report(before + done, len(systems) * len(items))

            authors = [author for answer in answers.get(COLLABORATION, ()) for author in answer.authors]
            file, model = evaluation.answers(system, out, rate=deferral_rate(authors), report=of_all)
            answers[system.name] = [file.answers[item.id] for item in items]
            results.append(result_of(system, model, task, items, answers, file))
            outputs = task.outputs(items, [answer.text for answer in answers[system.name]], system.name)
            if outputs is not None:
                _write(out / "outputs" / f"{answer_path(out, system.name).stem}.json", outputs)
    return answers, results


def _write(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _tokens(model: CoLLM, solutions: Sequence[Row], threshold: float) -> dict[str, Any] | None:
    """Token-level measures on solutions (None if not finite), reliability of the defer prob, and who writes what."""
    if not solutions:
        return None
    views = gold_views(model, gold_examples(model, solutions))
    return {
        "num_tokens": len(views.base_logprob),
        "measures": {name: value if math.isfinite(value) else None for name, value in views.measures().items()},
        "reliability": reliability(views),
        "confusion": confusion(views, threshold).tolist(),
    }


def _add_candidates(model: CoLLM, evaluation: Evaluation, found: Comparison) -> None:
    """Add the candidates of the answers that a report shows. Where there are none, `left_out` gets the reason."""
    by_id = {item.id: item for item in found.items}
    for answer in {answer.id: answer for answers in found.examples() for answer in answers}.values():
        try:
            prompt = evaluation.prompt(by_id[answer.id], model)
            found.candidates[answer.id] = model.candidates(prompt, answer.token_ids)
        except CollmError as error:
            found.left_out[f"candidates of item {answer.id}"] = str(error)


def _digest(model: CoLLM) -> str:
    sources = [str(spec_of(as_member(one))) for one in (model.base, *model.assistants)]
    digest = hashlib.sha256(json.dumps(sources).encode())
    for tensor in model.head.state_dict().values():
        digest.update(tensor.cpu().float().numpy().tobytes())
    return digest.hexdigest()
