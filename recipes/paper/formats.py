"""Formats of the paper's data sets.

`MATH`: Hendrycks MATH (fields `problem`, `level`, `type`, `solution`). Splits: train, test.
    Prompt: the problem. Completion: the solution. A directory is read by subject and then by number. All of the Hub's
    configurations, one per subject (EleutherAI/hendrycks_math), are read unless one is named.

`BIOASQ`: BioASQ task B (fields `body`, `type`, `ideal_answer`, `exact_answer`). Splits: train (training11b.json), test
    (11B1_golden.json and its like); a directory holds one edition.
    Prompt: the question (`body`), without snippets, because the assistant supplies the missing knowledge.
    Completion: the first of the ideal answers. Unless the question is a summary, the exact answer follows on its own
    line, with texts stripped of surrounding white space:

        factoid   The final answer is:\\n- name\\n- another name of the same
        list      The final answer is:\\n- first entity\\n- second entity       (the first name of each entity)
        yesno     The final answer is: yes                                    (or no)

    A question without an ideal answer, or without the exact answer that its type requires, is a bad row.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from collm.errors import DataError
from collm.training.formats import Format, text_field

QUESTION_TYPES = ("factoid", "list", "yesno", "summary")
FINAL_ANSWER = "The final answer is:"


class _OneEdition(Format):
    """A format whose directory has the files of one edition: its training data contain earlier test sets."""

    def files_in(self, directory: Path, configuration: str | None, split: str | None) -> list[Path]:
        files = super().files_in(directory, configuration, split)
        names = [path.name for pattern in self.files.values() for path in directory.glob(pattern)]
        editions = {match[0].lower() for name in names if (match := re.search(r"[0-9]+[bB]", name))}
        if len(editions) > 1:
            raise DataError(
                f"{directory} has {len(editions)} editions ({', '.join(sorted(editions))}) of {self.name}, "
                "expected one; pass the directory of an edition or a file"
            )
        return files


def _math(where: str, record: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"prompt": text_field(where, record, "problem"), "completion": text_field(where, record, "solution")}


@dataclass(frozen=True)
class BioasqQuestion:
    """A question of BioASQ task B with its answers.

    Attributes:
        kind: factoid, list, yesno or summary.
        body: the question.
        ideal: equivalent ideal answers, at least one.
        entities: the exact answer: the names of each entity, [["yes"]] or [["no"]], or nothing for a summary.
    """

    kind: str
    body: str
    ideal: list[str]
    entities: list[list[str]]


def bioasq_question(where: str, record: Mapping[str, Any]) -> BioasqQuestion:
    """Read a question in its published form.

    Raises:
        DataError: the type is unknown, or the ideal answer or the exact answer that the type requires is missing.
    """
    kind = record.get("type")
    if kind not in QUESTION_TYPES:
        raise DataError(f"{where}: 'type' is {kind!r:.40}, expected one of {', '.join(QUESTION_TYPES)}")
    body = text_field(where, record, "body").strip()
    ideal = _names(where, "ideal_answer", record.get("ideal_answer"))
    if not ideal:
        raise DataError(f"{where}: no 'ideal_answer', expected a text or a list of texts")
    return BioasqQuestion(kind, body, ideal, [] if kind == "summary" else _entities(where, kind, record))


def _entities(where: str, kind: str, record: Mapping[str, Any]) -> list[list[str]]:
    exact = record.get("exact_answer")
    entities = [_names(where, "exact_answer", entity) for entity in (exact if isinstance(exact, list) else [exact])]
    entities = [names for names in entities if names]
    if not entities:
        raise DataError(f"{where}: no 'exact_answer', expected one for a {kind} question")
    if kind != "yesno":
        return entities
    answers = {name.lower().rstrip(".") for names in entities for name in names}
    if answers not in ({"yes"}, {"no"}):
        raise DataError(f"{where}: 'exact_answer' is {exact!r:.40}, expected yes or no")
    return [[answers.pop()]]


def _bioasq(where: str, record: Mapping[str, Any]) -> Mapping[str, Any]:
    question = bioasq_question(where, record)
    return {"prompt": question.body, "completion": bioasq_completion(question)}


def bioasq_completion(question: BioasqQuestion) -> str:
    """The first ideal answer, followed by "The final answer is:" and the exact answer if there is one."""
    lines = [question.ideal[0]]
    if question.kind == "factoid":
        lines.append(_bullets([name for names in question.entities for name in names]))
    elif question.kind == "list":
        lines.append(_bullets([names[0] for names in question.entities]))
    elif question.kind == "yesno":
        lines.append(f"{FINAL_ANSWER} {question.entities[0][0]}")
    return "\n".join(lines)


def _bullets(names: list[str]) -> str:
    return FINAL_ANSWER + "".join(f"\n- {name}" for name in dict.fromkeys(names))


def _names(where: str, name: str, value: Any) -> list[str]:
    """The non-empty texts of a field that is missing, a text or a list of texts."""
    texts = value if isinstance(value, list) else [] if value is None else [value]
    for text in texts:
        if not isinstance(text, str):
            raise DataError(f"{where}: {name!r} contains a {type(text).__name__}, expected text")
    return [text.strip() for text in texts if text.strip()]


MATH = Format(
    "math",
    _math,
    {"train": "train/*/*.json", "test": "test/*/*.json"},
    row_files=True,
    configurations=(
        "algebra",
        "counting_and_probability",
        "geometry",
        "intermediate_algebra",
        "number_theory",
        "prealgebra",
        "precalculus",
    ),
)
BIOASQ = _OneEdition("bioasq", _bioasq, {"train": "**/*train*.json", "test": "**/*golden*.json"}, key="questions")
