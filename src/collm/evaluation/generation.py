"""Let systems answer the items of a task, batch by batch. Each answer is stored immediately."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from collm.collaboration import CoLLM
from collm.core.params import SamplingParams
from collm.core.policies import Policy
from collm.core.types import Completion
from collm.errors import DataError, ToolFailure
from collm.evaluation.answers import Answer, AnswerFile, BatchCost, answer_path
from collm.evaluation.systems import System
from collm.evaluation.tasks.task import Task, TaskItem
from collm.models.members import spec_of
from collm.text.chats import Chat
from collm.text.template import Prompt
from collm.training.data import Row

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """The items of a task, and how systems answer them.

    Attributes:
        task: renders and scores the items, and defines where answers end.
        params: sampling parameters. max_new_tokens and stop are those of the task. Greedy by default.
        chat: send items as chat messages of the user, for a collaboration trained on chats.
        max_batch: maximum number of prompts decoded at once.
        seed: with sampling, item i has seed + i, also after a resume.

    Raises:
        DataError: no items, or two items with the same id.
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
        """Check that the collaboration can decode as a system does, before anything is answered.

        A system of other models is left out, because it loads them.
        """
        if system.called:
            return
        model, policy = system.load(), system.at_rate(rate=0.5)
        engine = model.engine(self.max_batch)
        engine.add(model.request(self.prompt(self.items[0], model), self._sampling(model, policy)[0], policy))
        engine.close()

    def answers(self, system: System, out: Path, *, rate: float, report: OnProgress | None) -> tuple[AnswerFile, CoLLM]:
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
            if report is not None:
                report(len(file.answers), len(self.items))
        return file, model

    def prompt(self, item: TaskItem, model: CoLLM) -> Prompt:
        """The prompt of an item."""
        return self.task.render(item, model.template, model.tokenizer, chat=self.chat)

    def solutions(self) -> list[Row]:
        """The items that have solutions, as rows of training data."""
        rows = [item.solution for item in self.items if item.solution is not None]
        return [_as_chat(row) if self.chat and row.messages is None else row for row in rows]

    def _sampling(self, model: CoLLM, policy: Policy) -> list[SamplingParams]:
        """The parameters of each item."""
        stop = self.task.stop_for(self.items[0], model.template, chat=self.chat)
        params = replace(self.params, max_new_tokens=self.task.max_new_tokens, stop=stop, seed=None)
        if not policy.draws and params.temperature == 0:
            return [params] * len(self.items)
        return [replace(params, seed=self.seed + place) for place in range(len(self.items))]

    def _batch(
        self,
        batch: Sequence[tuple[TaskItem, SamplingParams]],
        system: System,
        model: CoLLM,
        policy: Policy,
        file: AnswerFile,
    ) -> None:
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
            answer = Answer(
                item.id,
                completion.token_ids,
                completion.token_texts,
                [author or system.writes_as for author in completion.authors],
                [round(prob, 6) for prob in completion.defer_probs],
                completion.finish_reason,
                dict(self.task.score(item, completion.text)),
                round(seconds, 4),
            )
            file.add(answer)

        done = model.generate(prompts, params, policy=policy, max_batch=self.max_batch, on_completion=keep)
        seconds = round(time.perf_counter() - started, 4)
        file.add_batch(BatchCost([item.id for item in items], dict(done.usage), seconds))


def _as_chat(row: Row) -> Row:
    assert isinstance(row.prompt, str)
    question = Chat([{"role": "user", "content": row.prompt}])
    chat = Chat([*question, {"role": "assistant", "content": row.completion}])
    return Row(question, row.completion, chat, row.where)


def _digest(model: CoLLM) -> str:
    """A hash of the head and of the sources of the models."""
    digest = hashlib.sha256(json.dumps([str(spec_of(member)) for member in (model.base, *model.assistants)]).encode())
    for tensor in model.head.state_dict().values():
        digest.update(tensor.cpu().float().numpy().tobytes())
    return digest.hexdigest()
