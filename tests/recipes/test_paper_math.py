"""MATH: answers are equal by value, and no answer raises, hangs or needs the main thread."""

from __future__ import annotations

import json
import logging
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from math_verify.few_shots import MATH_HARD_FEW_SHOTS

from collm.errors import ConfigError, DataError
from collm.evaluation.tasks.task import TaskItem
from recipes.paper import equivalence
from recipes.paper.hendrycks_math import HendrycksMath, final_answer
from tests.evaluation.tasks.files import jsonl

RIGHT, WRONG, UNPARSED = ({"accuracy": a, "unparsed": u} for a, u in ((1, 0), (0, 0), (0, 1)))


@pytest.fixture(scope="module")
def task() -> HendrycksMath:
    return HendrycksMath()


def item(reference: str) -> TaskItem:
    return TaskItem("1", "?", reference, "here")


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "reference", "given"),
    [
        ("algebra/155", r"\$15,\!000", "15000"),
        ("algebra/101", r"x \in [-2,7]", "[-2, 7]"),
        (
            "algebra/1123",
            r"\left(-\infty,-\frac 12\right)\cup \left(-\frac 12,\infty\right)",
            r"(-\infty,-0.5)\cup(-0.5,\infty)",
        ),
        ("algebra/1253", "b=4", "4"),
        ("algebra/137", r"575\text{ students}", "575"),
        ("algebra/1239", r"\frac{\sqrt7}{14}", r"\dfrac{1}{2\sqrt{7}}"),
        ("algebra/1820", r"44\%", "44"),
        ("algebra/2359", r"\text{June 20}", "June 20"),
        ("geometry/102", r"39^\circ", "39"),
        ("intermediate_algebra/169", r"\text{A,D}", "A, D"),
        ("intermediate_algebra/662", r"1 \pm \sqrt{19}", r"1 \pm 19^{1/2}"),
        ("number_theory/1118", "2112_6", "2112_{6}"),
        ("prealgebra/1462", r"\text{4:30 p.m.}", r"4:30 \text{ p.m.}"),
        ("precalculus/101", r"\begin{pmatrix} 1 \\ 4 \\ 3 \end{pmatrix}", r"\begin{bmatrix}1\\4\\3\end{bmatrix}"),
    ],
)
def test_answers_of_the_published_rows_in_other_words(
    task: HendrycksMath, name: str, reference: str, given: str
) -> None:
    """Rows of the test split, by the names of their files."""
    assert task.score(item(reference), f"\\boxed{{{given}}}") == RIGHT, name
    assert task.score(item(reference), f"So the answer is ${given}$.") == RIGHT, name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reference", "given"),
    [
        (r"\text{June 20}", "June 21"),
        (r"\text{A,D}", "A, C"),
        (r"\text{4:30 p.m.}", "4:31 p.m."),
        (r"x \in [-2,7]", "(-2,7]"),
        (r"1 \pm \sqrt{19}", r"1 + \sqrt{19}"),
        (r"575\text{ students}", "576"),
        (r"\begin{pmatrix} 1 \\ 4 \\ 3 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 3 \\ 4 \end{pmatrix}"),
    ],
)
def test_other_answers_to_the_published_rows(task: HendrycksMath, reference: str, given: str) -> None:
    assert task.score(item(reference), f"\\boxed{{{given}}}") == WRONG


def test_whole_published_rows(tmp_path: Path, task: HendrycksMath) -> None:
    """Each solution ends in a sentence with the answer, which is compared with the box of each row."""
    rows = [{"problem": row["question"], "solution": row["answer"]} for row in MATH_HARD_FEW_SHOTS]
    items = task.load(jsonl(tmp_path / "rows.jsonl", *rows))
    endings = [row["solution"].splitlines()[-1] for row in rows]
    scores = [[task.score(one, ending)["accuracy"] for ending in endings] for one in items]
    assert [one.reference for one in items] == ["[2,5)", "24", "16", r"-\frac{2}{3}"]
    assert scores == [[float(row == column) for column in range(4)] for row in range(4)]


def test_other_threads_may_compare(task: HendrycksMath) -> None:
    pairs = [("1/2", "0.5"), ("3", "4"), ("2x", "x+x"), ("x", "y")] * 5
    with ThreadPoolExecutor(4) as threads:
        scores = list(threads.map(lambda pair: task.score(item(pair[0]), f"\\boxed{{{pair[1]}}}"), pairs))
    assert scores == [RIGHT, WRONG, RIGHT, WRONG] * 5


@pytest.mark.slow
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
    with pytest.raises(DataError, match=r"1.json, row 1: no \\boxed{...} in 'solution'"):
        task.load(tmp_path)


def test_a_missing_library_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ConfigError, match="pip install math-verify"):
        HendrycksMath()
