"""GSM8K: the final number counts, by its value and however it is written."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collm.errors import ConfigError, DataError
from collm.evaluation.tasks.gsm8k import Gsm8k, final_number
from collm.evaluation.tasks.task import TaskItem
from tests.evaluation.tasks.files import jsonl

ROWS = [
    {"question": "Ada has 2*9 rolls. How many?", "answer": "2*9 = <<2*9=18>>18 rolls.\n#### 18"},
    {"question": "What do 1,300 books cost at $2?", "answer": "1300*2=<<1300*2=2600>>2600\n#### 2,600"},
    {"question": "How cold is it?", "answer": "It fell 5 below 0.\n#### -5"},
]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("9*2 = <<9*2=18>>18.\n#### 18", "18"),
        ("#### $1,234.50.", "1234.5"),
        ("#### 18\n\nA robe takes 2 bolts ...\n#### 3", "18"),
        ("#### \u22125 degrees for 3 days", "-5"),
        ("#### Step 1\nWe add.\n#### Step 2\nThe answer is 7.", "7"),  # headings
        ("18 then.\n####", "18"),
        ("The final answer is: 18.00", "18"),
        ("The answer is $-5 for 2.", "-5"),
        ("The answer is 5*3 = 15 dollars for 2 days.", "15"),
        ("The answer is 15 = fifteen", "15"),
        ("The answer is:\n\n**70,000**\n\nin 3 years", "70000"),
        ("It takes 3 bags of 4. The answer is twelve.", None),
        ("The answer is 4. Wait, no: the answer is 5.", "5"),
        ("It costs 2 + 3 = $1,234.5.", "1234.5"),
        ("that is 50%", "50"),
        ("5-3", "3"),
        ("18\n\nQuestion: Tom has 3 apples. How many?\n#### 3", "18"),
        ("Question: Ada has 2 rolls?\nAnswer: 18\n\nQuestion: Tom has 3 apples?\n#### 3", "18"),
        ("2 rolls, <<1+1=2>>", "2"),
        ("\x00 18 \x1b[0m", "0"),
        (r"\frac{1}{2}", "2"),
        ("eighteen", None),
        ("", None),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


@given(value=st.decimals(allow_nan=False, allow_infinity=False, places=2, min_value=-(10**9), max_value=10**9))
@pytest.mark.parametrize("form", ["17 and 4.\n#### {:,f}", "17. The final answer is: ${:,f}.", "17, so {:f}"])
def test_the_value_counts_and_not_its_spelling(form, value):
    item = TaskItem("1", "?", str(value.normalize()), "here")
    assert Gsm8k().score(item, form.format(value)) == {"accuracy": 1, "unparsed": 0}
    assert Gsm8k().score(item, form.format(value + 1)) == {"accuracy": 0, "unparsed": 0}


def test_items_are_the_published_rows(tmp_path: Path) -> None:
    task = Gsm8k()
    items = task.load(jsonl(tmp_path / "test.jsonl", *ROWS))
    for item, row, reference in zip(items, ROWS, ("18", "2600", "-5"), strict=True):
        assert (item.prompt, item.reference) == (row["question"], reference)
        assert task.score(item, row["answer"]) == {"accuracy": 1, "unparsed": 0}
    assert [item.id for item in items] == ["1", "2", "3"]
    assert task.score(items[0], "no idea") == {"accuracy": 0, "unparsed": 1}


@pytest.mark.parametrize("answer", ["18", "It is 18 ####", "#### 18 or 19", "#### eighteen"])
def test_a_row_without_its_final_number_is_named(tmp_path: Path, answer: str) -> None:
    source = jsonl(tmp_path / "test.jsonl", ROWS[0], {"question": "?", "answer": answer})
    with pytest.raises(DataError, match=r"test.jsonl:2: 'answer' ends with .*, expected '####' and one number"):
        Gsm8k().load(source)


@pytest.mark.parametrize(("chosen", "marked"), [("gsm8k", True), ("gsm8k-plain", False)])
def test_shots_have_the_marks_of_their_format(tmp_path: Path, chosen: str, marked: bool) -> None:
    jsonl(tmp_path / "train.jsonl", ROWS[1])
    jsonl(tmp_path / "test.jsonl", ROWS[0])
    (item,) = Gsm8k(chosen).load(tmp_path, shots=1)
    assert ("<<" in item.shots[0][1]) == marked
    assert item.shots[0][1].endswith("#### 2,600")
    with pytest.raises(ConfigError, match="'math', expected gsm8k or gsm8k-plain"):
        Gsm8k("math")
