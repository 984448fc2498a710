"""The interface of evaluation tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from collm.core.sampling import seeded
from collm.errors import ConfigError, DataError
from collm.evaluation.intervals import Interval, bootstrap_interval
from collm.text.chats import Chat
from collm.text.template import Prompt, PromptTemplate
from collm.training.data import Row, load_rows

Shot = tuple[str, str]  # a question and its answer

_T = TypeVar("_T")


@dataclass(frozen=True)
class TaskItem:
    """One item of a task.

    Attributes:
        id: the data set's id, or the number in the split, from 1.
        prompt: the question as in training data: text, or the messages of a chat.
        reference: the reference answer, as JSON.
        where: file and line, for error messages.
        solution: the question with a complete answer, as a row of training data; None if there is no such answer.
        shots: few-shot examples before the question.
        kind: the kind of prompt, as the row says; empty if it does not.
    """

    id: str
    prompt: str | Chat
    reference: Any
    where: str
    solution: Row | None = None
    shots: tuple[Shot, ...] = ()
    kind: str = ""


Scored = tuple[TaskItem, str, Mapping[str, float]]
"""An item, the text generated for it, and its scores."""


class Task(ABC):
    """A data set with the end of its answers and their scores.

    Attributes:
        name: its name for `task_named`.
        max_tokens, stop: maximum number of tokens of an answer, and strings that end it.
        source: the published data set on the Hub; None if there is no default.
        split: the default split, unless the source is a file or a table without splits.
        format: format of the training data for few-shot examples; None if the task has none.
    """

    name: str
    max_tokens: int
    stop: tuple[str, ...] = ()
    source: str | None = None
    split: str = "test"
    format: str | None

    @property
    @abstractmethod
    def measure(self) -> str | None:
        """The main measure; None if the task has none."""

    def main_measure(self, items: Sequence[TaskItem]) -> str | None:
        """The main measure of these items."""
        return self.measure

    def outputs(self, items: Sequence[TaskItem], texts: Sequence[str], system: str) -> list[dict[str, Any]] | None:
        """A system's answers in the format of an external judge; None for a task without one."""
        return None

    def read(self, source: str | Path, split: str | None) -> list[TaskItem]:
        """All items of a split, without few-shot examples. By default the rows of training data, numbered."""
        rows = self.rows(source, split)
        return [
            TaskItem(str(n), row.prompt, self.reference(row), row.where, row, kind=row.kind)
            for n, row in enumerate(rows, 1)
        ]

    def reference(self, row: Row) -> Any:
        """The reference answer of a row of training data."""
        return row.completion

    def rows(self, source: str | Path, split: str | None) -> list[Row]:
        """Rows of training data of a split, for few-shot examples. The task must have a format."""
        assert self.format is not None
        return load_rows(source, split=split, format=self.format)

    @abstractmethod
    def score(self, item: TaskItem, text: str) -> dict[str, float]:
        """The measures, in [0, 1], of a text generated for the item. Measures that do not apply are left out."""

    def load(
        self,
        source: str | Path | None = None,
        *,
        split: str | None = None,
        limit: int | None = None,
        shots: int = 0,
        shots_source: str | Path | None = None,
        seed: int | None = 0,
    ) -> list[TaskItem]:
        """Load the items.

        Args:
            source: as for `collm.training.data.load_rows`. By default the task's source.
            split: by default the task's split. A file has no splits.
            limit: take a random sample of this size, in the original order.
            shots: number of few-shot examples before each item, the same for all items.
            shots_source: the source of the few-shot examples. By default the train split of `source`.
            seed: seed of both samples; None takes the first rows.
        """
        source = source or self.source
        if source is None:
            raise ConfigError(f"task {self.name!r} has no default data; give a file or a Hub data set")
        if limit is not None and limit < 1:
            raise ConfigError(f"limit is {limit}, expected at least 1 item, or no limit")
        items = self.read(source, split or _default_split(source, self.split))
        items = items if limit is None else _draw(items, min(limit, len(items)), seed)
        if shots == 0:
            return items
        if self.format is None:
            raise ConfigError(f"task {self.name!r} has no few-shot examples; leave shots out")
        if shots < 0:
            raise ConfigError(f"shots is {shots}, expected at least 0")
        if shots_source is None and _default_split(source, "train") is None:
            raise ConfigError(f"{source} has no train split for few-shot examples; give a source for them")
        taken = self._shots(shots_source or source, shots, seed, items)
        return [replace(item, shots=taken) for item in items]

    def aggregate(self, scored: Sequence[Scored]) -> dict[str, Interval]:
        """The mean of each measure over the items with that measure."""
        found = [scores for _, _, scores in scored]
        measures = dict.fromkeys(measure for scores in found for measure in scores)
        return {one: bootstrap_interval([scores[one] for scores in found if one in scores]) for one in measures}

    def render(
        self, item: TaskItem, template: PromptTemplate, tokenizer: PreTrainedTokenizerBase, *, chat: bool = False
    ) -> Prompt:
        """Render the prompt of an item.

        Without few-shot examples it is the item's prompt; with them, token ids of the questions in the template, each
        with its answer and a blank line. With `chat`, they are earlier turns.
        """
        if chat and isinstance(item.prompt, str):
            texts = [text for shot in item.shots for text in shot] + [item.prompt]
            return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
        if not item.shots:
            return item.prompt
        assert isinstance(item.prompt, str), "few-shot examples need plain prompts"
        shown = [(question, answer + "\n\n") for question, answer in item.shots] + [(item.prompt, "")]
        text = "".join(template.text.replace("{prompt}", question) + answer for question, answer in shown)
        return PromptTemplate().encode_prompt(tokenizer, text)

    def stop_for(self, item: TaskItem, template: PromptTemplate, *, chat: bool = False) -> tuple[str, ...]:
        """Strings that end the answer to this item. After few-shot examples also the beginning of another one."""
        if chat or not item.shots:
            return self.stop
        return (*self.stop, "\n\n" + template.text.partition("{prompt}")[0].rstrip())

    def _shots(self, source: str | Path, count: int, seed: int | None, items: Sequence[TaskItem]) -> tuple[Shot, ...]:
        if chats := [item.where for item in items if not isinstance(item.prompt, str)]:
            raise ConfigError(f"few-shot examples need plain prompts, but {chats[0]} is a chat; leave shots out")
        rows, taken = self.rows(source, _default_split(source, "train")), {item.prompt for item in items}
        plain = [(row.prompt, row.completion) for row in rows if isinstance(row.prompt, str)]
        free = [shot for shot in plain if shot[0] not in taken]
        if len(free) < count:
            raise DataError(
                f"{source} has {len(free)} plain rows that are no items, expected at least {count} few-shot examples"
            )
        return tuple(_draw(free, count, seed))


def _default_split(source: str | Path, split: str) -> str | None:
    path = Path(source)
    return None if path.is_file() or (path / "state.json").exists() else split


def _draw(values: Sequence[_T], count: int, seed: int | None) -> list[_T]:
    """A random sample in the original order. Without a seed, the first values."""
    drawn = range(count) if seed is None else sorted(seeded(seed).sample(range(len(values)), count))
    return [values[place] for place in drawn]
