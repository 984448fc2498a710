"""What `collm eval` prints: every system once, its scores, costs and all measures, within 80 columns."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console

from collm.cli.terminal import calibration_table, comparison_tables
from collm.core.calibration import Calibration, CalibrationPoint
from collm.evaluation.compare import Comparison
from collm.evaluation.intervals import Interval
from collm.evaluation.results import SystemResult

USED = {"tokens_read": 1234.5, "tokens_written": 67.8, "forward_passes": 9.1, "calls": 0.0}
NAMES = ["collaboration", "base", "assistant", "sft=/a/long/way/to/the/models/fine-tuned", "random", "threshold=0.4"]


def result(name: str, *measures: str) -> SystemResult:
    difference = None if name == "collaboration" else Interval(-0.991, -1.0, -0.974)
    models = {"base": USED, "assistant": USED} if name in ("collaboration", "random") else {"base": USED}
    scores = dict.fromkeys(measures, Interval(0.991, 0.953, 0.998))
    return SystemResult(name, 117, scores, difference, 0.07, models, 1.75e7, 2397.0, 0.1234)


def printed(*measures: str, rejected: float = 0.0) -> str:
    results = [replace(result(name, *measures), rejected=rejected) for name in NAMES]
    main = measures[0] if measures else None
    found = Comparison("gsm8k", main, [], results, {}, ["base", "assistant"], 0.5, {})
    console = Console(width=80)
    with console.capture() as capture:
        console.print(*comparison_tables(found), sep="\n")
    return capture.get()


def test_every_system_with_its_scores_and_costs() -> None:
    lines = [line.split() for line in printed("accuracy", "unparsed").splitlines()]
    difference = ["-99.1", "(-100.0..-97.4)"]
    assert ["base", "99.1", "(95.3..99.8)", *difference, "7.0%"] in lines
    assert ["sft=fine-tuned", "17.5M", "0.123s", "2397", "base", "1,234.5", "67.8", "9.1"] in lines
    assert ["assistant", "1,234.5", "67.8", "9.1"] in lines  # the collaboration's
    assert ["unparsed", *["99.1"] * 5] in lines
    assert not any("threshold" in word for line in lines for word in line)


def test_the_tokens_that_a_judge_rejected_have_a_column() -> None:
    lines = [line.split() for line in printed("accuracy", rejected=0.031).splitlines()]
    assert ["base", "99.1", "(95.3..99.8)", "-99.1", "(-100.0..-97.4)", "7.0%", "3.1%"] in lines
    assert "rejected" not in printed("accuracy")


def test_differences_of_many_systems_say_how_sure_each_is() -> None:
    words = " ".join(printed("accuracy").split())
    assert "Of systems that do not differ, about 1 in 20 seems to" in words


def test_a_calibration_says_what_its_budgets_mean() -> None:
    points = [
        CalibrationPoint(1.0, 0.0, 0.5, 0.4, 0.6, 0.0, 0.0),
        CalibrationPoint(0.5, 0.1, 0.8, 0.7, 0.9, 0.05, 0.15),
    ]

    def shown(budgets: list[float]) -> str:
        console = Console(width=100)
        with console.capture() as capture:
            console.print(calibration_table(Calibration(points, "exact_match", 50, {}, budgets)))
        return " ".join(capture.get().split())

    assert "A budget is a limit that holds with 95 %" in shown([0.2])
    assert "within 0.2" in shown([0.2])
    assert "limit" not in shown([])


def test_a_calibration_with_a_judge_has_its_measures() -> None:
    point = CalibrationPoint(0.5, 0.1, 0.8, 0.7, 0.9, 0.05, 0.15, rejected=0.031, assistant_passes=0.247)
    console = Console(width=100)
    with console.capture() as capture:
        console.print(calibration_table(Calibration([point], "exact_match", 50, {"judge": "regret:nats=2"}, [])))
    assert {"rejected", "3.1%", "passes", "0.25"} <= set(capture.get().split())


def test_one_measure_needs_no_table_of_measures() -> None:
    assert "all measures" not in printed("accuracy")
    assert "all measures" not in printed()
