"""The report of an evaluation, from its directory."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from itertools import groupby
from pathlib import Path
from typing import Any

from collm.core.calibration import threshold_text
from collm.core.types import BASE
from collm.engine.candidates import Candidates
from collm.errors import DAMAGED, ArtefactError, ConfigError
from collm.evaluation.answers import Answer
from collm.evaluation.compare import Comparison
from collm.evaluation.intervals import Interval
from collm.evaluation.report import (
    Chart,
    ChartPoint,
    Report,
    ShownAnswer,
    SystemRow,
    Table,
    Token,
    deferral_chart,
)
from collm.evaluation.results import SystemResult
from collm.evaluation.systems import COLLABORATION

Corners = Sequence[tuple[float, float]]

NUM_CORNERS = 32  # of the oracle's line, at most


TOKEN_CLASSES = {
    "no text": "",  # an EOS, or a part of a character
    "white space": r"\s+",
    "number": r"\s*[\d.,]*\d[\d.,]*%?\s*",
    "punctuation": r"[\W_]+",
    "word begins": r"\s.*",
    "word goes on": ".*",
}

Prices = Mapping[str, tuple[float, float]]
"""For each model the prices of a million tokens that it reads (including its own) and that it writes."""


def parse_prices(texts: Sequence[str]) -> Prices:
    """Parse NAME=READ or NAME=READ:WRITTEN, where NAME is base, assistant, assistant-2, .."""
    prices = {}
    for text in texts:
        name, _, numbers = text.rpartition("=")
        try:
            read, written = (float(one) for one in (numbers.split(":") if ":" in numbers else (numbers, "0")))
        except ValueError:
            name = ""
        if not name or not all(0 <= price < float("inf") for price in (read, written)):
            raise ConfigError(
                f"price is {text!r}, expected NAME=READ or NAME=READ:WRITTEN per million tokens, like base=0.1:0.4"
            )
        prices[name] = read, written
    return prices


def priced(results: Sequence[SystemResult], prices: Prices) -> dict[str, float]:
    """The price of 1,000 items with each system. All models of the systems need prices, and no others."""
    used = sorted({name for result in results for name in result.models}, key=lambda name: (name != "base", name))
    if unused := [name for name in prices if name not in used]:
        raise ConfigError(f"there is a price for {', '.join(unused)}, which no system uses; expected {', '.join(used)}")
    totals = dict.fromkeys((result.name for result in results), 0.0)
    for result in results:
        for name, did in result.models.items():
            if did["forward_passes"] == 0:  # a program
                continue
            if name not in prices:
                raise ConfigError(f"{result.name} uses {name}, which has no price; add --price {name}=..")
            read, written = prices[name]
            totals[result.name] += (read * did["tokens_read"] + written * did["tokens_written"]) / 1000
    return totals


def report_of(directory: Path, prices: Prices | None = None) -> Report:
    """The report of the `collm eval` output in a directory. Without prices, the chart of costs has FLOPs."""
    try:
        return _report(Comparison.read(directory).shortened(), prices)
    except DAMAGED as error:
        raise ArtefactError(f"{directory} holds no finished evaluation ({error}); run 'collm eval' first") from error


def _report(found: Comparison, prices: Prices | None) -> Report:
    rows = [_row(result, found.measure) for result in found.shown]
    examples, astray = ([_shown(found, one) for one in answers] for answers in found.examples())
    work = [(f"{result.name}: {model}", *did) for result in found.shown for model, *did in result.work()]
    did = ("", "tokens read", "tokens written", "passes")
    costs = Table("costs", "What each model did for an item", "Means; one pass serves a whole batch.", did, work)
    return Report(
        title=f"{found.task}: does collaborating pay?",
        summary=found.verdict,
        rows=rows,
        measure=found.measure and titled(found.measure),
        charts=run_charts(found, rows, prices),
        examples=examples,
        astray=astray,
        authors=found.authors,
        tables=[_measures(found), costs, *deferral_tables(found.answers[COLLABORATION])],
        details={"items": str(len(found.items)), "threshold": f"{found.threshold:.6g}", **_settings(found)},
    )


def _row(result: SystemResult, measure: str | None) -> SystemRow:
    score = result.measures.get(measure or "", Interval(0.0, 0.0, 0.0))
    note = f"latency {result.seconds:.3g} s, {result.flops / 1e9:.3g} GFLOP an item"
    if result.difference is not None:
        mean, low, high = (100 * end for end in astuple(result.difference))
        note = f"{mean:+.1f} points against the collaboration ({low:+.1f} to {high:+.1f}); {note}"
    ends = score.mean, score.low, score.high
    return SystemRow(result.name, *ends, result.deferral_rate, result.tokens_per_s, note)


def _shown(found: Comparison, answer: Answer) -> ShownAnswer:
    item = next(one for one in found.items if one.id == answer.id)
    candidates: Sequence[Sequence[Candidates]] = found.candidates.get(answer.id) or [()] * len(answer.authors)
    tokens = zip(answer.token_texts, answer.authors, answer.defer_probs, candidates, strict=True)
    score = answer.scores.get(found.measure or "")
    return ShownAnswer(_text(item.prompt), _text(item.reference), [Token(*token) for token in tokens], score)


def _text(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(one, dict) and "content" in one for one in value):
        return "\n".join(f"{one.get('role')}: {one['content']}" for one in value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _measures(found: Comparison) -> Table:
    """All measures of the task, if it has others than the main one."""

    def cell(interval: Interval) -> str:
        return f"{100 * interval.mean:.1f}% ({100 * interval.low:.1f} to {100 * interval.high:.1f})"

    names = list(found.results[0].measures)
    body = [(name, *(cell(one.measures[name]) for one in found.shown)) for name in names if names != [found.measure]]
    return Table("measures", "All measures", "Mean and 95% interval.", ("", *(one.name for one in found.shown)), body)


def deferral_tables(own: Sequence[Answer]) -> list[Table]:
    """What the assistants wrote of the collaboration's answers: kinds of tokens, tokens, and lengths of runs."""
    pairs = (pair for answer in own for pair in zip(answer.token_texts, answer.authors, strict=True))
    written = [(text, author != BASE) for text, author in pairs]
    looks = TOKEN_CLASSES.items()
    class_of = {text: next(name for name, look in looks if re.fullmatch(look, text, re.DOTALL)) for text, _ in written}
    classes = _counted([(class_of[text], is_deferred) for text, is_deferred in written])
    counted = f"Of all {len(written):,} tokens of the collaboration's answers."
    often = _counted(written, most=20)
    grouped = (group for answer in own for group in groupby(answer.authors, lambda author: author != BASE))
    lengths = Counter(len(list(run)) for deferred, run in grouped if deferred)
    runs = [(str(length), f"{count:,}") for length, count in sorted(lengths.items())]
    deferring = ("", "by assistants", "in all", "share")
    return [
        Table("classes", "What kind of token assistants write", "By its look.", deferring, classes),
        Table("tokens", "The tokens that assistants write most often", counted, deferring, often),
        Table("runs", "How many tokens in a row", "That assistants wrote.", ("tokens in a row", "times"), runs),
    ]


def _counted(written: Sequence[tuple[str, bool]], *, most: int | None = None) -> list[tuple[str, ...]]:
    """How often assistants wrote what has a name, and any author did. The most often deferred first."""
    total, deferred = (
        Counter(name for name, _ in written),
        Counter(name for name, is_deferred in written if is_deferred),
    )
    names = sorted(total if most is None else deferred, key=lambda name: (-deferred[name], name))[:most]
    return [(name, f"{deferred[name]:,}", f"{total[name]:,}", f"{deferred[name] / total[name]:.1%}") for name in names]


def _settings(found: Comparison) -> dict[str, str]:
    flat = {name: value for name, value in found.settings.items() if not isinstance(value, dict)}
    reasons = defaultdict[str, list[str]](list)
    for name, reason in found.left_out.items():
        reasons[reason].append(name)
    left_out = {f"no {', '.join(names)}": reason for reason, names in reasons.items()}
    return {name: str(value) for name, value in {**flat, **left_out, **found.settings["versions"]}.items()}


def run_charts(found: Comparison, rows: Sequence[SystemRow], prices: Prices | None) -> list[Chart]:
    """Charts of score against deferral rate, score against cost, and the reliability of the defer prob."""
    scored = found.measure and [_rates(found, rows, found.measure), _costs(found, found.measure, prices)]
    return [*(scored or []), *_reliability(found.tokens)]


def titled(measure: str) -> str:
    """A measure with a capital letter, for headings and labels."""
    return measure[:1].upper() + measure[1:]


def _rates(found: Comparison, rows: Sequence[SystemRow], measure: str) -> Chart:
    by_name = {result.name: result for result in found.results}
    lines = _random_lines(found.results, measure, {name: float(name != "base") for name in by_name})
    if oracle := oracle_line(found.answers, measure):
        lines["oracle: the better of whole answers"] = oracle
    thresholds = _thresholds(found)
    if thresholds:  # models alone equal the collaboration at the highest or lowest threshold
        ends = {"base": 1.0} | ({"assistant": -1.0} if len(found.authors) == 2 else {})
        thresholds |= {name: threshold for name, threshold in ends.items() if name in by_name}
    named = [(by_name[name], f"threshold {threshold_text(threshold)}") for name, threshold in thresholds.items()]
    curve = [ChartPoint(name, one.deferral_rate, *astuple(one.measures[measure])) for one, name in named]
    return deferral_chart(curve, rows, by_name[COLLABORATION].deferral_rate, lines, titled(measure))


def _costs(found: Comparison, measure: str, prices: Prices | None) -> Chart:
    results = found.results
    costs = {result.name: result.flops / 1e9 for result in results} if prices is None else priced(results, prices)
    points = {one.name: ChartPoint(one.name, costs[one.name], *astuple(one.measures[measure])) for one in results}
    return Chart(
        name="cost",
        heading=f"{titled(measure)} against cost",
        note="Further left is cheaper. "
        + ("FLOPs are estimated from the tokens that the models read." if prices is None else "Tokens at your prices."),
        x_label="GFLOP for an item" if prices is None else "Price of 1,000 items",
        y_label=titled(measure),
        curve=[points[name] for name in _thresholds(found)],
        marks=[points[result.name] for result in found.shown],
        lines=_random_lines(results, measure, costs),
        in_use=costs[COLLABORATION],
        unit="GFLOP" if prices is None else "for 1,000",
    )


def _thresholds(found: Comparison) -> dict[str, float]:
    """The collaboration at several thresholds, by system. Empty if there is only one threshold."""
    others = {one.name: float(one.name.partition("=")[2]) for one in found.results if one.is_threshold}
    return {COLLABORATION: found.threshold, **others} if others else {}


def _random_lines(results: Sequence[SystemResult], measure: str, places: Mapping[str, float]) -> dict[str, Corners]:
    """Lines from the base alone to each assistant alone: a random choice between their whole answers."""
    ends = {one.name: (places[one.name], one.measures[measure].mean) for one in results if one.is_author}
    base, assistants = ends.pop("base", None), ends
    if base is None:
        return {}
    label = "whole answers at random" if len(assistants) == 1 else "base or {}, at random"
    return {label.format(name): [base, end] for name, end in assistants.items()}


def oracle_line(answers: Mapping[str, Sequence[Answer]], measure: str) -> Corners:
    """Deferral rate and mean score of an oracle that takes each whole answer from the base or an assistant.

    It takes answers with the highest gain per assistant token first. Empty if there is nothing to gain or no score to
    compare. Collaboration per token can exceed this line.
    """
    base = answers.get("base", [])
    others = [found for name, found in answers.items() if name.partition("-")[0] == "assistant"]
    if not base or not others or any(measure not in one.scores for found in [base, *others] for one in found):
        return []
    tokens, theirs = sum(len(answer.authors) for answer in base), 0
    score = sum(answer.scores[measure] for answer in base)
    corners = [(0.0, score / len(base))]
    gains = []
    for mine, *choices in zip(base, *others, strict=True):
        best = max(choices, key=lambda other: (other.scores[measure], -len(other.authors)))
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


def _reliability(tokens: Mapping[str, Any] | None) -> list[Chart]:
    if tokens is None or not tokens["reliability"]:
        return []
    points = [
        ChartPoint(f"{one['tokens']:,} tokens", one["defer_prob"], one["assistant_right"], one["low"], one["high"])
        for one in tokens["reliability"]
    ]
    auc, right = tokens["measures"]["head_auc"], "token that only the assistant has right"
    of_auc = f"No {right}, so there is no AUC."
    if auc is not None:
        of_auc = f"AUC {auc:.3f}: how often a {right} has a higher defer prob than another token."
    chart = Chart(
        name="reliability",
        heading="Can the defer prob be trusted?",
        note="On reference answers: of the tokens that either the base or the assistant has right, the share that "
        "the assistant has, by defer prob. On the dotted line the defer prob is as good as its word; above it the "
        f"head asks too seldom. {of_auc}",
        x_label="Defer prob",
        y_label="Assistant right",
        curve=points,
        lines={"as good as its word": [(0.0, 0.0), (1.0, 1.0)]},
    )
    return [chart]
