"""Rows are read from every kind of source, and a malformed one names its file, its line and what is wrong."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pytest

from collm.errors import ConfigError, DataError
from collm.training.data import load_records, load_rows

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c\u2028d", "completion": "é"}]
CHAT = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "x"}]


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_every_source_gives_the_same_rows(tmp_path: Path) -> None:
    lines = jsonl(tmp_path / "rows.jsonl", ROWS)
    listed = tmp_path / "rows.json"
    listed.write_text(json.dumps(ROWS, indent=2), encoding="utf-8")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "table")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "splits")
    for source in (lines, listed, tmp_path / "table", tmp_path / "splits"):
        rows = load_rows(str(source))
        assert [(row.prompt, row.completion, row.messages) for row in rows] == [
            (row["prompt"], row["completion"], None) for row in ROWS
        ]
        assert len({row.where for row in rows}) == 2
    assert [row.where for row in load_rows(lines)] == [f"{lines}:1", f"{lines}:2"]
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
    ],
)
def test_a_malformed_row_names_its_place_and_its_fault(tmp_path: Path, row: Any, complaint: str) -> None:
    with pytest.raises(DataError) as caught:
        load_rows(jsonl(tmp_path / "rows.jsonl", [ROWS[0], row]))
    assert str(caught.value).startswith(f"{tmp_path / 'rows.jsonl'}:2: ")
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"prompt": "a", "completion": "b"}\n\n{"prompt": ', ":3: bad JSON"),
        ('[\n{"prompt": "a", "completion": "b"},\n{"prompt": "c"', ":3: bad JSON"),
        (
            '[\n{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}]',
            ":3: bad JSON: Expecting ',' delimiter",
        ),
        ('[\n{"prompt": "a", "completion": "b"}', ":2: bad JSON: Expecting ',' delimiter"),
        ('[\n{"prompt": "a", "completion": "b"},\n]', ": bad JSON"),
        ('[\n{"prompt": "a", "completion": "b"}] x', ":2: bad JSON: Extra data"),
        ("[]", "has no rows"),
        ("", "has no rows"),
    ],
)
def test_bad_json_names_its_line(tmp_path: Path, text: str, complaint: str) -> None:
    source = tmp_path / "rows.json"
    source.write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        load_rows(source)
    assert complaint in str(caught.value)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8"):
        load_rows(source)


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


def test_a_split_is_chosen_among_those_there(tmp_path: Path) -> None:
    parts = {name: datasets.Dataset.from_list([{"prompt": name, "completion": "b"}]) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "splits")
    assert [load_rows(tmp_path / "splits", split=name)[0].prompt for name in (None, "test")] == ["train", "test"]
    with pytest.raises(DataError, match="no split 'dev', only train, test"):
        load_rows(tmp_path / "splits", split="dev")


def test_a_split_without_effect_is_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "table")
    for source in (jsonl(tmp_path / "rows.jsonl", ROWS), tmp_path / "table"):
        with pytest.raises(ConfigError, match="split 'test' has no effect"):
            load_rows(source, split="test")


def test_bad_rows_can_be_skipped_and_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = [{"prompt": "a"}, ["a"], {"messages": []}] * 4
    source = jsonl(tmp_path / "rows.jsonl", [ROWS[0], *bad, ROWS[1]])
    with source.open("a") as file:
        file.write('{"prompt": \n')
    with caplog.at_level(logging.WARNING):
        rows = load_rows(source, bad_rows="skip")
    assert [row.where for row in rows] == [f"{source}:1", f"{source}:14"]
    assert rows.num_bad == 13
    *reported, total = [record.getMessage() for record in caplog.records]
    assert [message.split(": ")[1] for message in reported] == [f"{source}:{line}" for line in range(2, 12)]
    assert total == f"skipped 13 bad rows of 15 in {source}"


def test_good_rows_are_reported_to_be_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = jsonl(tmp_path / "rows.jsonl", ROWS)
    with caplog.at_level(logging.WARNING):
        assert [load_rows(source, bad_rows=choice).num_bad for choice in ("stop", "skip")] == [0, 0]
    assert not caplog.records


def test_a_line_that_is_no_json_is_one_bad_row(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "rows.jsonl", ROWS)
    source.write_text("{\n" + source.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(DataError, match=r"rows.jsonl:1: bad JSON: .*; expected a row per line"):
        load_rows(source)
    rows = load_rows(source, bad_rows="skip")
    assert ([row.where for row in rows], rows.num_bad) == ([f"{source}:2", f"{source}:3"], 1)


def test_a_list_that_breaks_off_stops_even_where_bad_rows_are_skipped(tmp_path: Path) -> None:
    source = tmp_path / "rows.json"
    source.write_text('[\n{"prompt": "a", "completion": "b"},\n{"prompt": ')
    with pytest.raises(DataError, match=r"rows.json:3: bad JSON"):
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
