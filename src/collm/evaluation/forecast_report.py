"""A forecast as tables and a chart, for the terminal and as an HTML page."""

from __future__ import annotations

from collm.evaluation.forecast import DOUBT, Forecast
from collm.evaluation.intervals import Interval
from collm.evaluation.report import Chart, ChartPoint, Report, Table


def forecast_report(found: Forecast) -> Report:
    """The page. The first paragraph of its summary is the verdict."""
    notes = [found.verdict, str(found.labels)]
    if (doubt := found.minus.get(DOUBT)) is not None and doubt.high >= 0:
        notes.append("The base's own doubt chooses as well as a head.")
    enough = next((rows for rows, more in found.learning.items() if more.low <= 0), 0)
    if enough:
        steps = ", ".join(f"{more.mean:+.3f} with {rows}" for rows, more in found.learning.items())
        advice = "more are likely to help" if enough == max(found.learning) else f"{enough} are enough"
        notes.append(f"NLL of a head by its number of rows, less that with most: {steps}; {advice}.")
    if (drafting := found.drafting) is not None:
        notes.append(
            f"The assistant with the base as drafter: about {drafting.tokens_per_s:.3g} tokens/s, estimated from how "
            f"often their argmaxes agree ({drafting.tokens:.2f} tokens for a draft of {drafting.length})."
        )
    notes.append("The base tuned alone is not measured, because that needs training: collm tune.")
    shares = [(one.name, *(f"{share:.2%}" for share in one.agreement)) for one in found.authors[1:]]
    cases = ("", "both", "base only", "assistant only", "neither")
    agreement = Table("agreement", "Who is right", "right: the gold token is the argmax", cases, shares)
    tables = [_authors(found), agreement, _rates(found)]
    return Report("Will it pay?", "\n\n".join(notes), charts=[_chart(found)], tables=tables)


def _authors(found: Forecast) -> Table:
    rows = []
    for one in found.authors:
        best = f"{one.best.mean:.1%} ({100 * one.best.low:.0f}..{100 * one.best.high:.0f})", f"{one.lead_nats:.2f}"
        speed = "" if one.pass_ms is None else f"{one.pass_ms:.3g}"
        rows.append((one.name, _nll(one.nll), *best, f"{one.right.mean:.1%}", speed))
    rows.append(("best author", _nll(found.reachable_nll), "", "", "", ""))
    heading = f"{found.num_tokens:,} gold {found.unit} of {found.num_examples} examples"
    note = "best: it gives the most probability, by nats; right: its argmax; intervals: 95 %"
    return Table("authors", heading, note, ("", "NLL", "best", "by", "right", "ms/pass"), rows)


def _rates(found: Forecast) -> Table:
    rows = []
    for point in found.points:
        speed = "" if point.tokens_per_s is None else f"{point.tokens_per_s:.3g}"
        of_rules = (_nll(nll) if name == found.rule else f"{nll.mean:.3f}" for name, nll in point.nll.items())
        rows.append((f"{point.rate:.0%}", *of_rules, f"{point.right[found.rule].mean:.1%}", speed))
    columns = ("rate", *found.points[0].nll, "right", "tokens/s")
    return Table("rates", "NLL by deferral rate", f"right, tokens/s: of the rule {found.rule!r}", columns, rows)


def _chart(found: Forecast) -> Chart:
    curve = [(point.rate, point.right[found.rule]) for point in found.points]
    others = [name for name in found.points[0].right if name != found.rule]
    return Chart(
        name="curve",
        heading="Right tokens against deferral rate",
        note=f"The line is the rule {found.rule!r}, the band its 95% interval. The oracle looks at the gold tokens.",
        x_label="Deferral rate",
        y_label="Right tokens",
        curve=[ChartPoint(f"{rate:.0%}", rate, one.mean, one.low, one.high) for rate, one in curve],
        lines={name: [(point.rate, point.right[name].mean) for point in found.points] for name in others},
        in_use=found.rate,
    )


def _nll(found: Interval) -> str:
    return f"{found.mean:.3f} ({found.low:.2f}..{found.high:.2f})"
