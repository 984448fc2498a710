"""MATH: answers are equal by value, and no answer raises, hangs or needs the main thread."""

from __future__ import annotations

import json
import logging
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from collm.errors import DataError, MissingExtra
from collm.evaluation.tasks import equivalence
from collm.evaluation.tasks.math import HendrycksMath, final_answer
from collm.evaluation.tasks.task import TaskItem

RIGHT, WRONG, UNPARSED = ({"accuracy": a, "unparsed": u} for a, u in ((1, 0), (0, 0), (0, 1)))


@pytest.fixture(scope="module")
def task() -> HendrycksMath:
    return HendrycksMath()


def item(reference: str) -> TaskItem:
    return TaskItem("1", "?", reference, "here")


@pytest.mark.parametrize(
    ("reference", "text", "score"),
    [
        (r"\frac{5}{6}", r"So it is $\boxed{\dfrac{5}{6}}$.", RIGHT),
        (r"\frac{1}{2}", r"First \boxed{1}, no: \boxed{0.5}", RIGHT),
        (r"\frac12", "The final answer is $1/2$. I hope it is correct.", RIGHT),
        (r"\sqrt{8}", r"\boxed{2\sqrt{2}}", RIGHT),
        ("1,000", r"\boxed{1000}", RIGHT),
        ("x^2+1", r"The final answer is: 1 + x^2", RIGHT),
        (r"\text{Evelyn}", r"\boxed{Evelyn}", RIGHT),
        ("(1,2)", r"\boxed{(1, 2)}", RIGHT),
        ("5", "\\boxed{5}\n\nProblem: What is 2+2?\nSolution: \\boxed{4}", RIGHT),
        ("5", r"\boxed{6}", WRONG),
        ("(1,2)", r"\boxed{(2,1)}", WRONG),
        ("5", r"\boxed{\frac{5}{}}", WRONG),
        ("5", "\\boxed{\x00\ud800\\left(}", WRONG),
        ("5", r"\boxed{" + "1+" * 5000 + "0}", WRONG),
        ("5", r"\boxed{\frac{5}{1}", UNPARSED),
        ("5", "It may be 5.", UNPARSED),
        ("5", r"\boxed{}", UNPARSED),
        ("5", "", UNPARSED),
    ],
)
def test_scores(task: HendrycksMath, reference: str, text: str, score: dict[str, float]) -> None:
    assert task.score(item(reference), text) == score


def test_other_threads_may_compare(task: HendrycksMath) -> None:
    pairs = [("1/2", "0.5"), ("3", "4"), ("2x", "x+x"), ("x", "y")] * 5
    with ThreadPoolExecutor(4) as threads:
        scores = list(threads.map(lambda pair: task.score(item(pair[0]), f"\\boxed{{{pair[1]}}}"), pairs))
    assert scores == [RIGHT, WRONG, RIGHT, WRONG] * 5


def test_what_takes_forever_is_given_up(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(equivalence, "JUDGE", replace(equivalence.JUDGE, seconds=3.0))
    task = HendrycksMath()
    with caplog.at_level(logging.WARNING):
        assert task.score(item("10"), r"\boxed{9^{9^{9}}}") == WRONG
    assert "'10' and '9^{9^{9}}' could not be compared, so they count as different" in caplog.text
    assert task.score(item("2"), r"\boxed{1+1}") == RIGHT


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"the answer is 3, so \boxed{4}", "4"),
        ("The answer is $x = 5$. Bye.", "x = 5"),
        ("The final answer is:\n3.5", "3.5"),
        ("nothing", ""),
    ],
)
def test_final_answer(text: str, answer: str) -> None:
    assert final_answer(text) == answer


def test_items_are_the_published_rows(tmp_path: Path, task: HendrycksMath) -> None:
    folder = tmp_path / "test" / "algebra"
    folder.mkdir(parents=True)
    row = {"problem": "Half?", "level": "Level 1", "type": "Algebra", "solution": r"It is $\boxed{\frac{1}{2}}$."}
    (folder / "1.json").write_text(json.dumps(row))
    (found,) = task.load(tmp_path)
    assert (found.prompt, found.reference) == ("Half?", r"\frac{1}{2}")
    assert task.score(found, row["solution"]) == RIGHT
    (folder / "1.json").write_text(json.dumps({**row, "solution": "It is 1/2."}))
    with pytest.raises(DataError, match=r"1.json:1: no \\boxed{...} in 'solution'"):
        task.load(tmp_path)


def test_a_missing_library_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(MissingExtra, match=r"math-verify is not installed; .* 'collm\[eval\]'"):
        HendrycksMath()
