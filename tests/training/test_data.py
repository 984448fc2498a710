"""Rows are read from every kind of source, and a malformed one names its file, its line and what is wrong."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pytest

from collm.errors import ConfigError, DataError
from collm.training.data import load_records, load_rows, write_rows

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c\u2028d", "completion": "é"}]
USER, ANSWER = {"role": "user", "content": "u"}, {"role": "assistant", "content": "x"}
CHAT = [{"role": "system", "content": "s"}, USER, ANSWER]


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_every_source_gives_the_same_rows(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list(ROWS)
    listed, folder, as_csv = tmp_path / "rows.json", tmp_path / "folder", tmp_path / "rows.csv"
    lines = jsonl(tmp_path / "rows.jsonl", ROWS)
    listed.write_text(json.dumps(ROWS, indent=2), encoding="utf-8")
    table.to_csv(as_csv)
    folder.mkdir()
    table.to_parquet(folder / "train.parquet")
    table.save_to_disk(tmp_path / "table")
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "splits")
    arrow = next((tmp_path / "table").glob("*.arrow"))
    columns = (folder, folder / "train.parquet", arrow, tmp_path / "table", tmp_path / "splits")
    for source in (lines, listed, as_csv, *columns):
        rows = load_rows(str(source))
        assert [(row.prompt, row.completion, row.messages) for row in rows] == [(*row.values(), None) for row in ROWS]
        assert len({row.where for row in rows}) == 2
    assert [row.where for row in load_rows(lines)] == [f"{lines}:1", f"{lines}:2"]
    assert [row.where for row in load_rows(as_csv)] == [f"{as_csv}:2", f"{as_csv}:3"]
    assert [row.where for row in load_rows(listed)] == [f"{listed}, row 1", f"{listed}, row 2"]


def test_fields_can_be_named(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "qa.jsonl", [{"question": "q", "answer": "a"}])
    (row,) = load_rows(source, prompt_field="question", completion_field="answer")
    assert (row.prompt, row.completion) == ("q", "a")
    with pytest.raises(DataError, match=r"qa.jsonl:1: no field 'prompt', the row has 'question', 'answer'"):
        load_rows(source)


def test_a_chat_is_split_at_its_last_assistant_turn(tmp_path: Path) -> None:
    chat = [*CHAT, {"role": "user", "content": "again"}, {"role": "assistant", "content": "y", "tool": None}]
    trailing = [*chat, {"role": "user", "content": "bye"}]
    (row,) = load_rows(jsonl(tmp_path / "chat.jsonl", [{"messages": trailing, "prompt": "ignored"}]))
    assert row.prompt == chat[:4]
    assert row.completion == "y"
    assert row.messages == [*chat[:4], {"role": "assistant", "content": "y"}]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"prompt": "a"}, "no field 'completion', the row has 'prompt'"),
        ({"prompt": 3, "completion": "b"}, "'prompt' is a int, expected a string"),
        ({"prompt": "a", "completion": None}, "no field 'completion', the row has 'prompt'"),
        ({"prompt": "a", "completion": " \n"}, "'completion' is empty"),
        ({"prompt": "", "completion": "a"}, "'prompt' is empty"),
        (["a", "b"], "the row is a list, expected an object"),
        ({"messages": "hi"}, "'messages' is a str, expected a list"),
        ({"messages": []}, "no assistant turn to train on, the roles are: none"),
        ({"messages": CHAT[:2]}, "no assistant turn to train on, the roles are: system, user"),
        ({"messages": [*CHAT, "x"]}, "message 4 is a str"),
        ({"messages": [*CHAT, {"role": "user"}]}, "message 4: 'content' is None, expected a string"),
        ({"messages": [{"role": "assistant", "content": ""}]}, "message 1: the assistant's content is empty"),
        ({"prompt": "\ud800 b", "completion": "x"}, "'prompt': character 0 is '\\ud800', half of a character"),
        ({"messages": [{"role": "user", "content": "a\udfff"}, ANSWER]}, "message 1: character 1 is"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ANSWER]},
         "message 1: 'content' has a part of type 'image_url', expected text"),
        ({"messages": [USER, {"role": "assistant", "content": 3}]}, "message 2: 'content' is 3, expected a string"),
        ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "message 2: 'weight' is 0.5, expected 0 or 1"),
        ({"messages": [USER, {**ANSWER, "weight": [0]}]}, "message 2: 'weight' is [0], expected 0 or 1"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": "x"}]}, "message 2: 'tool_calls' is a str"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [3]}]}, "message 2: a call is 3"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
         "'arguments' of a call is '{', expected JSON"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}]},
         "'arguments' of a call is a list, expected an object"),
        ({"messages": [USER, ANSWER], "tools": [1]}, "'tools' is [1], expected a list of functions with names"),
        ({"messages": [USER, ANSWER], "tools": "{"}, "tools is '{', expected JSON"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "message 1: 'role' is ['user'], expected a string"),
        ({"conversations": "hi"}, "'conversations' is a str, expected a list"),
        ({"conversations": [{"from": 3, "value": "x"}]}, "message 1: 'role' is 3"),
        ({"instruction": "a", "output": 3}, "'output' is a int"),
        ({"instruction": "a", "output": "b", "history": [["q", "a"]]}, "has a 'history', expected a single turn"),
        ({"prompt": [], "completion": []}, "no assistant turn to train on"),
        ({"prompt": [USER], "completion": "x"}, "'prompt' is a list, expected a string"),
        ({"prompt": ["x"], "completion": [ANSWER]}, "message 1 is a str"),
    ],
)  # fmt: skip
def test_a_malformed_row_names_its_place_and_its_fault(tmp_path: Path, row: Any, complaint: str) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError) as caught:
        load_rows(tmp_path / "rows.jsonl")
    assert str(caught.value).startswith(f"{tmp_path / 'rows.jsonl'}:2: ")
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("rows.json", '{"prompt": "a", "completion": "b"}\n\n{"prompt": ', "rows.json:3: bad JSON"),
        ("rows.json", '[\n{"prompt": "a", "completion": "b"},\n{"prompt": "c"', "rows.json:3: bad JSON"),
        ("rows.json", '[\n{"prompt": "a", "completion": "b"}\n{}]', ":3: bad JSON: Expecting ',' delimiter"),
        ("rows.json", '[\n{"prompt": "a", "completion": "b"}', ":2: bad JSON: Expecting ',' delimiter"),
        ("rows.json", '[\n{"prompt": "a", "completion": "b"},\n]', ": bad JSON"),
        ("rows.json", '[\n{"prompt": "a", "completion": "b"}] x', ":2: bad JSON: Extra data"),
        ("rows.json", "[]", "has no rows"),
        ("rows.json", "", "has no rows"),
        ("rows.jsonl", "[" * 100_000, "rows.jsonl:1: bad JSON"),
        ("rows.jsonl", '{"prompt": "a"}\n' + "1" * 5000, "rows.jsonl:1"),
        ("rows.jsonl", '{"prompt": "a", "completion": ' + "[" * 100_000, "rows.jsonl:1: bad JSON"),
        ("rows.jsonl", b"\xff\xfe\x00", "not UTF-8"),
        ("rows.parquet", "no", "is not parquet, or damaged after row 0"),
        ("rows.arrow", "no", "is not arrow, or damaged after row 0"),
        ("rows.csv", 'prompt,completion\na,"b\n', "bad CSV"),
        ("rows.csv", "prompt,completion\na\n", ":2: the number of values differs from the header's"),
        ("rows.csv", "prompt,completion\na,b,c\n", ":2: the number of values differs from the header's"),
        ("rows.csv", "", "has no rows"),
    ],
)  # fmt: skip
def test_a_damaged_file_names_its_line(tmp_path: Path, name: str, content: str | bytes, complaint: str) -> None:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError) as caught:
        load_rows(tmp_path / name)
    assert complaint in str(caught.value)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    for missing in (tmp_path / "rows", "rows.jsonl", "./rows"):
        with pytest.raises(DataError, match=r"there is no .*rows"):
            load_rows(missing)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"has no split 'train' in files of the kinds .json, .*nor any other"):
        load_rows(tmp_path / "empty")


def test_files_of_a_directory_are_read_as_they_are_alone(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    rows: list[Any] = [
        {"prompt": "a", "completion": "b", "id": 1, "tools": None},
        {"prompt": "c", "completion": "d", "id": "x", "tools": [{"name": "f"}]},
        {"prompt": "e", "completion": "f", "id": [1.5, None], "extra": {"a": {}}},
        {"messages": CHAT, "tools": json.dumps([{"name": "f"}])},
    ]
    files = [jsonl(folder / f"{name}.jsonl", [row, ROWS[1]]) for name, row in zip("abcd", rows, strict=True)]
    assert load_rows(folder) == [row for file in files for row in load_rows(file)]
    assert load_records(folder) == [record for file in files for record in load_records(file)]
    (folder / "c.jsonl").write_text('\n{"prompt": "a"}\n')
    with pytest.raises(DataError, match=r"^.*folder/c.jsonl:2: no field 'completion'"):
        load_rows(folder)
    (folder / "b.jsonl").write_text("{\n")
    with pytest.raises(DataError, match=r"^.*folder/b.jsonl:1: bad JSON"):
        load_rows(folder)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_splits_of_a_directory_are_files(tmp_path: Path, suffix: str) -> None:
    for split in ("train", "test"):
        rows = [{"prompt": split, "completion": "007"}]
        text = json.dumps(rows) if suffix == "json" else "prompt,completion\n" + ",".join(rows[0].values())
        (tmp_path / f"{split}.{suffix}").write_text(text)
        if suffix == "jsonl":
            jsonl(tmp_path / f"{split}.{suffix}", rows)
    for given, split in ((None, "train"), ("test", "test")):
        (row,) = load_rows(tmp_path, split=given)
        assert (row.prompt, row.completion) == (split, "007")
        assert row.where.startswith(f"{tmp_path / split}.{suffix}")
    with pytest.raises(DataError, match=r"has no split 'dev' .*, only train, test"):
        load_rows(tmp_path, split="dev")


def test_a_colon_names_a_configuration_unless_a_directory_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("d:1", "d/1", "g/2:3", "d/rest", "e:f/main"):
        Path(name).mkdir(parents=True)
        jsonl(Path(name) / "train.jsonl", [{"prompt": name, "completion": "b"}])
    for directory, one, other in (("d", "1", "rest"), ("e:f", "main", "main")):
        configurations = [f"- config_name: '{name}'\n  data_files: {name}/train.jsonl\n" for name in {one, other}]
        (Path(directory) / "README.md").write_text(f"---\nconfigs:\n{''.join(configurations)}---\n")
    for source, prompt in (
        ("d:1", "d:1"),
        ("d:rest", "d/rest"),
        ("./d:rest", "d/rest"),
        (str(tmp_path / "d:rest"), "d/rest"),
        ("g/2:3", "g/2:3"),
        ("e:f:main", "e:f/main"),
    ):
        assert load_rows(source)[0].prompt == prompt
    with pytest.raises(DataError, match="there is no g/2:4"):
        load_rows("./g/2:4")


def test_a_split_is_chosen_among_those_there_and_refused_without_effect(tmp_path: Path) -> None:
    parts = {name: datasets.Dataset.from_list([{"prompt": name, "completion": "b"}]) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "splits")
    parts["train"].save_to_disk(tmp_path / "table")
    assert [load_rows(tmp_path / "splits", split=name)[0].prompt for name in (None, "test")] == ["train", "test"]
    with pytest.raises(DataError, match="no split 'dev', only train, test"):
        load_rows(tmp_path / "splits", split="dev")
    for source in (jsonl(tmp_path / "rows.jsonl", ROWS), tmp_path / "table"):
        with pytest.raises(ConfigError, match="split 'test' has no effect"):
            load_rows(source, split="test")


def test_bad_rows_can_be_skipped_and_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = [{"prompt": "a"}, ["a"], {"messages": []}] * 4
    source = jsonl(tmp_path / "rows.jsonl", [ROWS[0], *bad, ROWS[1]])
    with source.open("a") as file:
        file.write('{"prompt": \n')
    with caplog.at_level(logging.WARNING):
        assert [load_rows(jsonl(tmp_path / "good", ROWS), bad_rows=way).num_bad for way in ("stop", "skip")] == [0, 0]
        assert not caplog.records
        rows = load_rows(source, bad_rows="skip")
    assert [row.where for row in rows] == [f"{source}:1", f"{source}:14"]
    assert rows.num_bad == 13
    *reported, total = [record.getMessage() for record in caplog.records]
    assert [message.split(": ")[1] for message in reported] == [f"{source}:{line}" for line in range(2, 12)]
    assert total == f"skipped 13 bad rows of 15 in {source}"


def test_a_line_that_is_no_json_is_one_bad_row(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "rows.jsonl", ROWS)
    source.write_text("{\n" + source.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(DataError, match=r"rows.jsonl:1: bad JSON: .*; expected a row per line"):
        load_rows(source)
    rows = load_rows(source, bad_rows="skip")
    assert ([row.where for row in rows], rows.num_bad) == ([f"{source}:2", f"{source}:3"], 1)
    source.write_text('[\n{"prompt": "a", "completion": "b"},\n{"prompt": ')  # a list stops even then
    with pytest.raises(DataError, match=r"rows.jsonl:3: bad JSON"):
        load_rows(source, bad_rows="skip")


def test_nothing_but_bad_rows_is_refused(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "rows.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    with pytest.raises(DataError, match=r"all 2 rows are bad. The first: .*rows.jsonl:1: no field 'completion'"):
        load_rows(source, bad_rows="skip")
    with pytest.raises(ConfigError, match="bad_rows is 'ignore', expected stop or skip"):
        load_rows(source, bad_rows="ignore")


def test_records_are_as_published(tmp_path: Path) -> None:
    rows = [{"question": "q", "choices": ["a", "b"]}, {"question": "r"}]
    source = jsonl(tmp_path / "any.jsonl", rows)
    assert load_records(source) == [(f"{source}:1", rows[0]), (f"{source}:2", rows[1])]
    with pytest.raises(DataError, match=r"any.jsonl:2: the row is a list, expected an object"):
        load_records(jsonl(tmp_path / "any.jsonl", [*rows[:1], ["r"]]))
    with pytest.raises(DataError, match=r"any.jsonl has no rows"):
        load_records(jsonl(tmp_path / "any.jsonl", []))


def test_a_row_may_say_its_kind(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = tmp_path / "rows.jsonl"
    write_rows(
        path, [{"prompt": "a", "completion": "b", "kind": "k"}, {"messages": chat, "kind": "c"}, {"messages": chat}]
    )
    rows = load_rows(path)
    assert [row.kind for row in rows] == ["k", "c", ""]
    write_rows(path, rows)
    assert [row.kind for row in load_rows(path)] == ["k", "c", ""]
