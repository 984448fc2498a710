"""Every pair of capabilities that a user can combine works as the slow loops say, or is refused before work begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from collm.core.combinations import ContrastivePolicy, MixturePolicy
from collm.core.params import StructuredOutputs
from collm.core.policies import BudgetPolicy, ConfidencePolicy, JointPolicy, Policy, ThresholdPolicy
from collm.tools.calls import in_process
from tests.crossings.cases import Case
from tests.crossings.running import Refused
from tests.crossings.workflows import run
from tests.crossings.world import World, knows

pytestmark = pytest.mark.soak


def options(**given: Any) -> Callable[[Case], None]:
    return lambda case: case.options.update(given)


def rule(policy: Policy) -> Callable[[Case], None]:
    return lambda case: setattr(case, "policy", policy)


def way(name: str) -> Callable[[Case], None]:
    return lambda case: case.ways.add(name)


def step(name: str) -> Callable[[Case], None]:
    return lambda case: case.steps.add(name)


def sets(**values: Any) -> Callable[[Case], None]:
    return lambda case: [setattr(case, name, value) for name, value in values.items()] and None


def several(case: Case) -> None:
    case.n = 3
    case.options.setdefault("temperature", 0.8)
    case.options.setdefault("seed", 5)


CAPABILITIES: dict[str, Callable[[Case], None]] = {
    "one assistant": lambda case: None,
    "two assistants": sets(models=2),
    "tool": sets(tools=1),
    "adapter": sets(adapter=True),
    "quantized base": sets(quantized=True),
    "two tokenizers": sets(strange=True),
    "threshold": rule(ThresholdPolicy(0.3)),
    "budget": rule(BudgetPolicy(0.4, 0.3)),
    "joint": rule(JointPolicy()),
    "mixture": rule(MixturePolicy()),
    "confidence": rule(ConfidencePolicy()),
    "contrastive": rule(ContrastivePolicy()),
    "grammar": options(structured_outputs=StructuredOutputs(regex="[a-m ]{3,8}[n-z ]+")),
    "tools": sets(offers_tools=True),
    "stop strings": options(stop=("e", "th")),
    "penalties": options(presence_penalty=0.4, frequency_penalty=0.3, repetition_penalty=1.3),
    "n": several,
    "seed": options(temperature=0.8, seed=5),
    "echo": options(prompt_logprobs=2),
    "stream": way("stream"),
    "failing neighbour": way("failing neighbour"),
    "cancel": way("cancel"),
    "preempt": way("preempt"),
    "save and load": step("save and load"),
    "calibrate": step("calibrate"),
    "servers": step("servers"),
    "one engine": step("one engine"),
    "serve": step("serve"),
    "eval": step("eval"),
    "resume": step("resume"),
    "lm-eval": step("lm-eval"),
}
RULES = {"threshold", "budget", "joint", "mixture", "confidence", "contrastive"}
ASKING = {"mixture", "confidence", "contrastive"}
ENDS = {"serve", "eval", "lm-eval", "resume"}
"""Ways to use a collaboration. "resume" is an evaluation."""
WITHOUT_MEANING: list[tuple[set[str], set[str]]] = [
    (RULES, RULES),
    (ENDS, ENDS - {"eval"}),
    ({"one assistant"}, {"two assistants"}),
    # An evaluation and the harness make their own requests, and thresholds alone are calibrated.
    ({"eval", "resume", "lm-eval", "calibrate"}, {"tools", "n", "echo", "stream", "cancel"}),
    ({"calibrate"}, RULES - {"threshold"}),
    ({"lm-eval"}, {"seed", "penalties", "grammar"}),
    ({"servers", "one engine"}, {"preempt"}),  # the caches are theirs
    ({"servers"}, {"one engine"}),
]
PAIRS = [
    (one, other)
    for one, other in combinations(CAPABILITIES, 2)
    if not any((one in a and other in b) or (one in b and other in a) for a, b in WITHOUT_MEANING)
]
REFUSED = {
    *(("two tokenizers", what) for what in (*ASKING, "grammar", "echo", "servers", "one engine")),
    *(("tool", where) for where in ("servers", "one engine")),
    *((rule, where) for rule in ASKING for where in ("servers", "one engine")),
    *((feature, where) for feature in ("grammar", "echo") for where in ("servers", "one engine")),
    *((where, "lm-eval") for where in ("servers", "one engine")),
    ("quantized base", "servers"),
    ("joint", "servers"),
    ("penalties", "servers"),
    ("two assistants", "one engine"),
    ("echo", "stream"),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("collm.models.tools.open_tool", lambda spec: in_process(knows))
        yield World(tmp_path_factory.mktemp("crossings"))


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_a_pair(one: str, other: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case()
    for name in (one, other):
        CAPABILITIES[name](case)
    with ExitStack() as stack:
        try:
            run(world, case, tmp_path, monkeypatch, stack)
            refused = ""
        except Refused as refusal:
            refused = str(refusal)
            assert "\n" not in refused
            assert 10 < len(refused) < 400
    assert bool(refused) == ((one, other) in REFUSED), refused
