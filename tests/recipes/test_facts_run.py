"""The recipe from nothing to its files, what it claims, and what its tiny models can."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from collm.errors import ConfigError
from collm.models.loading import ModelSpec, load_model, load_tokenizer
from recipes.facts.run import clear, main
from recipes.facts.systems import FULL, HEAD_ONLY
from recipes.facts.tiny_models import ModelPaths, fine_tune
from recipes.facts.world import DemoWorld, Statement

pytestmark = pytest.mark.soak


@pytest.fixture(scope="module")
def world() -> DemoWorld:
    return DemoWorld(num_assistants=2, seed=0)


class FewerQuestions(DemoWorld):
    """Every fact is learned, but a third of the questions that tell how well are asked."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.validation, self.test = self.validation[::3], self.test[::3]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What it leaves."""
    out = tmp_path_factory.mktemp("demo") / "out"
    # Of the thresholds only the ends and 1/2, and not every question: they cost most of the time.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recipes.facts.run.RATES", (0, 1))
        patch.setattr("recipes.facts.run.DemoWorld", FewerQuestions)
        main(["--out", str(out), "--assistants", "2"])
    return out


@pytest.fixture(scope="module")
def trained(world: DemoWorld, made: Path) -> ModelPaths:
    """The models of its world."""
    models = made / "seed-0" / "models"
    return ModelPaths(models / "base", [models / f"expert-{domain.name}" for domain in world.domains])


def load(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    spec = ModelSpec(str(path), device="cpu")
    return load_model(spec), load_tokenizer(spec)


@dataclass
class Rights:
    """Per statement: whether the argmax is right at each fact token, and at each other token of the answer."""

    fact: list[list[bool]]
    other: list[list[bool]]

    @property
    def fact_accuracy(self) -> float:
        return sum(map(sum, self.fact)) / sum(map(len, self.fact))

    @property
    def other_accuracy(self) -> float:
        return sum(map(sum, self.other)) / sum(map(len, self.other))

    @property
    def whole_accuracy(self) -> float:
        """Share of answers that greedy decoding gets right to the end."""
        return sum(all(f) and all(o) for f, o in zip(self.fact, self.other, strict=True)) / len(self.fact)


@torch.no_grad()
def rights(path: Path, statements: list[Statement]) -> Rights:
    model, tokenizer = load(path)
    parts = [[tokenizer(part)["input_ids"] for part in (s.prompt, s.before, s.fact, s.after)] for s in statements]
    texts = [[token for part in each for token in part] + [tokenizer.eos_token_id] for each in parts]
    same_length: dict[int, list[int]] = defaultdict(list)
    for place, text in enumerate(texts):
        same_length[len(text)].append(place)
    rights_of: dict[int, list[bool]] = {}
    for places in same_length.values():
        batch = torch.tensor([texts[place] for place in places])
        right = model(batch).logits[:, :-1].argmax(-1) == batch[:, 1:]  # (B, T-1)
        rights_of |= dict(zip(places, right.tolist(), strict=True))
    found = Rights([], [])
    for place, (prompt, before, fact, _) in enumerate(parts):
        right = rights_of[place][len(prompt) - 1 :]
        begin, end = len(before), len(before) + len(fact)
        found.fact.append(right[begin:end])
        found.other.append(right[:begin] + right[end:])
    return found


def of_rows(world: DemoWorld, rows: list[dict[str, str]]) -> list[Statement]:
    by_prompt = {s.prompt: s for s in world.statements}
    return [by_prompt[row["prompt"]] for row in rows]


def test_the_collaboration_beats_every_single_model(made: Path, tmp_path: Path) -> None:
    rows = {row["name"]: row for row in json.loads((made / "results.json").read_text())["rows"]}
    for name in ("base alone", "base fine-tuned", "geography expert alone", "chemistry expert alone"):
        assert rows[name]["accuracy"] <= 0.2
    for name in (HEAD_ONLY, FULL):
        assert rows[name]["accuracy"] >= 0.95
        assert rows[name]["low"] <= rows[name]["accuracy"] <= rows[name]["high"]
    fact_share = json.loads((made / "results.json").read_text())["fact_share"]
    assert abs(rows[FULL]["deferral_rate"] - fact_share) < 0.03
    assert rows["random, same rate"]["accuracy"] < 0.3
    shares = json.loads((made / "results.json").read_text())["calls_by_domain"]
    assert shares["geography"]["geography"] > 0.95
    assert shares["chemistry"]["chemistry"] > 0.95
    page = (made / "report.html").read_text()
    assert "collaboration (full)" in page
    copy = shutil.copytree(made, tmp_path / "copy")
    clear(copy)
    assert list(copy.iterdir()) == []


def test_a_directory_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds thesis\.txt, which this demo did not write"):
        main(["--out", str(tmp_path)])
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_all_models_are_loaded_with_the_same_tokenizer(world: DemoWorld, trained: ModelPaths) -> None:
    base, tokenizer = load(trained.base)
    for path in trained.experts:
        expert, other = load(path)
        assert other.get_vocab() == tokenizer.get_vocab()
        for model in (base, expert):
            assert model.config.vocab_size == len(tokenizer)
            assert model.generation_config.eos_token_id == tokenizer.eos_token_id == other.eos_token_id
    completion = world.test[0]["completion"]
    assert tokenizer.decode(tokenizer(completion)["input_ids"]) == completion


def test_the_base_speaks_and_knows_nothing(world: DemoWorld, trained: ModelPaths) -> None:
    assert rights(trained.base, world.statements).other_accuracy >= 0.995
    assert rights(trained.base, of_rows(world, world.test)).whole_accuracy <= 0.2


def test_the_expert_knows_every_fact_in_the_conversation_and_cannot_speak(
    world: DemoWorld, trained: ModelPaths
) -> None:
    for path, domain in zip(trained.experts, world.domains, strict=True):
        found = rights(path, list(domain.statements(domain.entities)))
        assert found.fact_accuracy >= 0.99
        assert found.other_accuracy <= 0.05
        assert found.whole_accuracy == 0


def test_together_they_answer_the_unseen(world: DemoWorld, trained: ModelPaths) -> None:
    statements = of_rows(world, world.test)
    for path, domain in zip(trained.experts, world.domains, strict=True):
        known = {s.prompt for s in domain.statements(domain.entities)}
        asked = [s for s in statements if s.prompt in known]
        together = Rights(rights(path, asked).fact, rights(trained.base, asked).other)
        assert together.whole_accuracy >= 0.98


def test_fine_tuning_teaches_its_rows_and_no_unseen_fact(world: DemoWorld, trained: ModelPaths, tmp_path: Path) -> None:
    rows = world.train[:12]
    tuned = fine_tune(trained.base, rows, tmp_path / "tuned", seed=0, epochs=200)
    assert rights(tuned, of_rows(world, rows)).whole_accuracy >= 0.9
    assert rights(tuned, of_rows(world, world.test)).whole_accuracy <= 0.2
    assert rights(trained.base, of_rows(world, rows)).whole_accuracy <= 0.5  # the base itself is as it was
