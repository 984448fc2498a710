"""Evaluate systems on the demo's test questions: single models, other policies, the collaborations."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from collm.collaboration import CoLLM
from collm.core.calibration import CalibrationPoint
from collm.core.head import DeferralHead
from collm.core.params import SamplingParams
from collm.core.policies import OraclePolicy, Policy, RandomPolicy, SingleAuthorPolicy, ThresholdPolicy
from collm.core.types import Completion, deferral_rate
from collm.evaluation.calibration import point_of
from collm.evaluation.metrics import exact_match
from collm.models.loading import ModelSpec, load_tokenizer
from collm.run import RunResult
from recipes.facts.world import DemoWorld

PARAMS = SamplingParams(max_tokens=64)
MAX_BATCH = 64
HEAD_ONLY, FULL = "collaboration (head only)", "collaboration (full)"


@dataclass(frozen=True)
class Measured:
    """The results of a system on the test questions.

    Attributes:
        scores: 1 per question whose whole answer is right, else 0.
        completions: one per question.
        seconds: to generate them all.
    """

    name: str
    scores: list[float]
    completions: list[Completion]
    seconds: float

    @property
    def authors(self) -> list[int]:
        """The authors of all tokens."""
        return [author for completion in self.completions for author in completion.authors]


def measure_all(world: DemoWorld, tuned: Path, results: dict[str, RunResult]) -> list[Measured]:
    """Measure all systems of the demo's table, in order.

    Args:
        tuned: the fine-tuned base.
        results: the trained collaborations, "head" and "full".
    """
    full, head_only = results["full"].model, results["head"].model
    names = [domain.name for domain in world.domains]
    fine_tuned = _alone(tuned, full)
    calibrated = {method: ThresholdPolicy(result.calibration.best().threshold) for method, result in results.items()}
    systems: list[tuple[str, CoLLM, Policy | list[Policy]]] = [
        ("base alone", head_only, SingleAuthorPolicy(0)),
        ("base fine-tuned", fine_tuned, SingleAuthorPolicy(0)),
        *((f"{name} expert alone", head_only, SingleAuthorPolicy(k)) for k, name in enumerate(names, start=1)),
        (HEAD_ONLY, head_only, calibrated["head"]),
        (FULL, full, calibrated["full"]),
    ]
    measured = [_measure(name, model, policy, world) for name, model, policy in systems]
    rate = deferral_rate(measured[-1].authors)
    references = [full.template.encode_completion(full.tokenizer, r["prompt"], r["completion"]) for r in world.test]
    oracles: list[Policy] = [OraclePolicy(tuple(e.token_ids[e.is_target.index(True) :])) for e in references]
    measured.insert(-2, _measure("random, same rate", full, RandomPolicy(rate), world, seed=0))
    if full.alignment is None:  # the oracle compares tokens
        measured.insert(-2, _measure("oracle", full, oracles, world))
    return measured


def _alone(path: Path, like: CoLLM) -> CoLLM:
    """Another base in a collaboration, with an untrained head that is not used."""
    head = DeferralHead(like.head.hidden_size, like.head.num_assistants)
    return CoLLM(ModelSpec(str(path)), like.assistants, head, load_tokenizer(ModelSpec(str(path))))


def _measure(
    name: str, model: CoLLM, policy: Policy | list[Policy], world: DemoWorld, *, seed: int | None = None
) -> Measured:
    model.generate(world.test[0]["prompt"], SamplingParams(max_tokens=1), policy=SingleAuthorPolicy(0))  # loads
    params = replace(PARAMS, seed=seed)
    started = time.perf_counter()
    out = model.generate([row["prompt"] for row in world.test], params, policy=policy, max_batch=MAX_BATCH)
    seconds = time.perf_counter() - started
    scores = [exact_match(c.text, row["completion"]) for c, row in zip(out, world.test, strict=True)]
    return Measured(name, scores, list(out), seconds)


def measure_curve(result: RunResult, world: DemoWorld, progress: Callable[[int, int], None]) -> list[CalibrationPoint]:
    """Measure the test questions at every threshold of the calibration."""
    points = []
    thresholds = [point.threshold for point in result.calibration.points]
    for done, threshold in enumerate(thresholds, start=1):
        measured = _measure("", result.model, ThresholdPolicy(threshold), world)
        points.append(point_of(threshold, measured.completions, measured.scores))
        progress(done, len(thresholds))
    return points
