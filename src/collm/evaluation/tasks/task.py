"""Task: the seam between a data set and an evaluation."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from collm.errors import ConfigError, DataError
from collm.evaluation.intervals import Interval, bootstrap_interval
from collm.models.chats import Chat, Message
from collm.models.template import Prompt, PromptTemplate
from collm.training.data import Row, load_rows

Shot = tuple[str, str]
"""A question and its answer, shown before the question that is asked."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class TaskItem:
    """One question.

    Attributes:
        id: what its publishers call it, else its number in the split, from 1.
        prompt: the question as training data has it: text, or the messages of a chat.
        reference: what is right, as JSON.
        where: file and line, for messages about this item.
        solution: the question with a whole answer, as training data has them; None where there is no such answer.
        shots: shown before it.
    """

    id: str
    prompt: str | Chat
    reference: Any
    where: str
    solution: Row | None = None
    shots: tuple[Shot, ...] = ()


Scored = tuple[TaskItem, str, Mapping[str, float]]
"""An item, the text generated for it, and its scores."""


class Task(ABC):
    """What is asked, when an answer ends, and how it is scored.

    Attributes:
        name: what `task_named` calls it.
        max_new_tokens: most tokens an answer may take.
        stop: strings that end an answer.
        source: where its publishers keep the data on the Hub; None if it must be named.
        split: read by default, unless the source is a file or a table without splits.
        format: of the training data from which shots are taken; None if there is none to take.
    """

    name: str
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    source: str | None = None
    split: str = "test"
    format: str | None

    @property
    @abstractmethod
    def measure(self) -> str | None:
        """The main one of its measures; None if it has none."""

    def main_measure(self, items: Sequence[TaskItem]) -> str | None:
        """The main measure of these items, where it depends on them."""
        return self.measure

    def outputs(self, items: Sequence[TaskItem], texts: Sequence[str], system: str) -> list[dict[str, Any]] | None:
        """A system's answers to the items as a judge outside reads them; None of a task without one."""
        return None

    @abstractmethod
    def read(self, source: str | Path, split: str | None) -> list[TaskItem]:
        """All items of a split, without shots."""

    def rows(self, source: str | Path, split: str | None) -> list[Row]:
        """Rows of a split as training reads them, of a task with a format; shots are taken from them."""
        assert self.format is not None
        return load_rows(source, split=split, format=self.format)

    @abstractmethod
    def score(self, item: TaskItem, text: str) -> dict[str, float]:
        """Measures in [0, 1] of a text generated for the item; without those that do not apply to it."""

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
        """The items to ask.

        Args:
            source: a file, a directory or a Hub name, as `collm.training.data.load_rows` takes them; by default the
                task's.
            split: by default the task's; a file has none.
            limit: ask so many, drawn at random and kept in order.
            shots: show so many answered questions before each item, the same for all.
            shots_source: where they come from: by default the train split of `source`, which must have splits then.
            seed: of both draws; None takes the first ones.

        Raises:
            DataError: nothing usable at a source, a malformed row (its file and line, and what is wrong), or too few
                rows for the shots.
            ConfigError: limit or shots out of range, shots where there is nothing to take them from, or no source.
        """
        source = source or self.source
        if source is None:
            raise ConfigError(f"nothing says where the data of task {self.name!r} is; name a file or a Hub data set")
        if limit is not None and limit < 1:
            raise ConfigError(f"limit is {limit}, expected at least 1 item, or none to take all")
        items = self.read(source, split or _default_split(source, self.split))
        if limit is not None:
            items = _draw(items, min(limit, len(items)), seed)
        if shots == 0:
            return items
        if self.format is None:
            raise ConfigError(f"task {self.name!r} has no answered questions to show; leave shots out")
        taken = self._shots(_shots_source(source, shots_source), shots, seed, items)
        return [replace(item, shots=taken) for item in items]

    def aggregate(self, scored: Sequence[Scored]) -> dict[str, Interval]:
        """The mean of each measure over the items that have it."""
        measures = dict.fromkeys(measure for _, _, scores in scored for measure in scores)
        return {measure: bootstrap_interval(scores_of(scored, measure)) for measure in measures}

    def render(
        self, item: TaskItem, template: PromptTemplate, tokenizer: PreTrainedTokenizerBase, *, chat: bool = False
    ) -> Prompt:
        """What to generate from: the artefact's template renders it as training rendered such rows.

        Without shots the prompt itself. With shots each question is wrapped by the template as in training, its answer
        and a blank line behind it; the whole is then token ids.

        Args:
            chat: ask as the user of a chat, shots being earlier turns: for a collaboration trained on chats.

        Raises:
            RequestError: the prompt is empty.
        """
        if chat and isinstance(item.prompt, str):
            return [message for shot in item.shots for message in _turns(*shot)] + _turns(item.prompt)
        if not item.shots:
            return item.prompt
        shown = [template.text.replace("{prompt}", question) + answer + "\n\n" for question, answer in item.shots]
        assert isinstance(item.prompt, str), "shots stand before plain prompts only"
        asked = template.text.replace("{prompt}", item.prompt)
        return PromptTemplate().encode_prompt(tokenizer, "".join(shown) + asked)

    def stop_for(self, item: TaskItem, template: PromptTemplate, *, chat: bool = False) -> tuple[str, ...]:
        """Strings that end the answer to this item: after shots also what would begin another one."""
        if chat or not item.shots:
            return self.stop
        return (*self.stop, "\n\n" + template.text.partition("{prompt}")[0].rstrip())

    def _shots(self, source: str | Path, count: int, seed: int | None, items: Sequence[TaskItem]) -> tuple[Shot, ...]:
        if count < 0:
            raise ConfigError(f"shots is {count}, expected at least 0")
        chat = next((item.where for item in items if not isinstance(item.prompt, str)), None)
        if chat is not None:
            raise ConfigError(f"shots are shown before plain prompts, but {chat} is a chat; leave shots out")
        asked = {item.prompt for item in items if isinstance(item.prompt, str)}
        rows = self.rows(source, _default_split(source, "train"))
        free = [(row.prompt, row.completion) for row in rows if isinstance(row.prompt, str) and row.prompt not in asked]
        if len(free) < count:
            raise DataError(
                f"{source} has {len(free)} plain rows that are not asked themselves, expected at least {count} to show"
            )
        return tuple(_draw(free, count, seed))


def scores_of(scored: Sequence[Scored], measure: str) -> list[float]:
    """The scores of the items that have this measure."""
    return [scores[measure] for _, _, scores in scored if measure in scores]


def _default_split(source: str | Path, split: str) -> str | None:
    path = Path(source)
    return None if path.is_file() or (path / "state.json").exists() else split


def _shots_source(source: str | Path, shots_source: str | Path | None) -> str | Path:
    if shots_source is not None:
        return shots_source
    if _default_split(source, "train") is None:
        raise ConfigError(f"{source} has no train split to take shots from; name a source of them")
    return source


def _draw(values: Sequence[_T], count: int, seed: int | None) -> list[_T]:
    """So many of them in their order, or the first ones without a seed."""
    if seed is None:
        return list(values[:count])
    return [values[place] for place in sorted(random.Random(seed).sample(range(len(values)), count))]


def _turns(question: str, answer: str | None = None) -> list[Message]:
    turns: list[Message] = [{"role": "user", "content": question}]
    return turns if answer is None else [*turns, {"role": "assistant", "content": answer}]
