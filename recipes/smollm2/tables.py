"""The results as JSON, as a page and as a section of the documentation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from collm.atomic import atomic_file
from collm.evaluation.page import write_report
from collm.evaluation.report import Example, Report, Row, Token
from recipes.gsm8k_calculator.tables import write_section

NAME = "smollm2"


def write_results(out: Path, results: dict[str, Any], docs: Path | None) -> None:
    """results.json, results.md and report.html in `out`, and the table in the results.md of `docs`."""
    with atomic_file(out / "results.json") as temporary:
        temporary.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    for folder in filter(None, (out, docs)):
        write_section(folder / "results.md", NAME, lines(results))
    write_report(out / "report.html", _report(results))


def lines(results: dict[str, Any]) -> list[str]:
    """The section: command, table, and what each row is."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    minutes, plan = sum(results["seconds"].values()) / 60, results["plan"]
    heading = ["system", "answers right", "against tuned", "equations right", "of", "calls", "in vain"]
    written = [
        [
            row["name"],
            _interval(row["answers"]),
            _interval(row["difference"], signed=True),
            _interval(row["equations"]),
            f"{row['num_equations']:,}",
            f"{row['calls']:.1%}",
            f"{row['in_vain']:.1%}",
        ]
        for row in results["rows"]
        if "answers" in row
    ]
    given = [
        [
            row["name"],
            _interval(row["given"]["equations"]),
            f"{row['given']['tokens']:.1%}",
            f"{row['given']['base_nll']:.3f}",
            f"{row['given']['joint_nll']:.3f}",
        ]
        for row in results["rows"]
        if row.get("given")
    ]
    return [
        f"    {results['command']} --docs docs",
        "",
        f"{plan['written_rows']:,} test problems solved freely, {plan['test_rows']:,} read with the given solution; "
        f"{versions}; {minutes:.0f} minutes in all on the machine that made it.",
        "",
        *_table(heading, written),
        "",
        "With the given solution as context:",
        "",
        *_table(["system", "equations right", "tokens right", "base's NLL", "joint NLL"], given),
    ]


def _table(heading: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    rule = "|--|" + "--:|" * (len(heading) - 1)
    return ["| " + " | ".join(heading) + " |", rule, *("| " + " | ".join(cells) + " |" for cells in body)]


def _interval(of: dict[str, float] | None, *, signed: bool = False) -> str:
    if of is None:
        return "none"
    mean, low, high = (100 * of[name] for name in ("mean", "low", "high"))
    if signed:
        return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"
    return f"{mean:.1f} % ({low:.1f} - {high:.1f})"


def _report(results: dict[str, Any]) -> Report:
    rows = [row for row in results["rows"] if "answers" in row]
    shown = next(row for row in rows if "calibrated" in row["name"])
    return Report(
        title="SmolLM2-135M with a calculator on GSM8K",
        summary="Base and head were trained together with the calculator; nothing said where to ask it.",
        rows=[
            Row(
                row["name"],
                *(row["answers"][name] for name in ("mean", "low", "high")),
                deferral_rate=row["deferral_rate"],
                tokens_per_s=row["tokens"] / max(row["seconds"], 0.1),
            )
            for row in rows
        ],
        measure="Final answers right",
        examples=[
            Example(
                "", "", [Token(text, author, 0.0) for text, author in zip(one["tokens"], one["authors"], strict=True)]
            )
            for one in shown["texts"]
        ],
        authors=["SmolLM2", "calculator"],
        details={"command": results["command"], "seconds": json.dumps(results["seconds"]), **results["versions"]},
    )
