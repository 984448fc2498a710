"""Official formats of data sets: the conversion of their rows, and the layout of their files.

A prompt is the question alone. Text around it belongs to the prompt template, which training and decoding share.

`rows`: collm's own format, see `data.load_rows`, and formats recognised by their columns: ShareGPT's `conversations`,
    and Alpaca's `instruction`, `input`, `output`.

`tulu`: Tulu v2 mixture (allenai/tulu-v2-sft-mixture; fields `dataset`, `id`, `messages`). Split: train.
    The chat, rendered by the chat template; every assistant turn is a target.

`gsm8k`: GSM8K (openai/gsm8k; fields `question`, `answer`). Splits: train, test.
    Prompt: the question. Completion: the answer, with its calculator marks such as <<48/2=24>> and its last line
    "#### 72". `gsm8k-plain` is the same without the marks. The Hub's configuration is `main` unless another is named.

`math`: Hendrycks MATH (fields `problem`, `level`, `type`, `solution`). Splits: train, test.
    Prompt: the problem. Completion: the solution. A directory is read by subject and then by number. All of the Hub's
    configurations, one per subject (EleutherAI/hendrycks_math), are read unless one is named.

`bioasq`: BioASQ task B (fields `body`, `type`, `ideal_answer`, `exact_answer`). Splits: train (training11b.json), test
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

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from collm.errors import ConfigError, DataError, RequestError
from collm.models.chats import check_unicode

CALCULATOR_MARK = re.compile(r"<<[^<>\n]*>>")
"""GSM8K's calculator annotations, as in 48/2 = <<48/2=24>>24."""

_QUESTION_TYPES = ("factoid", "list", "yesno", "summary")
_FINAL_ANSWER = "The final answer is:"


@dataclass(frozen=True)
class Format:
    """An official format.

    Attributes:
        name: name in `load_rows`.
        render: converts a row, given its location and fields, to collm's own format.
        files: split -> pattern of its files in the published directory.
        key: key of the list of rows in a .json file that contains an object; None if the object is a row.
        row_files: whether a .json file may contain a single row.
        configurations: configurations of a Hub data set to read, unless its name includes one.
        edition: pattern of the edition in file names; a directory with several editions is an error.
    """

    name: str
    render: Callable[[str, Mapping[str, Any]], Mapping[str, Any]]
    files: Mapping[str, str] = field(default_factory=dict)
    key: str | None = None
    row_files: bool = False
    configurations: tuple[str, ...] = ()
    edition: str = ""

    def files_in(self, directory: Path, split: str | None) -> list[Path]:
        """The ordered files of a split, "train" by default; none if no split has files in the directory.

        Raises:
            DataError: only other splits have files, or the files belong to several editions.
        """
        found = {name: sorted(directory.glob(pattern), key=_natural_key) for name, pattern in self.files.items()}
        found = {name: files for name, files in found.items() if files}
        if not found:
            return []
        if (split or "train") not in found:
            raise DataError(f"{directory} has no split {split or 'train'!r}, only {', '.join(found)}")
        if self.edition:
            self._check_edition(directory, [file.name for files in found.values() for file in files])
        return found[split or "train"]

    def _check_edition(self, directory: Path, names: list[str]) -> None:
        editions = {match[0].lower() for name in names if (match := re.search(self.edition, name))}
        if len(editions) > 1:  # the training data of an edition contains earlier test sets
            raise DataError(
                f"{directory} has {len(editions)} editions ({', '.join(sorted(editions))}) of {self.name}, "
                "expected one; pass the directory of an edition or a file"
            )


def format_named(name: str) -> Format:
    """Look up a format by name.

    Raises:
        ConfigError: the name is unknown.
    """
    if name not in FORMATS:
        raise ConfigError(f"format is {name!r}, expected one of {', '.join(FORMATS)}")
    return FORMATS[name]


def text_field(
    where: str, record: Mapping[str, Any], name: str, advice: str = "expected the official format's fields"
) -> str:
    """Read a text field of a row.

    Raises:
        DataError: the field is missing, not a string or empty.
    """
    if name not in record:
        raise DataError(f"{where}: no field {name!r}, the row has {', '.join(map(repr, record))}; {advice}")
    value = record[name]
    if not isinstance(value, str):
        raise DataError(f"{where}: {name!r} is a {type(value).__name__}, expected a string")
    try:
        check_unicode(value)
    except RequestError as error:
        raise DataError(f"{where}: {name!r}{error}") from error
    if not value.strip():
        raise DataError(f"{where}: {name!r} is empty, expected text")
    return value


def _holds(record: Mapping[str, Any], name: str) -> bool:
    """Whether an optional field is there and not blank."""
    value = record.get(name)
    return bool(value.strip() if isinstance(value, str) else value)


def _rows(where: str, record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Convert a row of collm's own format, of ShareGPT or of Alpaca, recognised by its columns."""
    if "messages" in record or ("prompt" in record and "completion" in record):
        return record
    if "conversations" in record:
        return {**record, "messages": _sharegpt(where, record)}
    if "instruction" in record and "output" in record:
        return {**record, **_alpaca(where, record)}
    return record


_SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}


def _sharegpt(where: str, record: Mapping[str, Any]) -> list[Any]:
    """Convert a conversation to OpenAI's messages. Roles that are OpenAI's already are kept."""
    turns = record["conversations"]
    if not isinstance(turns, list):
        raise DataError(f"{where}: 'conversations' is a {type(turns).__name__}, expected a list of turns")
    system = [{"role": "system", "content": record["system"]}] if _holds(record, "system") else []
    return system + [_sharegpt_turn(where, number, turn) for number, turn in enumerate(turns, start=1)]


def _sharegpt_turn(where: str, number: int, turn: Any) -> Any:
    if not isinstance(turn, Mapping) or turn.get("from") is None:
        return turn
    who = turn["from"]
    message = {key: value for key, value in turn.items() if key not in ("from", "value")}
    message |= {"role": _SHAREGPT_ROLES.get(who, who) if isinstance(who, str) else who, "content": turn.get("value")}
    if who != "function_call":
        return message
    try:
        call = json.loads(str(turn.get("value")))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: message {number}: the call {turn.get('value')!r:.60} is not JSON ({error})"
        ) from error
    return {**message, "content": None, "tool_calls": call if isinstance(call, list) else [call]}


def _alpaca(where: str, record: Mapping[str, Any]) -> dict[str, str]:
    """Use the instruction as the prompt, followed by the input on its own lines if there is one."""
    if _holds(record, "history"):
        raise DataError(f"{where}: the row has a 'history', expected a single turn; write it as 'messages'")
    asked = [name for name in ("system", "instruction", "input") if name == "instruction" or _holds(record, name)]
    prompt = "\n\n".join(text_field(where, record, name) for name in asked)
    return {"prompt": prompt, "completion": text_field(where, record, "output")}


def _tulu(where: str, record: Mapping[str, Any]) -> Mapping[str, Any]:
    if "messages" not in record:
        raise DataError(f"{where}: no field 'messages', the row has {', '.join(map(repr, record))}")
    return {"messages": record["messages"]}


def _gsm8k(where: str, record: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"prompt": text_field(where, record, "question"), "completion": text_field(where, record, "answer")}


def _gsm8k_plain(where: str, record: Mapping[str, Any]) -> Mapping[str, Any]:
    row = _gsm8k(where, record)
    return {**row, "completion": CALCULATOR_MARK.sub("", row["completion"])}


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
    if kind not in _QUESTION_TYPES:
        raise DataError(f"{where}: 'type' is {kind!r:.40}, expected one of {', '.join(_QUESTION_TYPES)}")
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
        lines.append(f"{_FINAL_ANSWER} {question.entities[0][0]}")
    return "\n".join(lines)


def _bullets(names: list[str]) -> str:
    return _FINAL_ANSWER + "".join(f"\n- {name}" for name in dict.fromkeys(names))


def _names(where: str, name: str, value: Any) -> list[str]:
    """The non-empty texts of a field that is missing, a text or a list of texts."""
    texts = value if isinstance(value, list) else [] if value is None else [value]
    for text in texts:
        if not isinstance(text, str):
            raise DataError(f"{where}: {name!r} contains a {type(text).__name__}, expected text")
    return [text.strip() for text in texts if text.strip()]


def _natural_key(path: Path) -> list[str | int]:
    """Sort key that orders 2.json before 10.json."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", path.as_posix()))]


_GSM8K_FILES = {"train": "train.jsonl", "test": "test.jsonl"}
_MATH_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)

FORMATS: dict[str, Format] = {
    known.name: known
    for known in (
        Format("rows", _rows),
        Format("tulu", _tulu, {"train": "train.jsonl"}),
        Format("gsm8k", _gsm8k, _GSM8K_FILES, configurations=("main",)),
        Format("gsm8k-plain", _gsm8k_plain, _GSM8K_FILES, configurations=("main",)),
        Format(
            "math",
            _math,
            {"train": "train/*/*.json", "test": "test/*/*.json"},
            row_files=True,
            configurations=_MATH_SUBJECTS,
        ),
        Format(
            "bioasq",
            _bioasq,
            {"train": "**/*train*.json", "test": "**/*golden*.json"},
            key="questions",
            edition=r"[0-9]+[bB]",
        ),
    )
}
