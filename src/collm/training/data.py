"""Rows of training data: prompts with completions, or chats, from files, `datasets` directories and the Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from collm.errors import ConfigError, DataError

Message = dict[str, str]
Record = tuple[str, Any]
"""Where a row stands, and what was read there."""


@dataclass(frozen=True)
class Row:
    """One row of data.

    Attributes:
        prompt: the text before the completion; for a chat the messages before its last assistant turn.
        completion: what should follow; for a chat its last assistant turn.
        messages: the chat up to its last assistant turn; None for a plain prompt.
        where: file and line, for messages about this row.
    """

    prompt: str | list[Message]
    completion: str
    messages: list[Message] | None
    where: str


def load_rows(
    source: str | Path,
    *,
    split: str | None = None,
    prompt_field: str = "prompt",
    completion_field: str = "completion",
) -> list[Row]:
    """Read prompt/completion rows or chats.

    A row is {"prompt": text, "completion": text} or {"messages": [{"role": text, "content": text}, ...]}; the first
    form is read where a row has both.

    Args:
        source: a JSON file (a list of rows), a JSONL file, a directory written by `datasets.save_to_disk`, or the name
            of a Hub data set, with ":configuration" behind it where it has several ("openai/gsm8k:main").
        split: which split of a data set, "train" by default; a file has none.
        prompt_field, completion_field: what the two fields are called.

    Raises:
        DataError: nothing usable at `source`, or a malformed row: its file and line, and what is wrong.
        ConfigError: a split of a file.
    """
    path = Path(source)
    if path.is_file():
        if split is not None:
            raise ConfigError(f"split {split!r} has no effect on the file {path}; leave it out")
        records = _read_file(path)
    elif path.is_dir() or not _looks_like_path(str(source)):
        records = _read_dataset(str(source), split)
    else:
        raise DataError(f"there is no {path}; expected a JSON or JSONL file, a data set directory or a Hub name")
    rows = [_row(where, record, prompt_field, completion_field) for where, record in records]
    if not rows:
        raise DataError(f"{source} has no rows; expected at least one")
    return rows


def _read_file(path: Path) -> Iterator[Record]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text ({error}); expected a JSON or JSONL file") from error
    return _read_list(text, path) if text.lstrip().startswith("[") else _read_lines(text, path)


def _read_lines(text: str, path: Path) -> Iterator[Record]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"{path}:{number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}:{number}: bad JSON: {error.msg} at column {error.colno}; expected a row per line, or one list"
            ) from error


def _read_list(text: str, path: Path) -> Iterator[Record]:
    """Rows of one JSON list, each with the line it starts on."""
    decoder = json.JSONDecoder()
    position, line, counted = _skip_space(text, text.index("[") + 1), 1, 0
    separator = ","
    if text[position : position + 1] == "]":
        separator, position = "]", position + 1
    while separator == ",":
        line, counted = line + text.count("\n", counted, position), position
        try:
            record, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{error.lineno}: bad JSON: {error.msg} at column {error.colno}") from error
        yield f"{path}:{line}", record
        end = _skip_space(text, end)
        separator = text[end : end + 1]
        position = _skip_space(text, end + 1)
    if separator != "]" or text[position:].strip():
        raise DataError(f"{path}:{line}: bad JSON: expected , or ] after the row that starts here, and nothing after ]")


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position].isspace():
        position += 1
    return position


def _looks_like_path(source: str) -> bool:
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or Path(source).suffix in (".json", ".jsonl")


def _read_dataset(source: str, split: str | None) -> Iterator[Record]:
    import datasets

    saved = Path(source)
    name, _, configuration = source.partition(":")
    try:
        if (saved / "dataset_dict.json").exists() or (saved / "state.json").exists():
            table = _pick_split(datasets.load_from_disk(source), source, split)
        else:
            table = datasets.load_dataset(name, configuration or None, split=split or "train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"could not load the data set {source!r}: {first_line}; expected a JSON or JSONL file, "
            "a directory written by datasets.save_to_disk, or a Hub name"
        ) from error
    return ((f"{source}:{number}", record) for number, record in enumerate(table, start=1))


def _pick_split(found: Any, source: str, split: str | None) -> Any:
    if not isinstance(found, Mapping):
        if split is not None:
            raise ConfigError(f"split {split!r} has no effect on {source}, which holds one table; leave it out")
        return found
    if (split or "train") not in found:
        raise DataError(f"{source} has no split {split or 'train'!r}, only {', '.join(found)}")
    return found[split or "train"]


def _row(where: str, record: Any, prompt_field: str, completion_field: str) -> Row:
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: the row is a {type(record).__name__}, expected an object with named fields")
    if "messages" in record and not (prompt_field in record and completion_field in record):
        return _chat_row(where, record["messages"])
    prompt, completion = (_text(where, record, field) for field in (prompt_field, completion_field))
    return Row(prompt, completion, None, where)


def _text(where: str, record: Mapping[str, Any], field: str) -> str:
    if field not in record:
        raise DataError(
            f"{where}: no field {field!r}, the row has {', '.join(map(repr, record))}; name the fields to read"
        )
    value = record[field]
    if not isinstance(value, str):
        raise DataError(f"{where}: {field!r} is a {type(value).__name__}, expected a string")
    if not value.strip():
        raise DataError(f"{where}: {field!r} is empty, expected some text")
    return value


def _chat_row(where: str, messages: Any) -> Row:
    if not isinstance(messages, list):
        raise DataError(f"{where}: 'messages' is a {type(messages).__name__}, expected a list of messages")
    chat = [_message(f"{where}: message {number}", message) for number, message in enumerate(messages, start=1)]
    turns = [index for index, message in enumerate(chat) if message["role"] == "assistant"]
    if not turns:
        roles = ", ".join(message["role"] for message in chat) or "no message at all"
        raise DataError(f"{where}: no assistant turn to learn, the roles are: {roles}")
    last = turns[-1]
    return Row(chat[:last], chat[last]["content"], chat[: last + 1], where)


def _message(where: str, message: Any) -> Message:
    if not isinstance(message, Mapping):
        raise DataError(f"{where} is a {type(message).__name__}, expected {{'role': ..., 'content': ...}}")
    for field in ("role", "content"):
        if not isinstance(message.get(field), str):
            raise DataError(f"{where}: {field!r} is {message.get(field)!r:.40}, expected a string")
    if message["role"] == "assistant" and not message["content"].strip():
        raise DataError(f"{where}: the assistant's content is empty, expected some text")
    return {key: value for key, value in message.items() if value is not None}  # Arrow fills absent fields with None
