"""Multiple choice: the letter is found however it is written, and not where none is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from collm.errors import ConfigError, DataError
from collm.evaluation.tasks.multiple_choice import MultipleChoice, chosen_letter
from tests.evaluation.tasks.files import jsonl

CHOICES = {"A": "Paris", "B": "New York", "C": "York", "D": "a dog"}
ROW = {"question": "Where?", "choices": list(CHOICES.values()), "answer": "B"}


@pytest.mark.parametrize(
    "text",
    [
        "We think.\nThe final answer is: B",
        "The final answer is: B.",
        "The final answer is: **B**",
        "The final answer is (B).",
        "The final answer is: b",
        "The final answer is: (b)",
        "The final answer is: B. New York",
        "The final answer is option B",
        "The final answer is:\n\nB",
        "The final answer is: New York.",
        "The final answer is: new york, as A is wrong.",
        "The final answer is in New York",
        "So the answer is B because A and C are wrong.",
        r"The final answer is $\boxed{B}$.",
        r"The final answer is \(\boxed{\text{B}}\)",
        r"The answer is A. No: the answer is B",
        r"It follows that \boxed{\text{(B)}}",
        r"\boxed{New York}",
        "We think.\n**B**",
        "B",
        "(B)",
        "B. New York",
        "**Answer:** B",
        "Answer: (B)",
        "The correct answer is the second option, (B).",
        "Paris is wrong, so it must be (B)",
        "New York",
        "The final answer is: B\n\nQuestion: Where else?\nThe final answer is: C",
        "Question: Where?\nThe final answer is: B",
    ],
)
def test_named(text: str) -> None:
    assert chosen_letter(text, CHOICES) == "B"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "The final answer is: X",
        "The final answer is: Berlin",
        "The final answer is not B",
        "Paris is not New York",
        "The final answer is: it may be Paris or a dog",
        "A place is missing here",
        "I do not know",
        "(Z)",
        "(A) is wrong, so it must be (B)",
        "\x00",
    ],
)
def test_none_is_named(text: str) -> None:
    assert chosen_letter(text, CHOICES) is None


def test_an_article_is_no_letter() -> None:
    assert chosen_letter("The answer is A dog", CHOICES) == "D"
    assert chosen_letter("The answer is A", CHOICES) == "A"


def test_the_prompt_lists_the_choices(tmp_path: Path) -> None:
    (item,) = MultipleChoice().load(jsonl(tmp_path / "mc.jsonl", ROW))
    assert isinstance(item.prompt, str)
    assert item.prompt.startswith("Where?\n\nA. Paris\nB. New York\nC. York\nD. a dog\n\nThink step by step")
    assert item.prompt.endswith('"The final answer is: X", where X is the letter of the right choice.')


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"answer": "b"},
        {"answer": 1},
        {"answer": " new york. "},
        {"choices": CHOICES},
        {"choices": {"a": "Paris", "b": "New York"}},
    ],
)
def test_answers_and_choices_may_be_written_so(tmp_path: Path, row: dict[str, Any]) -> None:
    task = MultipleChoice()
    (item,) = task.load(jsonl(tmp_path / "mc.jsonl", {**ROW, **row}))
    assert task.score(item, "The final answer is: B") == {"accuracy": 1, "unparsed": 0}
    assert task.score(item, "The final answer is: A") == {"accuracy": 0, "unparsed": 0}
    assert task.score(item, "Hard to tell") == {"accuracy": 0, "unparsed": 1}


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"answer": "E"}, "'answer' is 'E', which means 0 of the choices"),
        ({"answer": 4}, "means 0"),
        ({"answer": -1}, "means 0"),
        ({"answer": True}, "means 0"),
        ({"answer": None}, "means 0"),
        ({"choices": ["B", "A"], "answer": "B"}, "means 2"),
        ({"choices": ["same", "same"], "answer": "same"}, "means 2"),
        ({"choices": ["one"], "answer": 0}, "expected 2 to 26 texts"),
        ({"choices": ["x"] * 27}, "expected 2 to 26 texts"),
        ({"choices": ["x", 3]}, "expected 2 to 26 texts"),
        ({"choices": {"text": "x", "label": "y"}}, "expected 2 to 26 texts"),
        ({"choices": {"a": "x", "A": "y"}}, "expected 2 to 26 texts"),
        ({"choices": "AB"}, "expected 2 to 26 texts"),
        ({"question": ""}, "'question' is empty"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: dict[str, Any], complaint: str) -> None:
    source = jsonl(tmp_path / "mc.jsonl", ROW, {**ROW, **row})
    with pytest.raises(DataError, match=f"mc.jsonl:2: .*{complaint}"):
        MultipleChoice().load(source)


def test_there_are_no_shots(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "mc.jsonl", ROW)
    with pytest.raises(ConfigError, match="'multiple_choice' has no few-shot examples; leave shots out"):
        MultipleChoice().load(source, shots=1)
