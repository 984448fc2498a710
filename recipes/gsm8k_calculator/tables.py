"""Output for readers: the tables of docs/results.md, and solutions in their authors' colours."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from collm import CoLLM, SamplingParams
from collm.atomic import atomic_file
from collm.cli.terminal import coloured, legend
from collm.core.policies import ThresholdPolicy
from collm.training.data import Row

if TYPE_CHECKING:
    pass

PAGE, PICTURE = "results.md", "gsm8k.svg"
_WIDTH = 110


def write_tables(folder: Path, results: dict[str, Any]) -> None:
    """Write the tables into the folder's results.md."""
    write_section(folder / PAGE, "gsm8k_calculator", _lines(results))


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


def _lines(results: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    minutes = sum(results["seconds"].values()) / 60
    return [
        f"    {results['command']} --data DIR --docs docs",
        "",
        f"{results['test_problems']} test problems with the given solution as context, {results['written_problems']} "
        f"written freely. Made with {versions}, in {minutes:.0f} minutes.",
        "",
        *_given(results["rows"]),
        "",
        *_written(results["rows"]),
    ]


def _given(rows: Sequence[dict[str, Any]]) -> list[str]:
    heading = ["system", "threshold", "equations right", "asked", "asked in vain", "NLL per token"]
    body = [
        [
            row["name"],
            _eta(at),
            _interval(at["equations"]),
            _share(at["deferred"]),
            _share(at["in_vain"]),
            f"{row['nll']:.4f}" if at is row["given"][0] else "",
        ]
        for row in rows
        for at in row["given"]
    ]
    return ["With the given solution as context:", "", *_table(heading, body)]


def _written(rows: Sequence[dict[str, Any]]) -> list[str]:
    heading = ["system", "threshold", "equations right", "of", "answers right", "deferred", "asked", "asked in vain"]
    body = [
        [
            row["name"],
            _eta(at),
            _interval(at["equations"]),
            f"{at['num_equations']:,}",
            _interval(at["answers"]),
            _share(at["deferral_rate"]),
            _share(at["calls"]),
            _share(at["in_vain"]),
        ]
        for row in rows
        for at in row["written"]
    ]
    return ["Free generation, greedy:", "", *_table(heading, body)]


def _table(heading: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    rule = "|--|" + "--:|" * (len(heading) - 1)
    return ["| " + " | ".join(heading) + " |", rule, *("| " + " | ".join(cells) + " |" for cells in body)]


def _eta(at: dict[str, Any]) -> str:
    return {1.0: "base alone", -1.0: "always"}.get(at["threshold"], f"{at['threshold']:.3g}")


def _share(value: float) -> str:
    return f"{value:.2%}"


def _interval(of: dict[str, float] | None) -> str:
    if of is None:
        return "none"
    return f"{of['mean']:.1%} ({100 * of['low']:.1f} - {100 * of['high']:.1f})"


def write_picture(folder: Path, model: CoLLM, threshold: float, rows: Sequence[Row], max_new_tokens: int) -> None:
    """Write solutions of these rows' problems as an image, with each token in its author's colour."""
    params = SamplingParams(max_new_tokens=max_new_tokens)
    console = Console(record=True, width=_WIDTH, file=io.StringIO(), force_terminal=True, highlight=False)
    console.print(legend(["base", "calculator"]))
    for row in rows:
        console.print()
        console.print(Text(str(row.prompt), "dim italic"))
        console.print(coloured(model.stream(row.prompt, params, policy=ThresholdPolicy(threshold))))
    with atomic_file(folder / PICTURE) as temporary:
        console.save_svg(str(temporary), title=f"Who wrote what, threshold {threshold:.2g}")
