"""The report of an evaluation, from its directory."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from collm.engine.candidates import Candidates
from collm.errors import DAMAGED, ArtefactError
from collm.evaluation.answers import Answer, read_answers
from collm.evaluation.insights import DeferralCount, deferred_classes, deferred_tokens, run_lengths, shown
from collm.evaluation.report import Example, Report, Row, Table, Token
from collm.evaluation.run_charts import Prices, run_charts, titled
from collm.evaluation.systems import COLLABORATION, is_threshold, short_names
from collm.untrusted import contained, read_text

MAX_BYTES = 1 << 30
"""Largest accepted file of an evaluation."""


def report_of(directory: Path, prices: Prices | None = None) -> Report:
    """The report of the `collm eval` output in a directory.

    Args:
        prices: token prices for the chart of costs; None for FLOPs.

    Raises:
        ArtefactError: the directory has no finished evaluation, a damaged one, or a link that leads out.
        ConfigError: a model has no price.
    """
    contained(directory)
    try:
        results, listed, candidates = (
            json.loads(read_text(directory / f"{name}.json", MAX_BYTES)) for name in ("results", "items", "candidates")
        )
        items = {item["id"]: item for item in listed}
        short = short_names([row["name"] for row in results["rows"]])
        results["rows"] = [{**row, "name": short[row["name"]]} for row in results["rows"]]
        answers = {short[name]: read_answers(directory, name) for name in short}
        return _report(results, items, candidates, answers, prices)
    except DAMAGED as error:
        raise ArtefactError(f"{directory} holds no finished evaluation ({error}); run 'collm eval' first") from error


def _report(
    results: dict[str, Any],
    items: Mapping[str, Any],
    candidates: Mapping[str, Any],
    answers: Mapping[str, Mapping[str, Answer]],
    prices: Prices | None,
) -> Report:
    rows = {row["name"]: row for row in results["rows"]}
    for name, found in answers.items():
        if found.keys() != items.keys() or len(items) != results["num_items"]:
            raise ValueError(f"{len(found)} answers of {name} to {len(items)} of {results['num_items']} items")
    own = [answers[COLLABORATION][item] for item in items]
    first, astray = shown(own, answers.get("base", {}), results["measure"])
    table = [_row(row, results["measure"]) for row in rows.values() if not is_threshold(row["name"])]

    def example(answer: Answer) -> Example:
        return _example(answer, items[answer.id], candidates.get(answer.id, ()), results["measure"])

    return Report(
        title=f"{results['task']}: does collaborating pay?",
        summary=results["verdict"],
        rows=table,
        measure=results["measure"] and titled(results["measure"]),
        charts=run_charts(results, table, answers, prices),
        examples=[example(answer) for answer in first],
        astray=[example(answer) for answer in astray],
        authors=results["authors"],
        tables=[_measures(rows, results["measure"]), *_tables(own, rows)],
        details={"items": str(results["num_items"]), "threshold": f"{results['threshold']:.6g}", **_settings(results)},
    )


def _row(row: Mapping[str, Any], measure: str | None) -> Row:
    score = row["measures"].get(measure, {"mean": 0.0, "low": 0.0, "high": 0.0})
    note = f"latency {row['seconds']:.3g} s, {row['flops'] / 1e9:.3g} GFLOP an item"
    if (difference := row["difference"]) is not None:
        low, high = 100 * difference["low"], 100 * difference["high"]
        note = f"{100 * difference['mean']:+.1f} points against the collaboration ({low:+.1f} to {high:+.1f}); {note}"
    ends = (score["mean"], score["low"], score["high"])
    return Row(row["name"], *ends, row["deferral_rate"], row["tokens_per_s"], note)


def _example(
    answer: Answer, item: Mapping[str, Any], candidates: Sequence[Sequence[Candidates]], measure: str | None
) -> Example:
    known = candidates or [()] * len(answer.authors)
    tokens = zip(answer.token_texts, answer.authors, answer.defer_probs, known, strict=True)
    return Example(
        prompt=_text(item["prompt"]),
        reference=_text(item["reference"]),
        tokens=[Token(*token) for token in tokens],
        score=answer.scores.get(measure or ""),
    )


def _text(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(one, dict) and "content" in one for one in value):
        return "\n".join(f"{one.get('role')}: {one['content']}" for one in value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _measures(rows: Mapping[str, Mapping[str, Any]], main: str | None) -> Table:
    """All measures of the task, if it has others than the main one."""
    shown = {name: row["measures"] for name, row in rows.items() if not is_threshold(name)}
    names = list(shown[COLLABORATION])
    body = [(name, *(_interval(measures[name]) for measures in shown.values())) for name in names if names != [main]]
    return Table("measures", "All measures", "Mean and 95% interval.", ("", *shown), body)


def _interval(found: Mapping[str, float]) -> str:
    mean, low, high = (100 * found[end] for end in ("mean", "low", "high"))
    return f"{mean:.1f}% ({low:.1f} to {high:.1f})"


def _tables(own: Sequence[Answer], rows: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    deferring, did = ("", "by assistants", "in all", "share"), ("", "tokens read", "tokens written", "passes")
    classes, tokens = deferred_classes(own), deferred_tokens(own)
    counted = f"Of all {sum(one.total for one in classes):,} tokens of the collaboration's answers."
    models = [
        (f"{name}: {model}", *(f"{used[key]:,.1f}" for key in ("tokens_read", "tokens_written", "forward_passes")))
        for name, row in rows.items()
        if not is_threshold(name)
        for model, used in row["models"].items()
    ]
    runs: list[tuple[str, ...]] = [(str(length), f"{count:,}") for length, count in run_lengths(own).items()]
    return [
        Table("costs", "What each model did for an item", "Means; one pass serves a whole batch.", did, models),
        Table("classes", "What kind of token assistants write", "By its look.", deferring, _shares(classes)),
        Table("tokens", "The tokens that assistants write most often", counted, deferring, _shares(tokens)),
        Table("runs", "How many tokens in a row", "That assistants wrote.", ("tokens in a row", "times"), runs),
    ]


def _shares(counted: Sequence[DeferralCount]) -> list[tuple[str, ...]]:
    return [(one.name, f"{one.deferred:,}", f"{one.total:,}", f"{one.share:.1%}") for one in counted]


def _settings(results: Mapping[str, Any]) -> dict[str, str]:
    flat = {name: value for name, value in results["settings"].items() if not isinstance(value, dict)}
    reasons = defaultdict[str, list[str]](list)
    for name, reason in results["left_out"].items():
        reasons[reason].append(name)
    left_out = {f"no {', '.join(names)}": reason for reason, names in reasons.items()}
    return {name: str(value) for name, value in {**flat, **left_out, **results["settings"]["versions"]}.items()}
