"""Official formats are read as their publishers ship them, and a row becomes exactly the text that is stated."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest

from collm.errors import ConfigError, DataError
from collm.training.data import Row, load_rows
from tests.training.test_data import jsonl

GSM8K = [
    {
        "question": "Ada bakes 12 rolls a day and sells half. How many rolls are left after 3 days?",
        "answer": "She keeps 12/2 = <<12/2=6>>6 rolls a day.\nAfter 3 days 6*3 = <<6*3=18>>18 are left.\n#### 18",
    },
    {"question": "A shelf holds $5 books, 4 of them. What are they worth?", "answer": "5*4=<<5*4=20>>20\n#### 20"},
]
TULU = {
    "dataset": "open_assistant",
    "id": "oasst_17",
    "messages": [
        {"role": "user", "content": "Name a river."},
        {"role": "assistant", "content": "The Po."},
        {"role": "user", "content": "Another."},
        {"role": "assistant", "content": "The Ebro."},
    ],
}


def texts(rows: list[Row]) -> list[tuple[Any, str]]:
    return [(row.prompt, row.completion) for row in rows]


class Hub:
    """Stands in for the Hub: tables by name, configuration and split, and a list of what was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tables: dict[tuple[str, str | None], dict[str, Any]]) -> None:
        self.tables = tables
        self.files: dict[str, list[str]] | None = {"train": [f"hf://datasets/{name}@0/r.jsonl" for name, _ in tables]}
        self.asked: list[tuple[str, str | None, str]] = []
        monkeypatch.setattr(datasets, "load_dataset_builder", self.builder)
        monkeypatch.setattr(datasets, "get_dataset_config_names", self.configurations)

    def configurations(self, name: str) -> list[str]:
        return [configuration or "default" for known, configuration in self.tables if known == name]

    def builder(self, name: str, configuration: str | None) -> SimpleNamespace:
        """What `datasets` makes of a name, as far as it is used."""
        return SimpleNamespace(
            config=SimpleNamespace(data_files=self.files),
            download_and_prepare=lambda: None,
            as_dataset=lambda split: self.load(name, configuration, split),
        )

    def load(self, name: str, configuration: str | None, split: str) -> datasets.Dataset:
        self.asked.append((name, configuration, split))
        there = self.tables[name, configuration]
        if split not in there:
            raise ValueError(f'Unknown split "{split}". Should be one of {list(there)}.')
        return datasets.Dataset.from_list(there[split])


def test_gsm8k_keeps_its_marks_unless_told(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "train.jsonl", GSM8K)
    assert texts(load_rows(source, format="gsm8k")) == [(row["question"], row["answer"]) for row in GSM8K]
    assert texts(load_rows(source, format="gsm8k-plain")) == [
        (GSM8K[0]["question"], "She keeps 12/2 = 6 rolls a day.\nAfter 3 days 6*3 = 18 are left.\n#### 18"),
        (GSM8K[1]["question"], "5*4=20\n#### 20"),
    ]


@pytest.mark.parametrize("name", ["gsm8k", "gsm8k-plain"])
def test_a_gsm8k_directory_has_its_splits(tmp_path: Path, name: str) -> None:
    jsonl(tmp_path / "train.jsonl", GSM8K[:1])
    jsonl(tmp_path / "train_socratic.jsonl", [{"question": "other", "answer": "form"}])
    with pytest.raises(DataError, match="has no split 'test', only train"):
        load_rows(tmp_path, split="test", format=name)
    test = jsonl(tmp_path / "test.jsonl", GSM8K[1:])
    (train_row,), (test_row,) = (load_rows(tmp_path, split=split, format=name) for split in (None, "test"))
    assert (train_row.prompt, test_row.prompt) == (GSM8K[0]["question"], GSM8K[1]["question"])
    assert test_row.where == f"{test}:1"
    with pytest.raises(DataError, match="has no split 'validation', only train, test"):
        load_rows(tmp_path, split="validation", format=name)
    with pytest.raises(ConfigError, match="split 'test' has no effect on the file"):
        load_rows(test, split="test", format=name)


def test_a_tulu_chat_stays_a_chat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tulu = "allenai/tulu-v2-sft-mixture"
    Hub(monkeypatch, {(tulu, None): {"train": [TULU]}})
    row, again = (load_rows(found, format="tulu")[0] for found in (jsonl(tmp_path / "train.jsonl", [TULU]), tmp_path))
    assert row == again
    assert (row.prompt, row.completion, row.messages) == (TULU["messages"][:3], "The Ebro.", TULU["messages"])
    with pytest.raises(DataError, match="has no split 'test', only train"):
        load_rows(tmp_path, split="test", format="tulu")
    assert load_rows(tulu, format="tulu")[0].messages == TULU["messages"]
    with pytest.raises(DataError, match=r"Should be one of \['train'\]"):
        load_rows(tulu, split="test", format="tulu")


@pytest.mark.parametrize(
    ("name", "row", "complaint"),
    [
        ("gsm8k", {"question": "q"}, "no field 'answer', the row has 'question'"),
        ("gsm8k", {"question": None, "answer": "a"}, "no field 'question', the row has 'answer'"),
        ("gsm8k-plain", {"question": "q", "answer": "<<1+1=2>>"}, "'completion' is empty"),
        ("tulu", {"id": "a", "prompt": "p", "completion": "c"}, "no field 'messages', the row has 'id', 'prompt'"),
        ("tulu", {"messages": TULU["messages"][:1]}, "no assistant turn to train on"),
        ("tulu", "text", "the row is a str"),
    ],
)
def test_a_row_of_another_form_is_bad(tmp_path: Path, name: str, row: Any, complaint: str) -> None:
    good = TULU if name == "tulu" else GSM8K[0]
    source = jsonl(tmp_path / "rows.jsonl", [good, row])
    with pytest.raises(DataError) as caught:
        load_rows(source, format=name)
    assert str(caught.value).startswith(f"{source}:2: ")
    assert complaint in str(caught.value)
    rows = load_rows(source, format=name, bad_rows="skip")
    assert (len(rows), rows.num_bad) == (1, 1)


def test_gsm8k_of_the_hub_is_main_unless_another_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    other = [{"question": "step by step?", "answer": "a"}]
    hub = Hub(
        monkeypatch,
        {
            ("openai/gsm8k", "main"): {"train": GSM8K, "test": GSM8K[1:]},
            ("openai/gsm8k", "socratic"): {"train": other},
            ("me/gsm8k", None): {"train": other},
        },
    )
    rows = load_rows("openai/gsm8k", format="gsm8k")
    assert texts(rows) == [(row["question"], row["answer"]) for row in GSM8K]
    assert [row.where for row in rows] == ["openai/gsm8k:main:1", "openai/gsm8k:main:2"]
    for source in ("openai/gsm8k:socratic", "me/gsm8k"):
        assert load_rows(source, format="gsm8k")[0].prompt == "step by step?"
    assert len(load_rows("openai/gsm8k", split="test", format="gsm8k-plain")) == 1
    assert hub.asked[1:] == [
        ("openai/gsm8k", "socratic", "train"),
        ("me/gsm8k", None, "train"),
        ("openai/gsm8k", "main", "test"),
    ]
    with pytest.raises(DataError, match=r"Unknown split \"dev\". Should be one of \['train', 'test'\]"):
        load_rows("openai/gsm8k", split="dev", format="gsm8k")


@pytest.mark.parametrize("file", ["/etc/passwd", "https://example.org/rows.jsonl", "zip://a.jsonl::/home/me/a.zip"])
def test_a_hub_data_set_lists_files_of_the_hub_alone(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch, {("me/rows", None): {"train": GSM8K}})
    hub.files = {"test": ["hf://datasets/me/rows@0/a.jsonl"], "train": ["hf://datasets/me/rows@0/b.jsonl", file]}
    with pytest.raises(DataError, match=f"'me/rows' lists the file '{file}', which is not on the Hub"):
        load_rows("me/rows", format="gsm8k")
    assert hub.asked == []
    hub.files = None  # offline, from the cache
    assert len(load_rows("me/rows", format="gsm8k")) == 2


def test_a_copy_of_a_hub_data_set_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    copy = tmp_path / "copy" / "data"
    copy.mkdir(parents=True)
    for split, rows in (("train", GSM8K), ("test", GSM8K[1:])):
        datasets.Dataset.from_list(rows).to_parquet(copy / f"{split}-00000-of-00001.parquet")
    datasets.Dataset.from_list(GSM8K).save_to_disk(tmp_path / "saved")
    assert len(load_rows(copy.parent, format="gsm8k")) == 2
    assert load_rows(copy.parent, split="test", format="gsm8k")[0].prompt == GSM8K[1]["question"]
    with pytest.raises(DataError, match=r"has no split 'dev' .*, only train, test"):
        load_rows(copy.parent, split="dev", format="gsm8k")
    assert load_rows(tmp_path / "saved", format="gsm8k")[0].completion == GSM8K[0]["answer"]


def test_configurations_of_a_copy_are_directories(tmp_path: Path) -> None:
    for name, rows in (("main", GSM8K), ("socratic", GSM8K[:1])):
        (tmp_path / name).mkdir()
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / name / "train-00000-of-00001.parquet")
    assert len(load_rows(tmp_path, format="gsm8k")) == 2
    assert len(load_rows(f"{tmp_path}:socratic", format="gsm8k")) == 1
    with pytest.raises(DataError, match="has no directory 'other' for the configuration"):
        load_rows(f"{tmp_path}:other", format="gsm8k")


def test_what_an_official_format_has_not_is_refused(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "train.jsonl", GSM8K)
    for complaint, options in {
        "format is 'gsm', expected one of rows, tulu, gsm8k, gsm8k-plain, or": {"format": "gsm"},
        "format 'builtins:dict' is a type, expected a collm.training.formats.Format": {"format": "builtins:dict"},
        "builtins has no such name": {"format": "builtins:ROWS"},
        "prompt_field and completion_field have no effect": {"format": "gsm8k", "prompt_field": "question"},
        "have no effect with format 'gsm8k'": {"format": "gsm8k", "completion_field": "answer"},
    }.items():
        with pytest.raises(ConfigError, match=complaint):
            load_rows(source, **options)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty has no gsm8k data; expected train.jsonl or test.jsonl, or a copy"):
        load_rows(tmp_path / "empty", format="gsm8k")
