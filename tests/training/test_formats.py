"""Official formats are read as their publishers ship them, and a row becomes exactly the text that is stated."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest

from collm.errors import ConfigError, DataError
from collm.training.data import Row, load_rows
from collm.training.formats import FORMATS

GSM8K = [
    {
        "question": "Ada bakes 12 rolls a day and sells half. How many rolls are left after 3 days?",
        "answer": "She keeps 12/2 = <<12/2=6>>6 rolls a day.\nAfter 3 days 6*3 = <<6*3=18>>18 are left.\n#### 18",
    },
    {"question": "A shelf holds $5 books, 4 of them. What are they worth?", "answer": "5*4=<<5*4=20>>20\n#### 20"},
]
MATH = {
    "problem": "What is $\\frac{1}{2} + \\frac{1}{3}$?",
    "level": "Level 2",
    "type": "Prealgebra",
    "solution": "Over 6 the sum is $\\frac{3+2}{6} = \\boxed{\\frac{5}{6}}$.",
}
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
SNIPPET = {"text": "Insulin is made by beta cells.", "document": "http://www.ncbi.nlm.nih.gov/pubmed/1"}


def bioasq(kind: str, ideal: Any = "It is so.", exact: Any = None, **changes: Any) -> dict[str, Any]:
    question = {"id": "5a", "body": "What makes insulin?", "type": kind, "snippets": [SNIPPET], "documents": ["1"]}
    return {**question, "ideal_answer": ideal, "exact_answer": exact, **changes}


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def questions(path: Path, *rows: Any, **others: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**others, "questions": rows}, indent=2), encoding="utf-8")
    return path


def math_tree(root: Path) -> Path:
    """Files made in an order that is neither theirs nor the alphabet's."""
    for name in ("train/geometry/10", "train/geometry/9", "train/algebra/2", "test/algebra/1", "train/algebra/11"):
        file = root / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({**MATH, "problem": name}, indent=4), encoding="utf-8")
    return root


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


def test_math_is_read_by_subject_and_number(tmp_path: Path) -> None:
    root = math_tree(tmp_path / "MATH")
    rows = load_rows(root, format="math")
    order = ["train/algebra/2", "train/algebra/11", "train/geometry/9", "train/geometry/10"]
    assert texts(rows) == [(name, MATH["solution"]) for name in order]
    assert [row.where for row in rows] == [f"{root}/{name}.json:1" for name in order]
    assert [row.prompt for row in load_rows(root, split="test", format="math")] == ["test/algebra/1"]
    with pytest.raises(DataError, match="has no split 'dev', only train, test"):
        load_rows(root, split="dev", format="math")
    with pytest.raises(DataError, match=r"has no math data; expected train/\*/\*.json or test/\*/\*.json"):
        load_rows(root / "train", format="math")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "one.json"])
def test_math_is_read_from_single_files(tmp_path: Path, name: str) -> None:
    source = tmp_path / name
    source.write_text({"rows.jsonl": json.dumps(MATH), "rows.json": json.dumps([MATH])}.get(name, json.dumps(MATH)))
    assert texts(load_rows(source, format="math")) == [(MATH["problem"], MATH["solution"])]


def test_a_tulu_chat_stays_a_chat(tmp_path: Path) -> None:
    row, again = (load_rows(found, format="tulu")[0] for found in (jsonl(tmp_path / "train.jsonl", [TULU]), tmp_path))
    assert row == again
    assert (row.prompt, row.completion, row.messages) == (TULU["messages"][:3], "The Ebro.", TULU["messages"])
    with pytest.raises(DataError, match="has no split 'test', only train"):
        load_rows(tmp_path, split="test", format="tulu")


@pytest.mark.parametrize(
    ("question", "completion"),
    [
        (bioasq("summary"), "It is so."),
        (bioasq("summary", ["It is so.", "Or said otherwise."], exact=[]), "It is so."),
        (bioasq("summary", [" ", " It is so.\n"]), "It is so."),
        (bioasq("yesno", "Yes, it is.", "yes"), "Yes, it is.\nThe final answer is: yes"),
        (bioasq("yesno", ["It is not."], ["No."]), "It is not.\nThe final answer is: no"),
        (bioasq("factoid", exact="beta cells"), "It is so.\nThe final answer is:\n- beta cells"),
        (bioasq("factoid", exact=["beta cells"]), "It is so.\nThe final answer is:\n- beta cells"),
        (
            bioasq("factoid", exact=[["beta cells", "B cells", "beta cells"]]),
            "It is so.\nThe final answer is:\n- beta cells\n- B cells",
        ),
        (
            bioasq("factoid", exact=["beta cells", "B cells"]),
            "It is so.\nThe final answer is:\n- beta cells\n- B cells",
        ),
        (bioasq("list", exact=[["zinc", "Zn"], ["calcium"]]), "It is so.\nThe final answer is:\n- zinc\n- calcium"),
        (bioasq("list", exact=["zinc", " calcium "]), "It is so.\nThe final answer is:\n- zinc\n- calcium"),
        (bioasq("list", exact=[["", "zinc, bound"], []]), "It is so.\nThe final answer is:\n- zinc, bound"),
    ],
)
def test_bioasq_answers_end_with_the_exact_answer(tmp_path: Path, question: Any, completion: str) -> None:
    source = questions(tmp_path / "training11b.json", question, name="BioASQ")
    assert texts(load_rows(source, format="bioasq")) == [("What makes insulin?", completion)]


@pytest.mark.parametrize(
    ("question", "complaint"),
    [
        (bioasq("factoid"), "no 'exact_answer', expected one for a factoid question"),
        (bioasq("list", exact=[[" "], []]), "no 'exact_answer', expected one for a list question"),
        (
            {key: value for key, value in bioasq("yesno").items() if key != "exact_answer"},
            "no 'exact_answer', expected one for a",
        ),
        (bioasq("yesno", exact="perhaps"), "'exact_answer' is 'perhaps', expected yes or no"),
        (bioasq("yesno", exact=["yes", "no"]), "'exact_answer' is ['yes', 'no'], expected yes or no"),
        (bioasq("list", exact=[[["zinc"]]]), "'exact_answer' contains a list, expected text"),
        (bioasq("factoid", exact=7), "'exact_answer' contains a int, expected text"),
        (bioasq("summary", None), "no 'ideal_answer'"),
        (bioasq("summary", []), "no 'ideal_answer'"),
        (bioasq("summary", {"a": 1}), "'ideal_answer' contains a dict, expected text"),
        (bioasq("essay"), "'type' is 'essay', expected one of factoid, list, yesno, summary"),
        (bioasq("summary", body=""), "'body' is empty"),
        ("a question", "the row is a str"),
    ],
)
def test_a_bad_bioasq_question_names_its_number(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, question: Any, complaint: str
) -> None:
    source = questions(tmp_path / "training11b.json", bioasq("summary"), question, note=["}", '"questions": ['])
    with pytest.raises(DataError) as caught:
        load_rows(source, format="bioasq")
    assert str(caught.value).startswith(f"{source}:2: ")
    assert complaint in str(caught.value)
    with caplog.at_level(logging.WARNING):
        rows = load_rows(source, format="bioasq", bad_rows="skip")
    assert (len(rows), rows.num_bad) == (1, 1)
    assert f"{source}:2: " in caplog.text


def test_a_bioasq_directory_has_its_splits(tmp_path: Path) -> None:
    questions(tmp_path / "BioASQ-training11b" / "training11b.json", bioasq("summary", body="train"))
    for batch in (10, 2, 1):
        questions(tmp_path / "Task11BGoldenEnriched" / f"11B{batch}_golden.json", bioasq("summary", body=f"{batch}"))
    assert [row.prompt for row in load_rows(tmp_path, format="bioasq")] == ["train"]
    assert [row.prompt for row in load_rows(tmp_path, split="test", format="bioasq")] == ["1", "2", "10"]
    with pytest.raises(DataError, match="has no split 'train', only test"):
        load_rows(tmp_path / "Task11BGoldenEnriched", format="bioasq")
    questions(tmp_path / "training10b.json", bioasq("summary"))
    with pytest.raises(DataError, match=r"has 2 editions \(10b, 11b\) of bioasq, expected one"):
        load_rows(tmp_path, format="bioasq")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"questions": [\n{"body": ', ":2: bad JSON"),
        ('{"questions": [{}]\n} x', ":2: bad JSON"),
        ('{"questions": {"body": "b"}}', 'no list of rows; expected {"questions": [...]}'),
        ('{"body": "b"}', 'no list of rows; expected {"questions": [...]}'),
        ('{"questions": []}', "has no rows"),
    ],
)
@pytest.mark.parametrize("bad_rows", ["stop", "skip"])
def test_a_bioasq_file_that_cannot_be_read_stops(tmp_path: Path, text: str, complaint: str, bad_rows: str) -> None:
    source = tmp_path / "training11b.json"
    source.write_text(text)
    with pytest.raises(DataError) as caught:
        load_rows(source, format="bioasq", bad_rows=bad_rows)
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("name", "row", "complaint"),
    [
        ("gsm8k", {"question": "q"}, "no field 'answer', the row has 'question'"),
        ("gsm8k", {"question": None, "answer": "a"}, "no field 'question', the row has 'answer'"),
        ("gsm8k-plain", {"question": "q", "answer": "<<1+1=2>>"}, "'completion' is empty"),
        ("math", {"problem": "p", "solution": " "}, "'solution' is empty"),
        ("math", {"question": "p", "solution": "s"}, "no field 'problem', the row has 'question', 'solution'"),
        ("tulu", {"id": "a", "prompt": "p", "completion": "c"}, "no field 'messages', the row has 'id', 'prompt'"),
        ("tulu", {"messages": TULU["messages"][:1]}, "no assistant turn to train on"),
        ("tulu", "text", "the row is a str"),
    ],
)
def test_a_row_of_another_form_is_bad(tmp_path: Path, name: str, row: Any, complaint: str) -> None:
    good = {"tulu": TULU, "math": MATH}.get(name, GSM8K[0])
    source = jsonl(tmp_path / "rows.jsonl", [good, row])
    with pytest.raises(DataError) as caught:
        load_rows(source, format=name)
    assert str(caught.value).startswith(f"{source}:2: ")
    assert complaint in str(caught.value)
    rows = load_rows(source, format=name, bad_rows="skip")
    assert (len(rows), rows.num_bad) == (1, 1)


def test_a_bad_file_of_a_tree_is_one_bad_row(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = math_tree(tmp_path)
    broken = root / "train" / "algebra" / "3.json"
    broken.write_text('{\n"problem": "p",\n"solution": ')
    with pytest.raises(DataError, match=r"train/algebra/3.json:3: bad JSON"):
        load_rows(root, format="math")
    with caplog.at_level(logging.WARNING):
        rows = load_rows(root, format="math", bad_rows="skip")
    assert (len(rows), rows.num_bad) == (4, 1)
    assert f"{broken}:3: bad JSON" in caplog.text


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


def test_math_of_the_hub_is_every_subject_unless_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "EleutherAI/hendrycks_math"
    subjects = FORMATS["math"].configurations
    assert len(subjects) == 7
    Hub(monkeypatch, {(name, subject): {"test": [{**MATH, "problem": subject}]} for subject in reversed(subjects)})
    rows = load_rows(name, split="test", format="math")
    assert [row.prompt for row in rows] == list(subjects)
    assert rows[0].where == f"{name}:algebra:1"
    assert [row.prompt for row in load_rows(f"{name}:geometry", split="test", format="math")] == ["geometry"]


def test_tulu_and_bioasq_come_from_the_hub_too(monkeypatch: pytest.MonkeyPatch) -> None:
    golden = [bioasq("yesno", ["It does."], "yes"), bioasq("yesno", ["It may."], "maybe")]
    tulu = "allenai/tulu-v2-sft-mixture"
    Hub(monkeypatch, {(tulu, None): {"train": [TULU]}, ("me/bioasq", None): {"train": golden}})
    assert load_rows(tulu, format="tulu")[0].messages == TULU["messages"]
    with pytest.raises(DataError, match=r"Should be one of \['train'\]"):
        load_rows(tulu, split="test", format="tulu")
    with pytest.raises(DataError, match=r"^me/bioasq:2: 'exact_answer' is 'maybe'"):
        load_rows("me/bioasq", format="bioasq")
    rows = load_rows("me/bioasq", format="bioasq", bad_rows="skip")
    assert (texts(rows), rows.num_bad) == ([("What makes insulin?", "It does.\nThe final answer is: yes")], 1)


def test_a_copy_of_a_hub_data_set_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    copy = tmp_path / "copy" / "data"
    copy.mkdir(parents=True)
    for split, rows in (("train", GSM8K), ("test", GSM8K[1:])):
        datasets.Dataset.from_list(rows).to_parquet(copy / f"{split}-00000-of-00001.parquet")
    datasets.Dataset.from_list([MATH]).save_to_disk(tmp_path / "saved")
    assert len(load_rows(copy.parent, format="gsm8k")) == 2
    assert load_rows(copy.parent, split="test", format="gsm8k")[0].prompt == GSM8K[1]["question"]
    with pytest.raises(DataError, match=r"has no split 'dev' .*, only train, test"):
        load_rows(copy.parent, split="dev", format="gsm8k")
    assert load_rows(tmp_path / "saved", format="math")[0].completion == MATH["solution"]


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
    with pytest.raises(ConfigError, match="format is 'gsm', expected one of rows, tulu, gsm8k, gsm8k-plain, math, bio"):
        load_rows(source, format="gsm")
    for names in ({"prompt_field": "question"}, {"completion_field": "answer"}):
        with pytest.raises(ConfigError, match="no effect with format 'gsm8k'"):
            load_rows(source, format="gsm8k", **names)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty has no gsm8k data; expected train.jsonl or test.jsonl, or a copy"):
        load_rows(tmp_path / "empty", format="gsm8k")
