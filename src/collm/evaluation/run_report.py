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
from collm.evaluation.report import Chart, ChartPoint, Report, ShownAnswer, SystemRow, Table, Token, deferral_chart
from collm.evaluation.results import DIFFERENCES_NOTE, SystemResult
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
    totals = {}
    for result in results:
        work = {name: did for name, did in result.models.items() if did["forward_passes"]}  # a program has no price
        if unpriced := [name for name in work if name not in prices]:
            raise ConfigError(f"{result.name} uses {unpriced[0]}, which has no price; add --price {unpriced[0]}=..")
        read = sum(prices[name][0] * did["tokens_read"] for name, did in work.items())
        written = sum(prices[name][1] * did["tokens_written"] for name, did in work.items())
        totals[result.name] = (read + written) / 1000
    return totals


def report_of(directory: Path, prices: Prices | None = None) -> Report:
    """The report of the `collm eval` output in a directory. Without prices, the chart of costs has FLOPs."""
    try:
        return _report(Comparison.read(directory).shortened(), prices)
    except DAMAGED as error:
        raise ArtefactError(f"{directory} contains no finished evaluation ({error}); run 'collm eval' first") from error


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
        note=DIFFERENCES_NOTE if len(rows) > 1 else "",
        charts=run_charts(found, rows, prices),
        examples=examples,
        astray=astray,
        authors=found.authors,
        tables=[_measures(found), costs, *routing_tables(found), *deferral_tables(found.answers[COLLABORATION])],
        details={"items": str(len(found.items)), "threshold": f"{found.threshold:.6g}", **_settings(found)},
    )


def _row(result: SystemResult, measure: str | None) -> SystemRow:
    score = result.measures.get(measure or "", Interval(0.0, 0.0, 0.0))
    note = f"latency {result.seconds:.3g} s, {result.flops / 1e9:.3g} GFLOP an item"
    if result.rejected:
        note = f"{result.rejected:.1%} of the tokens in place of rejected ones; {note}"
    if result.difference is not None:
        mean, low, high = (100 * end for end in astuple(result.difference))
        note = f"{mean:+.1f} points against the collaboration ({low:+.1f} to {high:+.1f}); {note}"
    return SystemRow(result.name, score.mean, score.low, score.high, result.deferral_rate, result.tokens_per_s, note)


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
    rows = []
    for name in found.results[0].measures:
        ends = [[100 * end for end in astuple(one.measures[name])] for one in found.shown]
        rows.append((name, *(f"{mean:.1f}% ({low:.1f} to {high:.1f})" for mean, low, high in ends)))
    columns = ("", *(one.name for one in found.shown))
    others = [] if [name for name, *_ in rows] == [found.measure] else rows
    return Table("measures", "All measures", "Mean and 95% interval.", columns, others)


def routing_tables(found: Comparison) -> list[Table]:
    """Who writes for each kind of prompt, and who should write at gold tokens."""
    authors, by_kind = found.authors, defaultdict[str, Counter[int]](Counter)
    for item, answer in zip(found.items, found.answers[COLLABORATION], strict=True):
        for kind in {item.kind or "no kind", "all"}:
            by_kind[kind].update(answer.authors)

    def shares(name: str, heading: str, note: str, counts: Mapping[str, Mapping[int, int]]) -> Table:
        rows = []
        for row, each in sorted(counts.items()):
            total = sum(each.values())
            rows.append((row, *(f"{each[author] / max(total, 1):.1%}" for author in range(len(authors))), f"{total:,}"))
        return Table(name, heading, note, ("", *authors, "tokens"), rows)

    several, confusion = len(authors) > 2, (found.tokens or {}).get("confusion", ())
    wanted = {f"{name} should": dict(enumerate(counts)) for name, counts in zip(authors, confusion, strict=False)}
    of_answers = "Of the tokens of the collaboration's answers."
    of_gold = (
        "Of the tokens of reference answers that the row's author alone, or best, predicts; the base first of all."
    )
    return [
        shares(
            "kinds", "Who writes for which kind of prompt", of_answers, by_kind if several or len(by_kind) > 2 else {}
        ),
        shares("confusion", "Who writes where who should", of_gold, wanted if several else {}),
    ]


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
    charts = [_rates(found, rows, found.measure), _costs(found, found.measure, prices)] if found.measure else []
    return [*charts, _reliability(found.tokens)] if found.tokens and found.tokens["reliability"] else charts


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
    score = sum(answer.scores[measure] for answer in base)
    tokens, theirs, corners, gains = sum(len(answer.authors) for answer in base), 0, [(0.0, score / len(base))], []
    for mine, *choices in zip(base, *others, strict=True):
        best = max(choices, key=lambda other: (other.scores[measure], -len(other.authors)))
        gains.append((best.scores[measure] - mine.scores[measure], len(mine.authors), len(best.authors)))
    for gain, own, other in sorted(gains, key=lambda one: one[0] / max(one[2], 1), reverse=True):
        if gain > 0:
            theirs, tokens, score = theirs + other, tokens + other - own, score + gain
            corners.append((theirs / max(tokens, 1), score / len(base)))
    step = -(-len(corners) // NUM_CORNERS)
    return [*corners[:-1:step], corners[-1]] if len(corners) > 1 else []


def _reliability(tokens: Mapping[str, Any]) -> Chart:
    bins, ends = tokens["reliability"], ("defer_prob", "assistant_right", "low", "high")
    auc, right = tokens["measures"]["head_auc"], "token that only the assistant has right"
    of_auc = f"No {right}, so there is no AUC."
    if auc is not None:
        of_auc = f"AUC {auc:.3f}: how often a {right} has a higher defer prob than another token."
    return Chart(
        name="reliability",
        heading="Can the defer prob be trusted?",
        note="On reference answers: of the tokens that either the base or the assistant has right, the share that "
        "the assistant has, by defer prob. On the dotted line both are equal. A head that was trained with a deferral "
        "cost should lie above the line, because it asks only where the assistant gains more than the cost. A rising "
        f"curve is what a threshold needs. The intervals treat tokens as independent. {of_auc}",
        x_label="Defer prob",
        y_label="Assistant right",
        curve=[ChartPoint(f"{one['tokens']:,} tokens", *(one[end] for end in ends)) for one in bins],
        lines={"equal": [(0.0, 0.0), (1.0, 1.0)]},
    )
