"""Let systems answer the items of a task, batch by batch. Each answer is stored immediately."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from collm.collaboration import CoLLM
from collm.core.params import SamplingParams
from collm.core.policies import Policy
from collm.core.types import Completion
from collm.errors import ToolFailure
from collm.evaluation.answers import Answer, AnswerFile, Answers, answer_path
from collm.evaluation.systems import System
from collm.evaluation.tasks.task import Task, TaskItem
from collm.models.members import as_member, spec_of
from collm.text.chats import Chat
from collm.text.template import Prompt
from collm.training.data import Row

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Generation:
    """The items and settings that all systems share.

    Attributes:
        params: sampling parameters. max_new_tokens and stop are those of the task.
        chat: send items as chat messages of the user.
        seed: with sampling, item i has seed + i, also after a resume.
    """

    task: Task
    items: Sequence[TaskItem]
    params: SamplingParams
    chat: bool
    max_batch: int
    seed: int

    def check(self, system: System) -> None:
        """Check that the collaboration can decode as a system does, before anything is answered.

        A system of other models is left out, because it loads them.

        Raises:
            ConfigError, RequestError: it cannot follow the policy or the parameters, or read the first prompt.
        """
        if system.called:
            return
        model, policy = system.load(), system.at_rate(rate=0.5)
        engine = model.engine(self.max_batch)
        params = self._drawing(self._params_for(model), policy, 0)
        engine.add(model.request(self.prompt(self.items[0], model), params, policy))
        engine.close()

    def _params_for(self, model: CoLLM) -> SamplingParams:
        stop = self.task.stop_for(self.items[0], model.template, chat=self.chat)
        return replace(self.params, max_new_tokens=self.task.max_new_tokens, stop=stop)

    def _drawing(self, params: SamplingParams, policy: Policy, place: int) -> SamplingParams:
        draws = policy.draws or params.temperature > 0
        return replace(params, seed=self.seed + place if draws else None)

    def answers(self, system: System, out: Path, *, rate: float, report: OnProgress | None) -> tuple[Answers, CoLLM]:
        """All answers of a system, and its model. Answers that are already in a file are reused.

        Raises:
            ConfigError: a file holds the answers of another evaluation.
            ModelFailure: a model raised or returned NaN.
            ToolFailure: a tool raised, hung or returned no text, or a server did not respond. The current answer is
                not stored.
        """
        model, policy = system.load(), system.at_rate(rate)
        params = self._params_for(model)
        identity = {
            "system": f"{system.name}: {policy}",
            "models": _digest(model),
            "task": self.task.name,
            "measure": self.task.measure,
            "items": _fingerprint(self.items),
            "chat": self.chat,
            **asdict(params),
            "seed": self.seed,
        }
        drawing = {item.id: self._drawing(params, policy, place) for place, item in enumerate(self.items)}
        file = AnswerFile(answer_path(out, system.name), identity)
        left = [item for item in self.items if item.id not in file.answers.items]
        for start in range(0, len(left), self.max_batch):
            self._batch(left[start : start + self.max_batch], system, model, policy, drawing, file)
            if report is not None:
                report(len(file.answers.items), len(self.items))
        return file.answers, model

    def prompt(self, item: TaskItem, model: CoLLM) -> Prompt:
        """The prompt of an item."""
        return self.task.render(item, model.template, model.tokenizer, chat=self.chat)

    def solutions(self) -> list[Row]:
        """The items that have solutions, as rows of training data."""
        rows = [item.solution for item in self.items if item.solution is not None]
        return [_as_chat(row) if self.chat and row.messages is None else row for row in rows]

    def _batch(
        self,
        batch: Sequence[TaskItem],
        system: System,
        model: CoLLM,
        policy: Policy,
        drawing: Mapping[str, SamplingParams],
        file: AnswerFile,
    ) -> None:
        prompts = [self.prompt(item, model) for item in batch]
        started, failures = time.perf_counter(), _failures(model)

        def keep(index: int, completion: Completion) -> None:
            item, seconds = batch[index], time.perf_counter() - started
            for name, before in failures.items():
                if times := _failures(model)[name] - before:
                    raise ToolFailure(
                        f"{name} failed {times} times while answering {item.where} (see the log), so the answer is "
                        "not scored; fix it and run the same command again"
                    )
            answer = Answer.of(item.id, completion, self.task.score(item, completion.text), seconds)
            file.add(replace(answer, authors=[author or system.writes_as for author in answer.authors]))

        params = [drawing[item.id] for item in batch]
        done = model.generate(prompts, params, policy=policy, max_batch=self.max_batch, on_completion=keep)
        file.close_batch([item.id for item in batch], done.usage, started)


def _failures(model: CoLLM) -> dict[str, int]:
    """How often each model failed and the base wrote instead."""
    return {runner.name: runner.usage.failed for runner in model.runners}


def _as_chat(row: Row) -> Row:
    assert isinstance(row.prompt, str)
    asked = Chat([{"role": "user", "content": row.prompt}])
    chat = Chat([*asked, {"role": "assistant", "content": row.completion}])
    return Row(asked, row.completion, chat, row.where)


def _fingerprint(items: Sequence[TaskItem]) -> str:
    content = [[item.id, item.prompt, item.reference, item.shots] for item in items]
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()


def _digest(model: CoLLM) -> str:
    """A hash of the head and of the sources of the models."""
    digest = hashlib.sha256(
        json.dumps([str(spec_of(as_member(member))) for member in (model.base, *model.assistants)]).encode()
    )
    for tensor in model.head.state_dict().values():
        digest.update(tensor.cpu().float().numpy().tobytes())
    return digest.hexdigest()
