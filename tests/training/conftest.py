"""Examples, scores and tokenizers for the tests of the training room."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import PreTrainedModel

from collm.models.language_model import LanguageModel
from collm.models.loading import ModelSpec
from collm.models.members import AssistantSpec
from collm.training import scoring
from collm.training.config import CoLLMConfig
from collm.training.examples import Example, Examples, fingerprint
from collm.training.scores import Scores, load_scores
from collm.training.scoring import Scored, write_scores

Tiny = Callable[..., PreTrainedModel]
"""Makes a tiny model: tiny_model(seed, **options)."""

Make = Callable[..., CoLLMConfig]
Saved = Callable[..., Path]


def random_examples(count: int, *, vocab_size: int = 97, seed: int = 0, longest: int = 20) -> Examples:
    """Ragged examples; targets also in the middle, and sometimes the first token marked."""
    rng = random.Random(seed)
    examples = []
    for _ in range(count):
        length = rng.randint(3, longest)
        is_target = [rng.random() < 0.6 for _ in range(length)]
        is_target[-1] = True
        examples.append(Example([rng.randrange(3, vocab_size) for _ in range(length)], is_target))
    return Examples(examples)


def make_scores(examples: Examples, logprob: Callable[[Any], torch.Tensor], correct: Any = None) -> Scores:
    """Scores from functions of each example's gold target tokens."""
    golds = [torch.tensor(example.token_ids)[1:][torch.tensor(example.is_target)[1:]] for example in examples]
    offsets = torch.tensor([0, *map(len, golds)]).cumsum(0)
    values = torch.cat([logprob(gold) for gold in golds]).float()
    corrects = torch.cat([(correct or (lambda gold: logprob(gold) > -0.7))(gold) for gold in golds])
    return Scores(values, corrects.bool(), offsets, fingerprint(examples))


def score_examples(
    model: Scored,
    examples: Examples,
    out: Path,
    *,
    spec: AssistantSpec,
    shard_size: int = scoring.SHARD_SIZE,
    **options: Any,
) -> Scores:
    """Scores of examples, written to a directory and read from it."""
    with patch.object(scoring, "SHARD_SIZE", shard_size):
        write_scores(model, examples, out, spec=spec, **options)
    return load_scores(out, examples, spec)


@pytest.fixture
def score(tmp_path: Path) -> Callable[..., Scores]:
    """Scores examples by a model into a fresh directory: score(model, examples)."""

    def run(module: PreTrainedModel, examples: Examples, name: str = "assistant") -> Scores:
        return score_examples(
            LanguageModel(module, name=name), examples, tmp_path / f"scores-{name}", spec=ModelSpec(name)
        )

    return run


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., CoLLMConfig]:
    """Options for quick runs on the CPU: config(**changes)."""

    def make(**changes: Any) -> CoLLMConfig:
        options = {
            "output_dir": str(tmp_path / "run"),
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
            "warm_start": False,
            "max_length": 64,
        }
        return CoLLMConfig(**{**options, **changes})

    return make
