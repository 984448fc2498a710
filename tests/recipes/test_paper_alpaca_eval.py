"""AlpacaEval: the instructions go in, the file its judge reads comes out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from collm.errors import ConfigError, DataError
from recipes.paper.alpaca_eval import AlpacaEval

ROWS = [
    {"instruction": "Name a river.", "output": "The Po.", "generator": "reference", "dataset": "helpful_base"},
    {"instruction": "Say é.", "output": "é", "generator": "reference", "dataset": "koala"},
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "alpaca_eval.json"
    path.write_text(json.dumps(ROWS), encoding="utf-8")
    return path


def test_outputs_are_in_the_form_of_the_reference_outputs(source: Path) -> None:
    task = AlpacaEval()
    items = task.load(source)
    assert [item.prompt for item in items] == ["Name a river.", "Say é."]
    outputs = task.outputs(items, ["The Ebro.", ""], "ours")
    assert outputs == [
        {"instruction": "Name a river.", "output": "The Ebro.", "generator": "ours", "dataset": "helpful_base"},
        {"instruction": "Say é.", "output": "", "generator": "ours", "dataset": "koala"},
    ]
    assert [list(row) for row in outputs] == [list(row) for row in ROWS]


def test_nothing_is_scored_here(source: Path) -> None:
    task = AlpacaEval()
    (item, *_) = task.load(source)
    assert task.measure is None
    assert task.score(item, "anything") == {}
    assert task.aggregate([(item, "anything", {})]) == {}


def test_a_row_without_an_instruction_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[\n{"instruction": "x"},\n{"instruction": " "}]')
    with pytest.raises(DataError, match=r"a.json, row 2: 'instruction' is empty"):
        AlpacaEval().load(tmp_path / "a.json")


def test_there_are_no_shots(source: Path) -> None:
    with pytest.raises(ConfigError, match="'alpaca_eval' has no few-shot examples; leave shots out"):
        AlpacaEval().load(source, shots=1)
