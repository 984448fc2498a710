"""The answers of a system, in a file from which an interrupted evaluation resumes."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from collm.atomic import write_error
from collm.core.types import Completion, FinishReason, ModelUsage
from collm.errors import DAMAGED, ArtefactError, ConfigError


@dataclass(frozen=True)
class Answer:
    """The answer to one item.

    Attributes:
        id: the item's id.
        token_ids, token_texts, authors, defer_probs: one entry per token.
        scores: the measures of this answer.
        seconds: from the start of its batch to its last token.
    """

    id: str
    token_ids: list[int]
    token_texts: list[str]
    authors: list[int]
    defer_probs: list[float]
    finish_reason: FinishReason
    scores: dict[str, float]
    seconds: float

    @property
    def text(self) -> str:
        return "".join(self.token_texts)

    @classmethod
    def of(cls, item_id: str, completion: Completion, scores: Mapping[str, float], seconds: float) -> Answer:
        return cls(
            item_id,
            completion.token_ids,
            completion.token_texts,
            completion.authors,
            [round(prob, 6) for prob in completion.defer_probs],
            completion.finish_reason,
            dict(scores),
            round(seconds, 4),
        )


@dataclass(frozen=True)
class BatchCost:
    """The cost of one batch.

    Attributes:
        usage: the usage of each model.
        seconds: time for the whole batch.
    """

    ids: list[str]
    usage: dict[str, ModelUsage]
    seconds: float


@dataclass
class Answers:
    """All answers of a system in order, and their costs."""

    items: dict[str, Answer] = field(default_factory=dict)
    batches: list[BatchCost] = field(default_factory=list)


def answer_path(directory: Path, system: str) -> Path:
    """The file of a system's answers. Unsafe characters of its name are replaced, and a hash is added then."""
    plain = "".join(letter if letter.isalnum() or letter in "-.=" else "_" for letter in system)
    name = plain if plain == system else f"{plain}-{hashlib.sha256(system.encode()).hexdigest()[:8]}"
    return directory / "answers" / f"{name}.jsonl"


def read_answers(directory: Path, system: str) -> dict[str, Answer]:
    """The answers of one system, by item.

    Raises:
        ArtefactError: they are missing or damaged.
    """
    path = answer_path(directory, system)
    if not path.exists():
        raise ArtefactError(f"there is no {path}; run the same 'collm eval' again")
    return _read(path, {})[0].items


class AnswerFile:
    """The writer of a JSONL file: the identity of the evaluation, then a line for each answer and each batch.

    Args:
        path: created if it does not exist.
        identity: all settings that the answers depend on.

    Raises:
        ConfigError: the file holds the answers of another evaluation.
        ArtefactError: a line is damaged.
        WriteError: the file cannot be written.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        identity = json.loads(json.dumps(identity))
        self.answers, whole = _read(path, identity) if path.exists() else (Answers(), 0)
        self._write(lambda stream: stream.truncate(whole))  # the last line may be cut
        if not whole:
            self._append({"identity": identity})

    def add(self, answer: Answer) -> None:
        self.answers.items[answer.id] = answer
        self._append({"answer": asdict(answer)})

    def close_batch(self, ids: Sequence[str], usage: Mapping[str, ModelUsage], started: float) -> None:
        """Store the cost of a batch that began at `started` (`time.perf_counter`)."""
        batch = BatchCost(list(ids), dict(usage), round(time.perf_counter() - started, 4))
        self.answers.batches.append(batch)
        self._append({"batch": asdict(batch)})

    def _append(self, record: Mapping[str, Any]) -> None:
        line = json.dumps(record, ensure_ascii=False) + "\n"
        self._write(lambda stream: stream.write(line.encode()))

    def _write(self, change: Callable[[BinaryIO], object]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab", opener=_not_through_a_link) as stream:
                change(stream)
        except OSError as error:
            raise write_error(self.path, error) from error


def _not_through_a_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _read(path: Path, identity: Mapping[str, Any]) -> tuple[Answers, int]:
    """Read the whole lines of a file, as a kill may have cut the last one. Also return their number of bytes."""
    answers = Answers()
    lines = path.read_bytes().split(b"\n")[:-1]
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if "identity" in record:
                _check(path, record["identity"], identity)
            elif "answer" in record:
                answer = Answer(**record["answer"])
                answers.items[answer.id] = answer
            else:
                content = record["batch"]
                usage = {name: ModelUsage(**used) for name, used in content["usage"].items()}
                answers.batches.append(BatchCost(content["ids"], usage, content["seconds"]))
        except DAMAGED as error:
            raise ArtefactError(f"{path}, line {number} is damaged ({error}); delete the file") from error
    return answers, sum(len(line) + 1 for line in lines)


def _check(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name, value in now.items():
        if before.get(name) != value:
            hashed = name in ("items", "models")
            held = f"of other {name}" if hashed else f"with {name}={before.get(name)!r}, now it is {value!r}"
            raise ConfigError(f"{path} holds answers {held}; choose another --out, or give the same options to go on")
