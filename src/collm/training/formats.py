"""Official formats of data sets: the conversion of their rows, and the layout of their files.

A prompt is the question alone. Text around it belongs to the prompt template, which training and decoding share.

`rows`: collm's own format, see `data.load_rows`, and formats recognised by their columns: ShareGPT's `conversations`,
    and Alpaca's `instruction`, `input`, `output`.

`tulu`: Tulu v2 mixture (allenai/tulu-v2-sft-mixture; fields `dataset`, `id`, `messages`). Split: train.
    The chat, rendered by the chat template; every assistant turn is a target.

`gsm8k`: GSM8K (openai/gsm8k; fields `question`, `answer`). Splits: train, test.
    Prompt: the question. Completion: the answer, with its calculator marks such as <<48/2=24>> and its last line
    "#### 72". `gsm8k-plain` is the same without the marks. The Hub's configuration is `main` unless another is named.

A name `package.module:NAME` is a `Format` of your own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from collm.core.named import imported
from collm.errors import ConfigError, DataError, RequestError
from collm.text.chats import check_unicode

CALCULATOR_MARK = re.compile(r"<<[^<>\n]*>>")
"""GSM8K's calculator annotations, as in 48/2 = <<48/2=24>>24."""


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
    """

    name: str
    render: Callable[[str, Mapping[str, Any]], Mapping[str, Any]]
    files: Mapping[str, str] = field(default_factory=dict)
    key: str | None = None
    row_files: bool = False
    configurations: tuple[str, ...] = ()

    def files_in(self, directory: Path, split: str | None) -> list[Path]:
        """The ordered files of a split, "train" by default; none if no split has files in the directory.

        Raises:
            DataError: only other splits have files.
        """
        found = {name: sorted(directory.glob(pattern), key=_natural_key) for name, pattern in self.files.items()}
        found = {name: files for name, files in found.items() if files}
        if not found:
            return []
        if (split or "train") not in found:
            raise DataError(f"{directory} has no split {split or 'train'!r}, only {', '.join(found)}")
        return found[split or "train"]


def format_named(name: str) -> Format:
    """A format of FORMATS, or your own `Format` as "package.module:NAME".

    Raises:
        ConfigError: there is no such format, or it cannot be imported.
    """
    if name in FORMATS:
        return FORMATS[name]
    if ":" not in name:
        raise ConfigError(f"format is {name!r}, expected one of {', '.join(FORMATS)}, or package.module:NAME")
    found = imported(name, "format")
    if not isinstance(found, Format):
        raise ConfigError(f"format {name!r} is a {type(found).__name__}, expected a collm.training.formats.Format")
    return found


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


def _natural_key(path: Path) -> list[str | int]:
    """Sort key that orders 2.json before 10.json."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", path.as_posix()))]


_GSM8K_FILES = {"train": "train.jsonl", "test": "test.jsonl"}
FORMATS: dict[str, Format] = {
    known.name: known
    for known in (
        Format("rows", _rows),
        Format("tulu", _tulu, {"train": "train.jsonl"}),
        Format("gsm8k", _gsm8k, _GSM8K_FILES, configurations=("main",)),
        Format("gsm8k-plain", _gsm8k_plain, _GSM8K_FILES, configurations=("main",)),
    )
}
