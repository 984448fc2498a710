"""What scores promise before training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from collm.errors import ArtefactError, ConfigError
from collm.models.language_model import LanguageModel
from collm.models.loading import ModelSpec
from collm.training.inspection import inspect, inspect_scores
from collm.training.labels import label_tokens
from collm.training.scoring import load_scores, write_scores
from tests.training.conftest import make_scores, random_examples

EXAMPLES = random_examples(30)
EVEN = make_scores(EXAMPLES, lambda gold: torch.where(gold % 2 == 0, -0.1, -5.0))
THIRD = make_scores(EXAMPLES, lambda gold: torch.where(gold % 3 == 0, -0.2, -6.0))


def test_counts_by_hand() -> None:
    golds = [t for one in EXAMPLES for t, wanted in zip(one.token_ids[1:], one.is_target[1:], strict=True) if wanted]
    found = inspect(EVEN, [THIRD])

    def share(holds: Callable[[int], bool]) -> float:
        return pytest.approx(sum(map(holds, golds)) / len(golds))  # type: ignore[return-value]

    agreement = found.agreements[0]
    assert agreement.both == share(lambda gold: gold % 6 == 0)
    assert agreement.base_only == share(lambda gold: gold % 2 == 0 and gold % 3 != 0)
    assert agreement.assistant_only == share(lambda gold: gold % 2 != 0 and gold % 3 == 0)
    assert agreement.neither == share(lambda gold: gold % 2 != 0 and gold % 3 != 0)
    assert found.labels.share == agreement.assistant_only
    assert found.best_accuracy == share(lambda gold: gold % 2 == 0 or gold % 3 == 0)
    each = [0.1 if gold % 2 == 0 else 0.2 if gold % 3 == 0 else 5.0 for gold in golds]
    assert found.best_nll_nats == pytest.approx(sum(each) / len(golds))
    assert [one.num_targets for one in found.summaries] == [len(golds)] * 2


def test_reads_the_scores_of_a_run(tiny_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "assistant", "assistant-2")):
        model = LanguageModel(tiny_model(seed), name=name)
        write_scores(model, EXAMPLES, tmp_path / name, spec=ModelSpec(name))
    found = inspect_scores(tmp_path)
    base, *assistants = (load_scores(tmp_path / name, EXAMPLES) for name in ("base", "assistant", "assistant-2"))
    assert found == inspect(base, assistants)
    assert found.labels == label_tokens(base, assistants).report()
    assert found.summaries[2] == assistants[1].summary()


def test_what_is_missing_or_does_not_fit_is_named(tiny_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="has no assistant"):
        inspect_scores(tmp_path)
    for name, examples in (("base", EXAMPLES), ("assistant", random_examples(4))):
        write_scores(LanguageModel(tiny_model(0), name=name), examples, tmp_path / name, spec=ModelSpec(name))
    with pytest.raises(ConfigError, match="assistant was scored on other examples"):
        inspect_scores(tmp_path)
    with pytest.raises(ConfigError, match="at least one assistant"):
        inspect(EVEN, [])


@pytest.mark.parametrize(
    "changes",
    [
        {"num_examples": 10**12},
        {"num_examples": 29},
        {"num_examples": 31},
        {"num_examples": -1},
        {"num_examples": float("nan")},
        {"shard_size": 0},
        {"shard_size": "7"},
        {"path": None},
    ],
)
def test_absurd_headers_take_no_memory(
    changes: dict[str, object], tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    for name in ("base", "assistant-1"):
        write_scores(LanguageModel(tiny_model(0), name=name), EXAMPLES, tmp_path / name, spec=ModelSpec(name))
    header = tmp_path / "base" / "scores.json"
    header.write_text(json.dumps({**json.loads(header.read_text()), **changes}))
    with pytest.raises(ArtefactError, match="scores"):
        inspect_scores(tmp_path)
