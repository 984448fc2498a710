"""The answers of a system, in a file from which an interrupted evaluation resumes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from collm.atomic import write_error
from collm.core.types import FinishReason
from collm.errors import DAMAGED, ArtefactError, ConfigError


@dataclass(frozen=True)
class Answer:
    """The answer to the item with this id, its measures, the time from the start of its batch to its last token in
    seconds, and the number of its tokens that a judge put in place of the base's.
    """

    id: str
    token_ids: list[int]
    token_texts: list[str]
    authors: list[int]
    defer_probs: list[float]
    finish_reason: FinishReason
    scores: dict[str, float]
    seconds: float
    rejected: int = 0

    @property
    def text(self) -> str:
        return "".join(self.token_texts)


@dataclass(frozen=True)
class BatchCost:
    """The items of a batch, the `ModelUsage` of each model for all of them, and the time it took."""

    ids: list[str]
    usage: dict[str, dict[str, int]]
    seconds: float


class AnswerFile:
    """A system's answers by item, and the costs of its batches: a JSONL file that grows with each of them.

    A ConfigError if the file holds the answers of another evaluation, an ArtefactError if a line is damaged.

    Args:
        path: read if it exists. A last line that a kill has cut is left out.
        identity: all settings that the answers depend on, the first line of the file. None to read only.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self.answers: dict[str, Answer] = {}
        self.batches: list[BatchCost] = []
        now = json.loads(json.dumps(identity or {}))
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        for number, line in enumerate(lines, start=1):
            try:
                ((kind, record),) = json.loads(line).items()
                if kind == "identity":
                    _check(path, record, now)
                elif kind == "answer":
                    self.answers[record["id"]] = Answer(**record)
                else:
                    self.batches.append(BatchCost(**record))
            except DAMAGED as error:
                raise ArtefactError(f"{path}, line {number} is damaged ({error}); delete the file") from error
        if identity is not None:
            self._write(*([] if lines else [{"identity": now}]), after=sum(len(line) + 1 for line in lines))

    def add(self, answer: Answer) -> None:
        self.answers[answer.id] = answer
        self._write({"answer": asdict(answer)})

    def add_batch(self, batch: BatchCost) -> None:
        self.batches.append(batch)
        self._write({"batch": asdict(batch)})

    def _write(self, *records: Mapping[str, Any], after: int | None = None) -> None:
        """Append records, after the first bytes if their number is given."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            opener = lambda path, flags: os.open(path, flags | os.O_NOFOLLOW, 0o666)  # noqa: E731
            with open(self.path, "ab", opener=opener) as stream:
                if after is not None:
                    stream.truncate(after)
                stream.writelines(json.dumps(one, ensure_ascii=False).encode() + b"\n" for one in records)
        except OSError as error:
            raise write_error(self.path, error) from error


def answer_path(directory: Path, system: str) -> Path:
    """The file of a system's answers. Unsafe characters of its name are replaced, and a hash is added then."""
    plain = "".join(letter if letter.isalnum() or letter in "-.=" else "_" for letter in system)
    name = plain if plain == system else f"{plain}-{hashlib.sha256(system.encode()).hexdigest()[:8]}"
    return directory / "answers" / f"{name}.jsonl"


def read_answers(directory: Path, system: str) -> dict[str, Answer]:
    """The answers of one system, by item."""
    return AnswerFile(answer_path(directory, system)).answers


def _check(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name, value in now.items():
        if before.get(name) != value:
            hashed = name in ("items", "models")
            held = f"of other {name}" if hashed else f"with {name}={before.get(name)!r}, now it is {value!r}"
            raise ConfigError(f"{path} holds answers {held}; choose another --out, or give the same options to resume")
