"""Reading rows of training data (prompts with completions, or chats) from files, directories and the Hub.

A row is {"prompt": text, "completion": text} or {"messages": [{"role": text, "content": text}, ...]}; the first form
wins if a row has both, and a field that is null counts as absent. Prompt and completion may also be lists of messages
(TRL), of which the completion is the target. Messages have OpenAI's format with tool calls, text parts and `weight`
(`text.chats`), next to an optional field `tools`. ShareGPT's `conversations` and Alpaca's `instruction`, `input`,
`output` are recognised.
"""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, cast

from collm.atomic import write_text
from collm.errors import ConfigError, DataError, RequestError
from collm.text.chats import Chat, read_message, read_tools
from collm.training.formats import FILES, Format, format_named, text_field

logger = logging.getLogger(__name__)

Record = tuple[str, Any]  # location of a row, and its fields or the DataError that explains why it could not be read
MAX_MESSAGES = 1000  # of a row, because each turn is rendered with all messages before it


@dataclass(frozen=True)
class Row:
    """One row of data.

    Attributes:
        prompt: the text before the completion; for a chat, the messages before its last assistant turn.
        completion: the expected text; for a chat, its last assistant turn.
        messages: the chat up to its last assistant turn; None for a plain prompt.
        where: file and line (JSON lines, CSV) or row, for error messages.
        unlearned: indices of assistant messages that are not training targets.
        kind: the kind of prompt, the text of the field "kind"; empty if there is none.
    """

    prompt: str | Chat
    completion: str
    messages: Chat | None
    where: str
    unlearned: frozenset[int] = frozenset()
    kind: str = ""


class Rows(list[Row]):
    """Rows of one source. `num_bad` is the number of bad rows that were skipped."""

    def __init__(self, rows: Iterable[Row] = (), num_bad: int = 0) -> None:
        super().__init__(rows)
        self.num_bad = num_bad


def load_rows(
    source: str | Path,
    *,
    split: str | None = None,
    format: str = "rows",  # noqa: A002 - the option's name everywhere
    prompt_field: str = "prompt",
    completion_field: str = "completion",
    bad_rows: str = "stop",
) -> Rows:
    """Read rows with prompts and completions, or chats, in the forms above.

    Args:
        source: a JSON file (a list of rows), a JSONL, CSV, Parquet or Arrow file, a directory of such files or one
            written by `datasets.save_to_disk`, or the name of a Hub data set, followed by ":configuration" if it has
            several ("openai/gsm8k:main"). In an official format also a directory with its publishers' layout, or a
            copy of one on the Hub.
        split: split of a data set or directory, "train" by default; a file has none.
        format: "rows" as above, or an official format of `collm.training.formats`.
        prompt_field, completion_field: names of the two fields of "rows".
        bad_rows: "stop" at the first, or "skip" them: 10 are logged, `Rows.num_bad` counts all. Files must parse.

    Raises:
        DataError: there are no rows at `source`, the split does not exist, or a row is malformed (with "skip", every
            row); with file and line.
        ConfigError: `format` or `bad_rows` is unknown, a file has a split, or an official format has field names.
        ArtefactError: a link leads out of the directory.
    """
    layout, names = format_named(format), (prompt_field, completion_field)
    if bad_rows not in ("stop", "skip"):
        raise ConfigError(f"bad_rows is {bad_rows!r}, expected stop or skip")
    if format != "rows" and names != ("prompt", "completion"):
        raise ConfigError(f"prompt_field and completion_field have no effect with format {format!r}; leave them out")
    rows, bad = Rows(), list[DataError]()
    for where, record in _records(source, split, layout):
        try:
            given = _fields(where, record)
            rows.append(_of_kind(_row(where, layout.render(where, given), names), given.get("kind")))
        except DataError as error:
            if bad_rows == "stop":
                raise
            bad.append(error)
            if len(bad) <= 10:
                logger.warning("skipped a bad row: %s", error)
    if bad and not rows:
        raise DataError(f"{source}: all {len(bad)} rows are bad. The first: {bad[0]}") from bad[0]
    if not rows:
        raise DataError(f"{source} has no rows; expected at least one")
    if bad:
        logger.warning("skipped %d bad rows of %d in %s", len(bad), len(bad) + len(rows), source)
    return Rows(rows, len(bad))


def _of_kind(row: Row, kind: Any) -> Row:
    return replace(row, kind=kind) if isinstance(kind, str) else row


def write_rows(path: Path, rows: Iterable[Row | Mapping[str, Any]]) -> None:
    """Write rows, or their fields, as JSON lines, which `load_rows` reads as the same rows."""
    fields = (_written(row) if isinstance(row, Row) else row for row in rows)
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in fields))


def _written(row: Row) -> dict[str, Any]:
    kind = {"kind": row.kind} if row.kind else {}
    if row.messages is None:
        return {"prompt": row.prompt, "completion": row.completion, **kind}
    turns = [{**turn, "weight": int(place not in row.unlearned)} for place, turn in enumerate(row.messages)]
    return {"messages": turns, "tools": row.messages.tools, **kind}


def load_records(
    source: str | Path,
    *,
    split: str | None = None,
    format: str = "rows",  # noqa: A002
) -> list[tuple[str, Mapping[str, Any]]]:
    """Read the unconverted fields of every row but those that are null, with its location, as in `load_rows`."""
    records = [(where, _fields(where, record)) for where, record in _records(source, split, format_named(format))]
    if not records:
        raise DataError(f"{source} has no rows; expected at least one")
    return records


def _records(source: str | Path, split: str | None, layout: Format) -> Iterator[Record]:
    path, text = Path(source), str(source)
    try:
        is_file = path.is_file()
    except OSError as error:  # a name that is too long
        raise DataError(f"there is no {text[:80]!r}..: {error.strerror}") from error
    if is_file:
        if split is not None:
            raise ConfigError(f"split {split!r} has no effect on the file {path}; leave it out")
        return _read_file(path, layout)
    name, _, configuration = text.rpartition(":")
    if path.is_dir() or not name:  # the colon is part of its name, or there is none
        name, configuration = text, ""
    if Path(name).is_dir():
        files = layout.files_in(Path(name), configuration or None, split)
        return chain.from_iterable(_read_file(file, layout) for file in files)
    if not (text.startswith((".", "/", "~")) or text.count("/") > 1 or path.suffix in FILES):
        return _read_hub(name, configuration or None, split or "train", layout)
    raise DataError(f"there is no {path}; expected a JSON, JSONL, CSV, Parquet or Arrow file, a directory or Hub name")


def _read_file(path: Path, layout: Format) -> Iterator[Record]:
    if path.suffix in (".parquet", ".arrow"):
        return _read_columns(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}); expected a JSON or JSONL file") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; expected a file") from error
    if path.suffix == ".csv":
        return _read_csv(text, path)
    if text.lstrip().startswith("[") or (path.suffix == ".json" and (layout.key is not None or layout.row_files)):
        return _read_document(text, path, layout)
    advice, lines = "; expected a row per line, or one list", enumerate(text.split("\n"), start=1)
    return ((f"{path}:{number}", _parse(line, path, number, advice)) for number, line in lines if line.strip())


def _read_columns(path: Path) -> Iterator[Record]:
    import pyarrow
    from pyarrow import ipc, parquet

    number = 0
    try:
        if path.suffix == ".parquet":
            batches = parquet.ParquetFile(path).iter_batches()
        else:
            content = path.read_bytes()
            opened = ipc.open_file(content) if content.startswith(b"ARROW1") else ipc.open_stream(content)
            batches = opened.read_all().to_batches()
        for batch in batches:
            for record in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", record
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} is not {path.suffix[1:]}, or damaged after row {number}: {reason:.200}") from error


def _read_csv(text: str, path: Path) -> Iterator[Record]:
    """Rows of a CSV file with a header. The location is the line on which a row ends."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    before = csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    try:
        for record in reader:
            where = f"{path}:{reader.line_num}"
            if None in record or None in record.values():
                yield where, DataError(f"{where}: the number of values differs from the header's")
            else:
                yield where, record
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: bad CSV: {error}") from error
    finally:
        csv.field_size_limit(before)


def _read_document(text: str, path: Path, layout: Format) -> Iterator[Record]:
    """Rows of a JSON list, of the list at a format's key, or a single one. The location is the number of the row."""
    found = _parse(text, path)
    if layout.row_files and not isinstance(found, list):
        found = [found]
    if isinstance(found, DataError):
        raise found
    rows = found.get(layout.key) if isinstance(found, Mapping) else found
    if not isinstance(rows, list):
        raise DataError(f'{path} has no list of rows; expected {{"{layout.key}": [...]}}')
    yield from ((f"{path}, row {number}", record) for number, record in enumerate(rows, start=1))


def _parse(text: str, path: Path, first_line: int = 1, advice: str = "") -> Any:
    """Parse JSON, or return the DataError that explains why it is invalid."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        return DataError(f"{path}:{line}: bad JSON: {error.msg} at column {error.colno}{advice}")
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number with too many digits
        return DataError(f"{path}:{first_line}: bad JSON: {error}{advice}")


def _read_hub(name: str, configuration: str | None, split: str, layout: Format) -> Iterator[Record]:
    """Rows of a split of a Hub data set, from each configuration to read."""
    import datasets

    configurations = [configuration]
    try:
        if configuration is None and layout.configurations:
            available = datasets.get_dataset_config_names(name)
            configurations = [one for one in layout.configurations if one in available] or [None]
        tables = {":".join(filter(None, (name, one))): _table(name, one, split) for one in configurations}
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"could not load the data set {name!r}: {reason:.400}; expected a file, directory or Hub name"
        ) from error
    return ((f"{place}:{number}", record) for place, table in tables.items() for number, record in enumerate(table, 1))


def _table(name: str, configuration: str | None, split: str) -> Iterable[Any]:
    """A split of a Hub data set, unless its README lists files that are not on the Hub."""
    import datasets

    builder = datasets.load_dataset_builder(name, configuration)
    for file in chain.from_iterable((builder.config.data_files or {}).values()):
        if not file.startswith("hf://"):
            raise DataError(f"the data set {name!r} lists the file {file!r:.200}, which is not on the Hub")
    builder.download_and_prepare()
    return cast(Iterable[Any], builder.as_dataset(split=split))


def _fields(where: str, record: Any) -> Mapping[str, Any]:
    if isinstance(record, DataError):
        raise record
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: the row is a {type(record).__name__}, expected an object with named fields")
    return {name: value for name, value in record.items() if value is not None}  # tables fill absent fields with null


def _row(where: str, fields: Mapping[str, Any], names: tuple[str, str]) -> Row:
    if "messages" in fields and not all(name in fields for name in names):
        return _chat_row(where, fields["messages"], fields.get("tools"))
    prompt, completion = map(fields.get, names)
    if isinstance(prompt, list) and isinstance(completion, list | Mapping):  # TRL: the completion is the target
        turns = [{**turn, "train": False} if isinstance(turn, Mapping) else turn for turn in prompt]
        turns += [completion] if isinstance(completion, Mapping) else completion
        return _chat_row(where, turns, fields.get("tools"))
    prompt, completion = (text_field(where, fields, name, "name the fields to read") for name in names)
    return Row(prompt, completion, None, where)


def _chat_row(where: str, messages: Any, tools: Any) -> Row:
    if not isinstance(messages, list):
        raise DataError(f"{where}: 'messages' is a {type(messages).__name__}, expected a list of messages")
    if len(messages) > MAX_MESSAGES:
        raise DataError(f"{where}: the chat has {len(messages)} messages, expected at most {MAX_MESSAGES}; split it")
    chat, learned = list[dict[str, Any]](), set[int]()
    for index, message in enumerate(messages):
        try:
            fields, is_learned = read_message(message)
        except RequestError as error:
            raise DataError(f"{where}: message {index + 1}{error}") from error
        chat.append(fields)
        if is_learned and fields["role"] == "assistant":
            learned.add(index)
    if not learned:
        roles = ", ".join(message["role"] for message in chat) or "none"
        raise DataError(f"{where}: no assistant turn to train on, the roles are: {roles}")
    try:
        functions = read_tools(tools)
    except RequestError as error:
        raise DataError(f"{where}: {error}") from error
    last = max(learned)
    turn, before = chat[last], chat[:last]
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in turn.get("tool_calls", ())]
    completion = "\n".join([text for text in (turn["content"], *calls) if text])
    unlearned = {index for index, message in enumerate(before) if message["role"] == "assistant"} - learned
    return Row(Chat(before, functions), completion, Chat([*before, turn], functions), where, frozenset(unlearned))
