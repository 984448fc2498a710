"""The results as JSON, as a page and as a section of the documentation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from collm.atomic import atomic_file
from collm.evaluation.report import Report, ShownAnswer, SystemRow, Token, write_report
from recipes.smollm2.rules import DOUBT, LEARNED, ORACLE, RANDOM, SURER

NAME, PAIR = "smollm2", "smollm2_pair"
_COLOURS = {ORACLE: "#999999", LEARNED: "#c2410c", DOUBT: "#1d4ed8", SURER: "#7c3aed", RANDOM: "#444444"}
"""Colours of the rules in the picture."""


def write_results(out: Path, results: dict[str, Any], docs: Path | None) -> None:
    """Write results.json, results.md and report.html to `out`, and the table into the results.md of `docs`."""
    with atomic_file(out / "results.json") as temporary:
        temporary.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    for folder in filter(None, (out, docs)):
        write_section(folder / "results.md", NAME, lines(results))
    write_report(out / "report.html", _report(results))


def write_section(page: Path, name: str, lines: Sequence[str]) -> None:
    """Write lines between the markers of this name in a page. If there are none, append them, or create the page."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    if begin not in text:
        text += f"{begin}\n{end}\n"
    before, rest = text.split(begin, 1)
    after = rest.split(end, 1)[1]
    with atomic_file(page) as temporary:
        temporary.write_text("\n".join([f"{before}{begin}", *lines, f"{end}{after}"]), encoding="utf-8")


def lines(results: dict[str, Any]) -> list[str]:
    """The lines of the section: command, tables, and what was measured."""
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
        f"{plan['written_rows']:,} test problems solved freely, {plan['test_rows']:,} read with the given solution. "
        f"Made with {versions}, in {minutes:.0f} minutes.",
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
            SystemRow(
                row["name"],
                *(row["answers"][name] for name in ("mean", "low", "high")),
                deferral_rate=row["deferral_rate"],
                tokens_per_s=row["tokens"] / max(row["seconds"], 0.1),
            )
            for row in rows
        ],
        measure="Final answers right",
        examples=[
            ShownAnswer(
                "", "", [Token(text, author, 0.0) for text, author in zip(one["tokens"], one["authors"], strict=True)]
            )
            for one in shown["texts"]
        ],
        authors=["SmolLM2", "calculator"],
        details={"command": results["command"], "seconds": json.dumps(results["seconds"]), **results["versions"]},
    )


def write_pair(folder: Path, results: dict[str, Any]) -> None:
    """Write the tables of two language models into the folder's results.md, and their picture next to it."""
    layers = results["plan"]["layers"]
    write_section(folder / "results.md", f"{PAIR}_{layers}", pair_lines(results))
    draw_pair(folder / f"two-models-{layers}.svg", results)


def draw_pair(path: Path, results: dict[str, Any]) -> None:
    """Draw the NLL of given solutions by deferral rate: a panel for each way to train, a line for each rule."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": PAIR, "font.size": 9}):
        rows = len(results["given"]) // 2
        figure = Figure(figsize=(9, 3.6 * rows), layout="constrained")
        panels = figure.subplots(rows, 2, sharex=True, sharey=True).flat
        for panel, (name, given) in zip(panels, results["given"].items(), strict=True):
            base, assistant = (given["alone"][author]["nll"]["mean"] for author in ("base", "assistant"))
            for rule, colour in _COLOURS.items():
                rates = [0.0, *(one["rate"] for one in given["rules"][rule]), 1.0]
                nll = [base, *(one["nll"]["mean"] for one in given["rules"][rule]), assistant]
                panel.plot(rates, nll, color=colour, label=rule, linestyle="--" if rule == RANDOM else "-")
            panel.set_title(name)
            panel.grid(alpha=0.3)
        figure.supxlabel("share of tokens by the assistant")
        figure.supylabel("NLL, nats per token")
        panels[0].legend(frameon=False)
        with atomic_file(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})


def pair_lines(results: dict[str, Any]) -> list[str]:
    """The lines of the section: command, rules at equal rates, what each rule defers, and generated solutions."""
    plan, minutes = results["plan"], sum(results["seconds"].values()) / 60
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    solved = f", {plan['written_rows']:,} solved freely" if plan["written_rows"] else ""
    found = [
        f"    {results['command']} --docs docs",
        "",
        f"The base has {plan['layers']} layers. {plan['test_rows']:,} test problems read with the given solution"
        f"{solved}. Made with {versions}, in {minutes:.0f} minutes.",
        "",
        "Learned head minus the doubt of the same base, in nats per token. Where it is negative, the head is better:",
        "",
        *_differences(results["given"]),
    ]
    found += ["", "<details><summary>NLL of every rule, and what it defers</summary>"]
    for name, given in results["given"].items():
        found += ["", f"**{name[0].upper()}{name[1:]}**: NLL in nats per token at equal deferral rates:", ""]
        found += _rules(given)
    for name, given in list(results["given"].items())[:2]:
        rules = list(next(iter(given["kinds"].values()))["deferred"])
        found += ["", f"Share of tokens that each rule defers at a rate of 30 %, by kind of token ({name}):", ""]
        found += _table(
            ["kind of token", "share", "assistant's gain, nats", *rules],
            [
                [kind, f"{of['share']:.1%}", f"{of['gain']:+.2f}", *(f"{of['deferred'][rule]:.0%}" for rule in rules)]
                for kind, of in given["kinds"].items()
            ],
        )
    found += ["", "</details>"]
    if "written" not in results:
        return found
    found += ["", "Free generation, greedy:", ""]
    return found + _table(
        ["system", "answers right", "deferred", "tokens/s"],
        [
            [
                row["name"].partition("=")[0]
                + (f" {float(row['name'][10:]):.7g}" if "threshold=" in row["name"] else ""),
                _interval(row["measures"]["accuracy"]),
                f"{row['deferral_rate']:.1%}",
                f"{row['tokens_per_s']:.0f}",
            ]
            for row in results["written"]["rows"]
        ],
    )


def _differences(given: dict[str, dict[str, Any]]) -> list[str]:
    by_way = {name: one["rules"][DOUBT] for name, one in given.items()}
    rates = [at_rate["rate"] for at_rate in next(iter(by_way.values()))]
    body = [[name, *(_nats(at_rate["learned_minus"]) for at_rate in row)] for name, row in by_way.items()]
    return _table(["training", *(f"{rate:.0%}" for rate in rates)], body)


def _rules(given: dict[str, Any]) -> list[str]:
    rates = [one["rate"] for one in next(iter(given["rules"].values()))]
    body = [
        [
            rule,
            *(f"{one['nll']['mean']:.3f}" for one in at_rates),
            f"{given['auc'][rule]:.3f}" if rule in given["auc"] else "",
        ]
        for rule, at_rates in given["rules"].items()
    ]
    body += [
        [f"learned minus {rule}", *(_nats(one["learned_minus"]) for one in given["rules"][rule]), ""]
        for rule in (DOUBT, RANDOM)
    ]
    alone = ", ".join(f"{name} {_nats(of['nll'])}" for name, of in given["alone"].items())
    both = ", ".join(f"{name} {_nats(of)}" for name, of in given["combined"].items())
    heading = ["rule", *(f"{rate:.0%}" for rate in rates), "AUC"]
    return [*_table(heading, body), "", f"Alone: {alone}. Combined at every token: {both}."]


def _nats(of: dict[str, float]) -> str:
    return f"{of['mean']:.3f} ({of['low']:.3f} to {of['high']:.3f})"
