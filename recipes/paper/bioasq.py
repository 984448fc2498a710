"""BioASQ task B: exact and ideal answers, with the measures of the challenge."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

import torch
from torch import Tensor

from collm.evaluation.intervals import Interval, ratio_interval, statistic_interval
from collm.evaluation.tasks.gsm8k import NEXT_QUESTION, before_next_question
from collm.evaluation.tasks.task import Scored, Task, TaskItem
from collm.training.data import Row, load_records
from recipes.paper.formats import bioasq_completion, bioasq_question

MAX_FACTOID_ANSWERS = 5
"""Number of names of a factoid answer that count."""

_FINAL = re.compile(r"\bthe\s{1,9}final\s{1,9}answer\s{1,9}is\b[ \t]{0,9}:?", re.IGNORECASE)
_BULLET = re.compile(r"(?:[-*•]|\d{1,3}[.)])[ \t]+(.*)")
_YES_OR_NO = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)


_MAIN = {"factoid": "factoid_mrr", "list": "list_f1", "yesno": "yesno_accuracy", "summary": "rouge2_f1"}


class Bioasq(Task):
    """BioASQ task B, phase B. Answers have the form of `recipes.paper.formats`.

    Measures, each over the questions of a type:
        factoid: `factoid_strict` (the first name is right), `factoid_lenient` (one of the first 5 is), `factoid_mrr`.
        list: `list_precision`, `list_recall`, `list_f1`. A synonym counts, a second name of the same entity is wrong.
        yesno: `yesno_accuracy`, and over all questions `yesno_f1_yes`, `yesno_f1_no` and their mean `yesno_macro_f1`.
        all: `rouge2_recall`, `rouge2_f1`, `rouge_su4_recall`, `rouge_su4_f1` of the ideal answer without stemming, each
            the best over the references.
        all but summary: `unparsed`, 1 if there is no exact answer.

    The main measure is `factoid_mrr`, or without factoid questions the first that exists of `list_f1`,
    `yesno_accuracy`, `rouge2_f1`.

    As in the challenge, the comparison of names ignores case. White space, and quotes and punctuation around names, are
    also ignored.
    """

    name = "bioasq"
    measure = "factoid_mrr"
    max_tokens = 512
    stop = NEXT_QUESTION
    format = "recipes.paper.formats:BIOASQ"

    def read(self, source: str | Path, split: str | None) -> list[TaskItem]:
        items = []
        for number, (where, record) in enumerate(load_records(source, split=split, format=self.format), 1):
            question = bioasq_question(where, record)
            reference = {"type": question.kind, "ideal": question.ideal, "entities": question.entities}
            name = str(record.get("id", number))
            solution = Row(question.body, bioasq_completion(question), None, where)
            items.append(TaskItem(name, question.body, reference, where, solution))
        return items

    def main_measure(self, items: Sequence[TaskItem]) -> str:
        """The main measure for the first of factoid, list, yes/no and summary that has questions."""
        kinds = {item.reference["type"] for item in items}
        return next(measure for kind, measure in _MAIN.items() if kind in kinds)

    def score(self, item: TaskItem, text: str) -> dict[str, float]:
        ideal, final = split_answer(before_next_question(text))
        scores = rouge_scores(ideal, item.reference["ideal"])
        entities = [{_normalised(name) for name in names} for names in item.reference["entities"]]
        kind = item.reference["type"]
        if kind == "summary":
            return scores
        if kind == "yesno":
            answer = yes_or_no(ideal if final is None else final)
            return {**scores, "yesno_accuracy": float({answer} in entities), "unparsed": float(not answer)}
        given = [_normalised(name) for name in names_in(final or "", several=kind == "list")]
        measured = _list_scores(given, entities) if kind == "list" else _factoid_scores(given, set().union(*entities))
        return {**scores, **measured, "unparsed": float(not given)}

    def aggregate(self, scored: Sequence[Scored]) -> dict[str, Interval]:
        """The mean of each measure, and the F1 of yes, of no and of both.

        As in the challenge's program, a wrong or missing answer counts against both classes.
        """
        answers = [
            (item.reference["entities"] == [["yes"]], scores["yesno_accuracy"])
            for item, _, scores in scored
            if "yesno_accuracy" in scores
        ]
        return super().aggregate(scored) | (_yesno_f1(answers) if answers else {})


def split_answer(text: str) -> tuple[str, str | None]:
    """The ideal answer, and the text after the first "The final answer is:" (None if there is none)."""
    marker = _FINAL.search(text)
    return (text[: marker.start()].strip(), text[marker.end() :]) if marker else (text.strip(), None)


def names_in(final: str, *, several: bool) -> list[str]:
    """The names in the bullets at the beginning. Without bullets, the first line, divided if it has `several` names."""
    lines = [line.strip() for line in final.splitlines() if line.strip()]
    bullets = [bullet[1] for bullet in takewhile(bool, map(_BULLET.match, lines)) if bullet]
    names = bullets or (re.split("[,;]", lines[0]) if lines and several else lines[:1])
    return [name for name in names if _normalised(name)]


def yes_or_no(text: str) -> str:
    """The first word if it is yes or no, otherwise empty."""
    answer = _YES_OR_NO.match(text)
    return answer[1].lower() if answer else ""


def rouge_scores(text: str, references: Sequence[str]) -> dict[str, float]:
    """ROUGE-2 and ROUGE-SU4, recall and F1 of each, the best over the references (Lin 2004)."""
    from rouge_score.rouge_scorer import RougeScorer  # takes a second to import

    scorer = RougeScorer(["rouge2"])
    rouge2 = [scorer.score(reference, text)["rouge2"] for reference in references]
    units = _skip_units(text)
    su4 = [_overlap(units, _skip_units(reference)) for reference in references]
    return {
        "rouge2_recall": max(float(one.recall) for one in rouge2),
        "rouge2_f1": max(float(one.fmeasure) for one in rouge2),
        "rouge_su4_recall": max(recall for recall, _ in su4),
        "rouge_su4_f1": max(f1 for _, f1 in su4),
    }


def _skip_units(text: str) -> Counter[tuple[str, ...]]:
    """The words of a text, and its pairs of words in order with up to 4 others between them."""
    from rouge_score.tokenize import tokenize

    words = tokenize(text, None)
    pairs = ((first, second) for at, first in enumerate(words) for second in words[at + 1 : at + 6])
    return Counter([(word,) for word in words]) + Counter(pairs)


def _overlap(given: Counter[tuple[str, ...]], wanted: Counter[tuple[str, ...]]) -> tuple[float, float]:
    """Recall and F1."""
    common = (given & wanted).total()
    return common / max(wanted.total(), 1), 2 * common / max(given.total() + wanted.total(), 1)


def _factoid_scores(given: list[str], names: set[str]) -> dict[str, float]:
    rank = next((rank for rank, name in enumerate(given[:MAX_FACTOID_ANSWERS], 1) if name in names), None)
    return {
        "factoid_strict": float(rank == 1),
        "factoid_lenient": float(rank is not None),
        "factoid_mrr": 1 / rank if rank else 0.0,
    }


def _list_scores(given: list[str], entities: list[set[str]]) -> dict[str, float]:
    """Count as the challenge's program does, also if entities share a name."""
    left, unused = list(entities), [{name} for name in given]
    right = sum(_took(left, {name}) for name in given)
    missed = sum(not _took(unused, names) for names in left)
    return {
        "list_precision": right / len(given) if given else 0.0,
        "list_recall": right / (right + missed),
        "list_f1": 2 * right / (len(given) + right + missed),
    }


def _took(sets: list[set[str]], names: set[str]) -> bool:
    """Remove the first set that shares a name with `names`. Return whether there was one."""
    found = next((one for one in sets if one & names), None)
    if found is not None:
        sets.remove(found)
    return found is not None


def _yesno_f1(answers: Sequence[tuple[bool, float]]) -> dict[str, Interval]:
    """F1 of a class is 2 right / (2 right + wrong), by (whether yes is right, 1 if the answer is)."""
    rows = [(is_yes * right, (not is_yes) * right, 1 - right) for is_yes, right in answers]
    by_class = [_class_f1([row[n] for row in rows], [row[2] for row in rows]) for n in (0, 1)]
    macro = statistic_interval(_macro_f1, rows)
    if len({right for _, right in answers}) == 1:  # resampling would give a width of 0
        low, high = (sum(ends) / 2 for ends in zip(*((one.low, one.high) for one in by_class), strict=True))
        macro = Interval(macro.mean, low, high)
    return {"yesno_f1_yes": by_class[0], "yesno_f1_no": by_class[1], "yesno_macro_f1": macro}


def _class_f1(right: list[float], wrong: list[float]) -> Interval:
    if sum(right) + sum(wrong) == 0:  # no question of the class: 0 by the challenge's program
        return Interval(0.0, 0.0, 0.0)
    parts = [2 * one for one in right]
    return ratio_interval(parts, [part + one for part, one in zip(parts, wrong, strict=True)])


def _macro_f1(sums: Tensor) -> Tensor:
    """Sums (..., 3) of right yes, right no and wrong answers -> (...)."""
    double, wrong = 2 * sums[..., :2], sums[..., 2:]
    return torch.where(double > 0, double / (double + wrong), 0.0).mean(-1)


def _normalised(name: str) -> str:
    return " ".join(unicodedata.normalize("NFC", name).lower().split()).strip(" .,;:'\"`*_\u2018\u2019\u201c\u201d")
