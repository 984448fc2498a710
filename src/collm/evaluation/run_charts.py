"""The charts of an evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from collm.core.calibration import threshold_text
from collm.errors import ConfigError
from collm.evaluation.answers import Answer
from collm.evaluation.report import Chart, Point, Row, deferral_chart
from collm.evaluation.systems import COLLABORATION, is_threshold

ResultRow = Mapping[str, Any]
"""A `SystemResult` in results.json."""

Corners = Sequence[tuple[float, float]]

NUM_CORNERS = 32
"""Maximum number of corners of the oracle's line."""

_DIAGONAL, _ORACLE = "whole answers at random", "oracle: the better of whole answers"


@dataclass(frozen=True)
class Prices:
    """Prices of a million tokens that a model reads (including its own) and writes, by model name."""

    read: Mapping[str, float]
    written: Mapping[str, float]

    @classmethod
    def parse(cls, texts: Sequence[str]) -> Prices:
        """Parse NAME=READ or NAME=READ:WRITTEN, where NAME is base, assistant, assistant-2, ..

        Raises:
            ConfigError: an invalid form, or a negative price.
        """
        read, written = {}, {}
        for text in texts:
            name, _, numbers = text.rpartition("=")
            try:
                prices = [float(number) for number in numbers.split(":")]
            except ValueError:
                prices = []
            if not name or not 1 <= len(prices) <= 2 or not all(0 <= price < float("inf") for price in prices):
                raise ConfigError(
                    f"price is {text!r}, expected NAME=READ or NAME=READ:WRITTEN per million tokens, like base=0.1:0.4"
                )
            read[name], written[name] = prices[0], prices[1] if len(prices) == 2 else 0.0
        return cls(read, written)

    def check(self, rows: Iterable[ResultRow]) -> None:
        """Raise a ConfigError for the price of a model that no system uses."""
        used = sorted({name for row in rows for name in row["models"]}, key=lambda name: (name != "base", name))
        if unused := [name for name in self.read if name not in used]:
            raise ConfigError(
                f"there is a price for {', '.join(unused)}, which no system uses; expected {', '.join(used)}"
            )

    def of(self, row: ResultRow) -> float:
        """The price of 1,000 items with a system.

        Raises:
            ConfigError: one of its models has no price.
        """
        total = 0.0
        for name, used in row["models"].items():
            if used["forward_passes"] == 0:  # a program
                continue
            if name not in self.read:
                raise ConfigError(f"{row['name']} uses {name}, which has no price; add --price {name}=..")
            total += self.read[name] * used["tokens_read"] + self.written[name] * used["tokens_written"]
        return total / 1000


def run_charts(
    results: Mapping[str, Any], rows: Sequence[Row], answers: Mapping[str, Mapping[str, Answer]], prices: Prices | None
) -> list[Chart]:
    """Charts of score against deferral rate, score against cost, and the reliability of the defer prob.

    Charts without data are left out.

    Args:
        results: the content of results.json.
        rows: the rows of the report's table.
        answers: the answers of each system, by item.
        prices: prices for the cost axis; None for FLOPs.
    """
    measure = results["measure"]
    by_name = {row["name"]: row for row in results["rows"]}
    charts = []
    if measure is not None:
        lines = _random_lines(by_name, measure, {name: float(name != "base") for name in by_name})
        if oracle := oracle_line(answers, measure):
            lines[_ORACLE] = oracle
        rate = by_name[COLLABORATION]["deferral_rate"]
        thresholds = _thresholds(results)
        if thresholds:  # models alone equal the collaboration at the highest or lowest threshold
            ends = {"base": 1.0} | ({"assistant": -1.0} if len(results["authors"]) == 2 else {})
            thresholds |= {name: threshold for name, threshold in ends.items() if name in by_name}
        curve = [
            _point(by_name[name], measure, by_name[name]["deferral_rate"], f"threshold {threshold_text(threshold)}")
            for name, threshold in thresholds.items()
        ]
        charts = [deferral_chart(curve, rows, rate, lines, titled(measure)), _costs(results, rows, prices)]
    return [*charts, *_reliability(results)]


def titled(measure: str) -> str:
    """A measure with a capital letter, for headings and labels."""
    return measure[:1].upper() + measure[1:]


def _thresholds(results: Mapping[str, Any]) -> dict[str, float]:
    """The collaboration at several thresholds, by system. Empty if there is only one threshold."""
    names = [row["name"] for row in results["rows"] if is_threshold(row["name"])]
    found = {name: float(name.partition("=")[2]) for name in names}
    return {COLLABORATION: results["threshold"], **found} if found else {}


def _point(row: ResultRow, measure: str, x: float, name: str) -> Point:
    score = row["measures"][measure]
    return Point(name, x, score["mean"], score["low"], score["high"])


def _random_lines(by_name: Mapping[str, ResultRow], measure: str, places: Mapping[str, float]) -> dict[str, Corners]:
    """Lines from the base alone to each assistant alone: a random choice between their whole answers."""
    assistants = [name for name in by_name if name.partition("-")[0] == "assistant"]
    if "base" not in by_name:
        return {}

    def corner(name: str) -> tuple[float, float]:
        return places[name], by_name[name]["measures"][measure]["mean"]

    names = {name: _DIAGONAL if len(assistants) == 1 else f"base or {name}, at random" for name in assistants}
    return {names[name]: [corner("base"), corner(name)] for name in assistants}


def oracle_line(answers: Mapping[str, Mapping[str, Answer]], measure: str) -> Corners:
    """Deferral rate and mean score of an oracle that takes each whole answer from the base or an assistant.

    It takes answers with the highest gain per assistant token first. Empty if there is nothing to gain, if the base or
    all assistants were not compared, or if items have no scores. Collaboration per token can exceed this line.
    """
    base = answers.get("base", {})
    others = [found for name, found in answers.items() if name.partition("-")[0] == "assistant"]
    if not base or not others or any(measure not in found[item].scores for found in [base, *others] for item in base):
        return []
    tokens, theirs = sum(len(answer.authors) for answer in base.values()), 0
    score = sum(answer.scores[measure] for answer in base.values())
    corners = [(0.0, score / len(base))]
    gains = []
    for item, mine in base.items():
        best = max((found[item] for found in others), key=lambda other: (other.scores[measure], -len(other.authors)))
        gain = best.scores[measure] - mine.scores[measure]
        if gain > 0:
            gains.append((gain, len(mine.authors), len(best.authors)))
    for gain, own, other in sorted(gains, key=lambda one: one[0] / max(one[2], 1), reverse=True):
        theirs, tokens, score = theirs + other, tokens + other - own, score + gain
        corners.append((theirs / max(tokens, 1), score / len(base)))
    if len(corners) == 1:
        return []
    step = -(-len(corners) // NUM_CORNERS)
    return [*corners[:-1:step], corners[-1]]


def _costs(results: Mapping[str, Any], rows: Sequence[Row], prices: Prices | None) -> Chart:
    """Score against the cost of an item."""
    measure = results["measure"]
    by_name: dict[str, ResultRow] = {row["name"]: row for row in results["rows"]}
    if prices is not None:
        prices.check(by_name.values())
    shown = {row.name for row in rows} | set(_thresholds(results))
    costs = {name: by_name[name]["flops"] / 1e9 if prices is None else prices.of(by_name[name]) for name in shown}

    def point(name: str) -> Point:
        return _point(by_name[name], measure, costs[name], name)

    return Chart(
        name="cost",
        heading=f"{titled(measure)} against cost",
        note="Further left is cheaper. "
        + ("FLOPs are estimated from the tokens that the models read." if prices is None else "Tokens at your prices."),
        x_label="GFLOP for an item" if prices is None else "Price of 1,000 items",
        y_label=titled(measure),
        curve=[point(name) for name in _thresholds(results)],
        marks=[point(row.name) for row in rows],
        lines=_random_lines(by_name, measure, costs),
        in_use=costs[COLLABORATION],
        unit="GFLOP" if prices is None else "for 1,000",
    )


def _reliability(results: Mapping[str, Any]) -> list[Chart]:
    tokens = results["tokens"]
    if tokens is None or not tokens["reliability"]:
        return []
    points = [
        Point(f"{one['tokens']:,} tokens", one["defer_prob"], one["assistant_right"], one["low"], one["high"])
        for one in tokens["reliability"]
    ]
    auc = tokens["measures"]["head_auc"]
    return [
        Chart(
            name="reliability",
            heading="Can the defer prob be trusted?",
            note="On reference answers: of the tokens that either the base or the assistant has right, the share that "
            "the assistant has, by defer prob. On the dotted line the defer prob is as good as its word; above it the "
            "head asks too seldom. "
            + (
                f"AUC {auc:.3f}: how often a token that only the assistant has right has a higher defer prob than "
                "another token."
                if auc is not None
                else "No token that only the assistant has right, so there is no AUC."
            ),
            x_label="Defer prob",
            y_label="Assistant right",
            curve=points,
            lines={"as good as its word": [(0.0, 0.0), (1.0, 1.0)]},
        )
    ]
