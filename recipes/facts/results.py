"""Results of a run: table, report and results.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from collm.artefact import library_versions
from collm.core.calibration import CalibrationPoint, threshold_text
from collm.core.types import Completion
from collm.evaluation.report import ChartPoint, Report, ShownAnswer, SystemRow, Token, deferral_chart
from recipes.facts.systems import FULL, Measured
from recipes.facts.world import DemoWorld

NUM_EXAMPLES = 12


@dataclass(frozen=True)
class SeedResult:
    """The results of one seed."""

    world: DemoWorld
    measured: list[Measured]
    curve: list[CalibrationPoint]
    threshold: float
    fact_share: float

    def system(self, name: str) -> Measured:
        """One system by its name."""
        return next(measured for measured in self.measured if measured.name == name)


def to_rows(results: list[SeedResult]) -> list[SystemRow]:
    """The rows of the table: each system on the questions of all seeds."""
    return [_row(measured.name, results) for measured in results[0].measured]


def _row(name: str, results: list[SeedResult]) -> SystemRow:
    """The row of a system on the questions of all seeds."""
    measured = [m for result in results for m in result.measured if m.name == name]
    scores = [score for m in measured for score in m.scores]
    completions = [completion for m in measured for completion in m.completions]
    return SystemRow.of(name, scores, completions, sum(m.seconds for m in measured))


def calls_by_domain(results: list[SeedResult]) -> dict[str, dict[str, float]]:
    """For the questions of each domain, the share of deferred tokens that each expert wrote."""
    shares: dict[str, dict[str, float]] = {}
    names = [domain.name for domain in results[0].world.domains]
    for asked, domain in zip(names, results[0].world.domains, strict=True):
        prompts = {statement.prompt for statement in domain.statements(domain.entities)}
        authors = [
            author
            for result in results
            for row, completion in zip(result.world.test, result.system(FULL).completions, strict=True)
            if row["prompt"] in prompts
            for author in completion.authors
            if author
        ]
        shares[asked] = {name: authors.count(k) / max(len(authors), 1) for k, name in enumerate(names, start=1)}
    return shares


def to_report(results: list[SeedResult], rows: list[SystemRow], command: str, seconds: float) -> Report:
    """The report, with the curve and the examples of the first seed."""
    first = results[0]
    names = [domain.name for domain in first.world.domains]
    curve = [
        ChartPoint(f"threshold {threshold_text(p.threshold)}", p.deferral_rate, p.metric, p.low, p.high)
        for p in first.curve
    ]
    rate = next(row for row in rows if row.name == FULL).deferral_rate
    return Report(
        title="Facts: a generalist base and " + ("an expert" if len(names) == 1 else "its experts"),
        summary=_summary(results, rows),
        rows=rows,
        charts=[deferral_chart(curve, rows, rate)],
        examples=_examples(first),
        authors=["base", *(f"{name} expert" for name in names)],
        details={"command": command, "seconds": f"{seconds:.0f}", **library_versions()},
    )


def _examples(result: SeedResult) -> list[ShownAnswer]:
    full = result.system(FULL)
    questions = zip(result.world.test[:NUM_EXAMPLES], full.completions, full.scores, strict=False)
    return [
        ShownAnswer(
            prompt=question["prompt"],
            reference=question["completion"],
            tokens=Token.of(_trimmed(completion)),
            score=score,
        )
        for question, completion, score in questions
    ]


def _trimmed(completion: Completion) -> Completion:
    """Without the space between the prompt and the answer."""
    first, *others = completion.token_texts
    return replace(completion, token_texts=[first.lstrip(), *others])


def _summary(results: list[SeedResult], rows: list[SystemRow]) -> str:
    collaboration = next(row for row in rows if row.name == FULL)
    singles = [row for row in rows if "alone" in row.name or "fine-tuned" in row.name]
    best = max(singles, key=lambda row: row.accuracy)
    verdict = "beats" if collaboration.low > best.high else "does not clearly beat"
    questions = sum(len(result.world.test) for result in results)
    text = (
        f"On {questions} questions about entities that the training data never mentioned, the collaboration answers "
        f"{collaboration.accuracy:.1%} rightly as a whole and {verdict} the best single model ({best.name}, "
        f"{best.accuracy:.1%}). "
        f"Assistants write {collaboration.deferral_rate:.1%} of its tokens; {results[0].fact_share:.1%} of the "
        "tokens of the reference answers are facts."
    )
    called = calls_by_domain(results)
    if len(called) == 1:
        return text
    shares = ", ".join(f"{called[name][name]:.0%} of the deferred tokens on {name} go to its expert" for name in called)
    return f"{text}\n\nEach expert is called for its own: {shares}."


def to_json(results: list[SeedResult], rows: list[SystemRow], command: str, seconds: float) -> dict[str, Any]:
    """The content of results.json."""
    return {
        "command": command,
        "seconds": round(seconds, 1),
        "versions": library_versions(),
        "num_questions": sum(len(result.world.test) for result in results),
        "fact_share": results[0].fact_share,
        "rows": [asdict(row) for row in rows],
        "thresholds": [result.threshold for result in results],
        "curve": [asdict(point) for point in results[0].curve],
        "calls_by_domain": calls_by_domain(results),
    }
