"""BioASQ: the challenge's measures, on cases computed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collm.errors import DataError
from collm.evaluation.tasks.task import TaskItem
from collm.training.data import load_rows
from recipes.paper.bioasq import Bioasq, rouge_scores


def item(kind: str, entities: list[list[str]], ideal: tuple[str, ...] = ("It is so.",)) -> TaskItem:
    return TaskItem("1", "?", {"type": kind, "ideal": list(ideal), "entities": entities}, "here")


def exact(scores: dict[str, float]) -> dict[str, float]:
    return {name: score for name, score in scores.items() if not name.startswith("rouge")}


def bullets(*names: str) -> str:
    return "It is so.\nThe final answer is:" + "".join(f"\n- {name}" for name in names)


FACTOID = item("factoid", [["Insulin", "human insulin"]])


@pytest.mark.parametrize(
    ("text", "strict", "lenient", "mrr", "unparsed"),
    [
        (bullets("insulin"), 1, 1, 1, 0),
        (bullets("HUMAN  Insulin."), 1, 1, 1, 0),
        (bullets("glucagon", "insulin"), 0, 1, 1 / 2, 0),
        (bullets("a", "b", "c", "d", "insulin"), 0, 1, 1 / 5, 0),
        (bullets("a", "b", "c", "d", "e", "insulin"), 0, 0, 0, 0),
        (bullets("insulins"), 0, 0, 0, 0),
        ("The final answer is: Insulin.", 1, 1, 1, 0),
        ("so\nthe final answer is\n\n1. glucagon\n2) insulin\nBye", 0, 1, 1 / 2, 0),
        (bullets("glucagon") + "\nMore:\n- insulin", 0, 0, 0, 0),
        (bullets("glucagon") + "\n\nQuestion: next?\nThe final answer is:\n- insulin", 0, 0, 0, 0),
        ("It is insulin.", 0, 0, 0, 1),
        (bullets(), 0, 0, 0, 1),
        ("", 0, 0, 0, 1),
    ],
)
def test_factoid(text: str, strict: float, lenient: float, mrr: float, unparsed: float) -> None:
    assert exact(Bioasq().score(FACTOID, text)) == {
        "factoid_strict": strict,
        "factoid_lenient": lenient,
        "factoid_mrr": mrr,
        "unparsed": unparsed,
    }


@pytest.mark.parametrize(
    ("kinds", "measure"),
    [
        (["summary", "yesno", "list", "factoid"], "factoid_mrr"),
        (["summary", "yesno", "list"], "list_f1"),
        (["summary", "yesno"], "yesno_accuracy"),
        (["summary"], "rouge2_f1"),
    ],
)
def test_the_main_measure_is_one_that_the_items_have(kinds: list[str], measure: str) -> None:
    items = [item(kind, [["yes"]]) for kind in kinds]
    task = Bioasq()
    assert task.main_measure(items) == measure
    assert measure in task.aggregate([(one, "x", task.score(one, "x")) for one in items])


LIST = item("list", [["TP53", "p53"], ["BRCA1"], ["BRCA2"], ["PTEN"]])


@pytest.mark.parametrize(
    ("text", "precision", "recall", "f1"),
    [
        (bullets("TP53", "BRCA1", "BRCA2", "PTEN"), 1, 1, 1),
        (bullets("p53", "brca1"), 1, 1 / 2, 2 / 3),
        (bullets("p53", "TP53", "BRCA1"), 2 / 3, 1 / 2, 4 / 7),  # an entity counts once
        (bullets("p53", "myc", "ras", "egfr"), 1 / 4, 1 / 4, 1 / 4),
        ("The final answer is: p53, BRCA1; PTEN", 1, 3 / 4, 6 / 7),
        ("p53", 0, 0, 0),
    ],
)
def test_list(text: str, precision: float, recall: float, f1: float) -> None:
    scores = Bioasq().score(LIST, text)
    assert [scores[f"list_{name}"] for name in ("precision", "recall", "f1")] == pytest.approx([precision, recall, f1])


ANSWERED: list[tuple[str, list[list[str]], list[str]]] = [
    ("factoid", [["Insulin", "human insulin"]], ["Human insulin", "glucagon"]),
    ("factoid", [["transferrin"]], ["ferritin", "hepcidin", "Transferrin"]),
    ("factoid", [["AAV9"]], ["AAV2"]),
    ("list", [["TP53", "p53"], ["BRCA1"], ["BRCA2"], ["PTEN"]], ["p53", "TP53", "brca1", "myc"]),
    ("list", [["IL-6", "interleukin-6"], ["IL-6"], ["TNF"]], ["IL-6"]),
    ("list", [["aspirin"], ["ibuprofen"]], ["paracetamol"]),
    ("yesno", [["yes"]], ["yes"]),
    ("yesno", [["yes"]], ["yes"]),
    ("yesno", [["yes"]], ["no"]),
    ("yesno", [["no"]], ["no"]),
    ("yesno", [["no"]], ["yes"]),
    ("yesno", [["no"]], ["perhaps"]),
]


def test_measures_are_those_of_the_challenges_program() -> None:
    """What `evaluation.EvaluatorTask1b -phaseB -e 8` of BioASQ/Evaluation-Measures (8c8e689) prints for ANSWERED."""
    task = Bioasq()
    items = [(item(kind, entities), bullets(*names)) for kind, entities, names in ANSWERED]
    means = task.aggregate([(one, text, task.score(one, text)) for one, text in items])
    printed = {
        "yesno_accuracy": 0.5,
        "factoid_strict": 0.3333333333333333,
        "factoid_lenient": 0.6666666666666666,
        "factoid_mrr": 0.4444444444444444,
        "list_precision": 0.5,
        "list_recall": 0.3333333333333333,
        "list_f1": 0.38888888888888884,
        "yesno_macro_f1": 0.4857142857142857,
        "yesno_f1_yes": 0.5714285714285714,
        "yesno_f1_no": 0.4,
    }
    assert {name: means[name].mean for name in printed} == pytest.approx(printed)


def test_the_published_example_of_the_challenges_program() -> None:
    """Its `partalas_template.json` against `partalas_system.json`, whose first names alone count since BioASQ 5."""
    golden = item("list", [["A", "B", "C"], ["D", "E"], ["F", "G"], ["I", "J", "K"]])
    scores = Bioasq().score(golden, bullets("K", "K"))
    assert [scores[f"list_{name}"] for name in ("precision", "recall", "f1")] == pytest.approx([0.5, 0.25, 1 / 3])


@pytest.mark.parametrize(
    ("text", "accuracy", "unparsed"),
    [
        ("It does.\nThe final answer is: yes", 1, 0),
        ("The final answer is:\n- **Yes**", 1, 0),
        ("Yes, it does.", 1, 0),
        ("Yes, it does.\nThe final answer is: no", 0, 0),
        ("The final answer is: yesterday", 0, 1),
        ("Perhaps yes.", 0, 1),
        ("", 0, 1),
    ],
)
def test_yesno(text: str, accuracy: float, unparsed: float) -> None:
    scores = exact(Bioasq().score(item("yesno", [["yes"]]), text))
    assert scores == {"yesno_accuracy": accuracy, "unparsed": unparsed}


def test_a_summary_has_its_ideal_answer_alone() -> None:
    assert exact(Bioasq().score(item("summary", []), "It is so.")) == {}


def aggregated(answers: list[tuple[str, str]]) -> dict[str, Any]:
    task = Bioasq()
    scored = []
    for right, given_answer in answers:
        asked, text = item("yesno", [[right]]), f"The final answer is: {given_answer}"
        scored.append((asked, text, task.score(asked, text)))
    return {name: interval for name, interval in task.aggregate(scored).items() if name.startswith("yesno")}


def test_macro_f1_is_the_mean_of_both_classes() -> None:
    found = aggregated([("yes", "yes")] * 6 + [("yes", "no")] * 2 + [("no", "no")] * 1 + [("no", "yes")] * 3)
    means = {name: interval.mean for name, interval in found.items()}
    assert means["yesno_accuracy"] == pytest.approx(7 / 12)
    assert means["yesno_f1_yes"] == pytest.approx(12 / 17)  # 2*6 / (2*6 + 2 + 3)
    assert means["yesno_f1_no"] == pytest.approx(2 / 7)  # 2*1 / (2*1 + 2 + 3)
    assert means["yesno_macro_f1"] == pytest.approx((12 / 17 + 2 / 7) / 2)
    assert all(0 <= one.low < one.mean < one.high <= 1 for one in found.values())


def test_no_answer_counts_as_the_wrong_one() -> None:
    silent, wrong = (aggregated([("yes", "yes"), ("no", "no"), ("yes", answer)]) for answer in ("perhaps", "no"))
    assert silent == wrong


@pytest.mark.parametrize(
    ("answers", "f1_yes", "f1_no"),
    [
        ([("yes", "yes")] * 5 + [("no", "no")] * 3, 1, 1),
        ([("yes", "no")] * 5 + [("no", "yes")] * 3, 0, 0),
        ([("yes", "yes")] * 4, 1, 0),  # by the challenge's program, F1 of a class without questions is 0
    ],
)
def test_where_all_answers_are_alike_the_interval_is_no_point(
    answers: list[tuple[str, str]], f1_yes: float, f1_no: float
) -> None:
    found = aggregated(answers)
    assert (found["yesno_f1_yes"].mean, found["yesno_f1_no"].mean) == (f1_yes, f1_no)
    macro = found["yesno_macro_f1"]
    assert macro.mean == (f1_yes + f1_no) / 2
    assert 0 <= macro.low <= macro.mean <= macro.high <= 1
    assert macro.low < macro.high


def test_no_yesno_question_has_no_f1() -> None:
    task = Bioasq()
    assert "yesno_macro_f1" not in task.aggregate([(FACTOID, "", task.score(FACTOID, ""))])


def test_rouge_by_hand() -> None:
    scores = rouge_scores("The cat sat, the end.", ["the cat sat on mats"])
    # bigrams: the-cat, cat-sat of 4 wanted and 4 given
    assert scores["rouge2_recall"] == pytest.approx(2 / 4)
    assert scores["rouge2_f1"] == pytest.approx(2 / 4)
    # 5 words and 10 pairs each, none more than 3 words apart; in both: the, cat, sat and the 3 pairs of them
    assert scores["rouge_su4_recall"] == pytest.approx(6 / 15)
    assert scores["rouge_su4_f1"] == pytest.approx(6 / 15)


def test_pairs_have_at_most_four_words_between_them() -> None:
    near, far = "a 1 2 3 4 b", "a 1 2 3 4 5 b"
    assert rouge_scores("a b", [near])["rouge_su4_recall"] == pytest.approx(3 / (6 + 15))  # a, b and a-b
    assert rouge_scores("a b", [far])["rouge_su4_recall"] == pytest.approx(2 / (7 + 20))  # a-b is no pair
    assert rouge_scores("a b", [far])["rouge_su4_f1"] == pytest.approx(2 * 2 / (3 + 27))


@given(text=st.text("ab c."), references=st.lists(st.text("ab c."), min_size=1, max_size=4))
def test_rouge_is_the_best_over_the_references(text: str, references: list[str]) -> None:
    together, apart = rouge_scores(text, references), [rouge_scores(text, [reference]) for reference in references]
    assert together == {name: max(one[name] for one in apart) for name in together}
    from rouge_score.rouge_scorer import RougeScorer  # takes a second

    best = RougeScorer(["rouge2"]).score_multi(references, text)["rouge2"]
    assert together["rouge2_f1"] == pytest.approx(best.fmeasure)
    assert all(0 <= score <= 1 for score in together.values())


@given(text=st.text("ab c."))
def test_a_text_is_as_good_as_itself(text: str) -> None:
    if text.replace(".", " ").split():
        assert rouge_scores(text, [text])["rouge_su4_f1"] == 1


QUESTIONS = [
    {"id": "5a", "body": "What?", "type": "factoid", "ideal_answer": ["It is insulin."], "exact_answer": ["Insulin"]},
    {"id": "5b", "body": "Which?", "type": "list", "ideal_answer": ["a.", "b."], "exact_answer": [["A", "a1"], ["B"]]},
    {"id": "5c", "body": "Is it?", "type": "yesno", "ideal_answer": "Yes, it is.", "exact_answer": "Yes"},
    {"id": "5d", "body": "Why?", "type": "summary", "ideal_answer": ["Because it is so."]},
]


def golden(folder: Path, *questions: dict[str, Any]) -> Path:
    (folder / "11B1_golden.json").write_text(json.dumps({"questions": questions}, indent=1))
    return folder


def test_what_training_teaches_is_right(tmp_path: Path) -> None:
    task = Bioasq()
    items = task.load(golden(tmp_path, *QUESTIONS))
    rows = load_rows(tmp_path, split="test", format=Bioasq.format)
    assert [one.id for one in items] == ["5a", "5b", "5c", "5d"]
    assert [one.prompt for one in items] == [row.prompt for row in rows]
    for one, row in zip(items, rows, strict=True):
        scores = task.score(one, row.completion)
        assert scores.pop("unparsed", 0) == 0
        assert all(score == 1 for name, score in scores.items() if name != "rouge2_recall" and name != "rouge2_f1")
    assert task.score(items[3], "Because it is so.")["rouge2_f1"] == 1


def test_a_bad_question_is_named(tmp_path: Path) -> None:
    golden(tmp_path, QUESTIONS[0], {**QUESTIONS[1], "exact_answer": None})
    with pytest.raises(
        DataError, match=r"11B1_golden.json, row 2: no 'exact_answer', expected one for a list question"
    ):
        Bioasq().load(tmp_path)
