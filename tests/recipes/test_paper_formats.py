"""Formats of the paper's data sets are read as their publishers ship them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from collm.errors import DataError
from collm.training.data import load_rows
from recipes.paper import formats
from tests.training.test_formats import Hub, texts

MATH, BIOASQ = "recipes.paper.formats:MATH", "recipes.paper.formats:BIOASQ"
PROBLEM = {
    "problem": "What is $\\frac{1}{2} + \\frac{1}{3}$?",
    "level": "Level 2",
    "type": "Prealgebra",
    "solution": "Over 6 the sum is $\\frac{3+2}{6} = \\boxed{\\frac{5}{6}}$.",
}
SNIPPET = {"text": "Insulin is made by beta cells.", "document": "http://www.ncbi.nlm.nih.gov/pubmed/1"}


def bioasq(kind: str, ideal: Any = "It is so.", exact: Any = None, **changes: Any) -> dict[str, Any]:
    question = {"id": "5a", "body": "What makes insulin?", "type": kind, "snippets": [SNIPPET], "documents": ["1"]}
    return {**question, "ideal_answer": ideal, "exact_answer": exact, **changes}


def questions(path: Path, *rows: Any, **others: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**others, "questions": rows}, indent=2), encoding="utf-8")
    return path


def math_tree(root: Path) -> Path:
    """Files made in an order that is neither theirs nor the alphabet's."""
    for name in ("train/geometry/10", "train/geometry/9", "train/algebra/2", "test/algebra/1", "train/algebra/11"):
        file = root / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({**PROBLEM, "problem": name}, indent=4), encoding="utf-8")
    return root


def test_math_is_read_by_subject_and_number(tmp_path: Path) -> None:
    root = math_tree(tmp_path / "MATH")
    rows = load_rows(root, format=MATH)
    order = ["train/algebra/2", "train/algebra/11", "train/geometry/9", "train/geometry/10"]
    assert texts(rows) == [(name, PROBLEM["solution"]) for name in order]
    assert [row.where for row in rows] == [f"{root}/{name}.json, row 1" for name in order]
    assert [row.prompt for row in load_rows(root, split="test", format=MATH)] == ["test/algebra/1"]
    with pytest.raises(DataError, match="has no split 'dev', only train, test"):
        load_rows(root, split="dev", format=MATH)
    with pytest.raises(DataError, match=r"has no math data; expected train/\*/\*.json or test/\*/\*.json"):
        load_rows(root / "train", format=MATH)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "one.json"])
def test_math_is_read_from_single_files(tmp_path: Path, name: str) -> None:
    source = tmp_path / name
    source.write_text(json.dumps([PROBLEM] if name == "rows.json" else PROBLEM))
    assert texts(load_rows(source, format=MATH)) == [(PROBLEM["problem"], PROBLEM["solution"])]


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
    assert texts(load_rows(source, format=BIOASQ)) == [("What makes insulin?", completion)]


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
        load_rows(source, format=BIOASQ)
    assert str(caught.value).startswith(f"{source}, row 2: ")
    assert complaint in str(caught.value)
    with caplog.at_level(logging.WARNING):
        rows = load_rows(source, format=BIOASQ, bad_rows="skip")
    assert (len(rows), rows.num_bad) == (1, 1)
    assert f"{source}, row 2: " in caplog.text


def test_a_bioasq_directory_has_its_splits(tmp_path: Path) -> None:
    questions(tmp_path / "BioASQ-training11b" / "training11b.json", bioasq("summary", body="train"))
    for batch in (10, 2, 1):
        questions(tmp_path / "Task11BGoldenEnriched" / f"11B{batch}_golden.json", bioasq("summary", body=f"{batch}"))
    assert [row.prompt for row in load_rows(tmp_path, format=BIOASQ)] == ["train"]
    assert [row.prompt for row in load_rows(tmp_path, split="test", format=BIOASQ)] == ["1", "2", "10"]
    with pytest.raises(DataError, match="has no split 'train', only test"):
        load_rows(tmp_path / "Task11BGoldenEnriched", format=BIOASQ)
    questions(tmp_path / "training10b.json", bioasq("summary"))
    with pytest.raises(DataError, match=r"has 2 editions \(10b, 11b\) of bioasq, expected one"):
        load_rows(tmp_path, format=BIOASQ)


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
        load_rows(source, format=BIOASQ, bad_rows=bad_rows)
    assert complaint in str(caught.value)


def test_a_bad_file_of_a_tree_is_one_bad_row(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = math_tree(tmp_path)
    broken = root / "train" / "algebra" / "3.json"
    broken.write_text('{\n"problem": "p",\n"solution": ')
    with pytest.raises(DataError, match=r"train/algebra/3.json:3: bad JSON"):
        load_rows(root, format=MATH)
    with caplog.at_level(logging.WARNING):
        rows = load_rows(root, format=MATH, bad_rows="skip")
    assert (len(rows), rows.num_bad) == (4, 1)
    assert f"{broken}:3: bad JSON" in caplog.text


def test_math_of_the_hub_is_every_subject_unless_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "EleutherAI/hendrycks_math"
    subjects = formats.MATH.configurations
    assert len(subjects) == 7
    Hub(monkeypatch, {(name, subject): {"test": [{**PROBLEM, "problem": subject}]} for subject in reversed(subjects)})
    rows = load_rows(name, split="test", format=MATH)
    assert [row.prompt for row in rows] == list(subjects)
    assert rows[0].where == f"{name}:algebra:1"
    assert [row.prompt for row in load_rows(f"{name}:geometry", split="test", format=MATH)] == ["geometry"]
