"""Formats of data sets: the conversion of their rows, and the files of their directories.

A prompt is the question alone. Text around it belongs to the prompt template, which training and decoding share.

- `rows`: the forms of `data.load_rows`, told by their columns.
- `tulu`: the chats of the Tulu v2 mixture (allenai/tulu-v2-sft-mixture). Split: train.
- `gsm8k`: questions and answers of GSM8K (openai/gsm8k), with marks such as <<48/2=24>>; `gsm8k-plain` without them.
  Splits: train, test. The Hub's configuration is `main` unless another is named.

A name `package.module:NAME` is a `Format` of your own.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from collm.core.named import imported
from collm.errors import DAMAGED, ConfigError, DataError, RequestError
from collm.text.chats import check_unicode
from collm.untrusted import contained, read_text

CALCULATOR_MARK = re.compile(r"<<[^<>\n]*>>")  # GSM8K's, as in 48/2 = <<48/2=24>>24


@dataclass(frozen=True)
class Format:
    """An official format.

    Attributes:
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

    def files_in(self, directory: Path, configuration: str | None, split: str | None) -> list[Path]:
        """The ordered files of a split: of an official format, of `datasets.save_to_disk`, or named as on the Hub.

        They are listed here, because no file of a directory may name others. A configuration is a directory in it.
        """
        contained(directory)
        wanted = split or "train"
        published = {name: sorted(directory.glob(pattern), key=_natural_key) for name, pattern in self.files.items()}
        published = {name: files for name, files in published.items() if files}
        if configuration is None and published:
            if wanted not in published:
                raise DataError(f"{directory} has no split {wanted!r}, only {', '.join(published)}")
            return published[wanted]
        if (directory / "dataset_dict.json").exists() or (directory / "state.json").exists():
            return _saved(directory, split)
        if self.files and next(directory.rglob("*.parquet"), None) is None:
            patterns = " or ".join(self.files.values())
            raise DataError(f"{directory} has no {self.name} data; expected {patterns}, or a copy of a Hub data set")
        names = self.configurations if configuration is None else [configuration]
        folders = [directory / name for name in names if (directory / name).is_dir()]
        if configuration is not None and not folders:
            raise DataError(f"{directory} has no directory {configuration!r} for the configuration of this name")
        return [file for folder in folders or [directory] for file in _of_split(folder, wanted)]


def format_named(name: str) -> Format:
    """A format of FORMATS, or your own `Format` as "package.module:NAME"."""
    if name in FORMATS:
        return FORMATS[name]
    if ":" not in name:
        raise ConfigError(f"format is {name!r}, expected one of {', '.join(FORMATS)}, or package.module:NAME")
    if isinstance(found := imported(name, "format"), Format):
        return found
    raise ConfigError(f"format {name!r} is a {type(found).__name__}, expected a collm.training.formats.Format")


def text_field(
    where: str, record: Mapping[str, Any], name: str, advice: str = "expected the official format's fields"
) -> str:
    """Read a text field of a row. A DataError if it is missing, not a string or empty."""
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
    value = record.get(name)
    return bool(value.strip() if isinstance(value, str) else value)


def _rows(where: str, record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Convert a row of collm's own format, of ShareGPT or of Alpaca, recognised by its columns."""
    own = "messages" in record or ("prompt" in record and "completion" in record)
    if not own and "conversations" in record:
        return {**record, "messages": _sharegpt(where, record)}
    if not own and "instruction" in record and "output" in record:
        return {**record, **_alpaca(where, record)}
    return record


_SHAREGPT_ROLES = {
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "function_response"), "tool"),
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
    who, content = turn["from"], turn.get("value")
    message = {key: value for key, value in turn.items() if key not in ("from", "value")}
    message |= {"role": _SHAREGPT_ROLES.get(who, who) if isinstance(who, str) else who, "content": content}
    if who != "function_call":
        return message
    try:
        call = json.loads(str(content))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: message {number}: the call {content!r:.60} is not JSON: {error}") from error
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


def _gsm8k(where: str, record: Mapping[str, Any], *, marks: bool = True) -> Mapping[str, Any]:
    prompt, answer = (text_field(where, record, name) for name in ("question", "answer"))
    return {"prompt": prompt, "completion": answer if marks else CALCULATOR_MARK.sub("", answer)}


_GSM8K = Format("gsm8k", _gsm8k, {"train": "train.jsonl", "test": "test.jsonl"}, configurations=("main",))
FORMATS: dict[str, Format] = {
    "rows": Format("rows", _rows),
    "tulu": Format("tulu", _tulu, {"train": "train.jsonl"}),
    "gsm8k": _GSM8K,
    "gsm8k-plain": replace(_GSM8K, name="gsm8k-plain", render=partial(_gsm8k, marks=False)),
}

FILES = (".json", ".jsonl", ".csv", ".parquet", ".arrow")


def _natural_key(path: Path) -> list[str | int]:
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", path.as_posix()))]


def _saved(directory: Path, split: str | None) -> list[Path]:
    """The files of a table that `datasets.save_to_disk` wrote."""
    try:
        if (directory / "dataset_dict.json").exists():
            splits = json.loads(read_text(directory / "dataset_dict.json"))["splits"]
            if (split or "train") not in splits:
                raise DataError(f"{directory} has no split {split or 'train'!r}, only {', '.join(splits)}")
            directory = contained(directory, split or "train")
        elif split is not None:
            raise ConfigError(f"split {split!r} has no effect on {directory}, which has a single table; leave it out")
        listed = json.loads(read_text(directory / "state.json"))["_data_files"]
        return [contained(directory, one["filename"]) for one in listed]
    except DAMAGED as error:
        raise DataError(
            f"{directory} is no data set of datasets.save_to_disk, or damaged ({type(error).__name__}: {error!s:.200})"
        ) from error


def _of_split(directory: Path, split: str) -> list[Path]:
    """The files of a split, which names tell by the rules of the Hub. Without such names all files are for training."""
    from datasets.data_files import get_data_patterns, resolve_pattern

    base, files = glob.escape(str(directory)), []
    try:
        patterns = get_data_patterns(base)
    except FileNotFoundError:
        patterns = {}
    for pattern in patterns.get(split, ()):
        with suppress(FileNotFoundError):
            files += [Path(file) for file in resolve_pattern(pattern, base) if Path(file).suffix in FILES]
    if not files:
        there = f"only {', '.join(map(str, patterns))}" if patterns else "nor any other"
        raise DataError(f"{directory} has no split {split!r} in files of the kinds {', '.join(FILES)}, {there}")
    return [*dict.fromkeys(files)]
