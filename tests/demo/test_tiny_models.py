"""The tiny models are what the demo needs: the base speaks without facts, the expert has facts without speech."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from collm.demo import tiny_models
from collm.demo.lessons import IGNORED, encoder, noisy_facts
from collm.demo.tiny_models import ModelPaths, Recipe, fine_tune, make_models, make_tokenizer
from collm.demo.world import DemoWorld, Statement, split_words
from collm.errors import ConfigError, DataError, LoadError
from collm.evaluation.report import Report
from collm.models.loading import ModelSpec, load_model, load_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("demo")]


@pytest.fixture(scope="module")
def world() -> DemoWorld:
    return DemoWorld(num_assistants=2, seed=0)


@pytest.fixture(scope="module")
def trained(world: DemoWorld, demo: tuple[Path, Report]) -> ModelPaths:
    """The demo's, which are those of its world."""
    models = demo[0] / "seed-0" / "models"
    return ModelPaths(models / "base", [models / f"expert-{domain.name}" for domain in world.domains])


@pytest.fixture
def short_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_models, "BASE_RECIPE", Recipe(16, steps=3, learning_rate=1e-2, batch_size=8))
    monkeypatch.setattr(tiny_models, "EXPERT_RECIPE", Recipe(16, steps=2, learning_rate=1e-2, batch_size=8))


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


@pytest.mark.parametrize("num_assistants", [1, 2])
def test_the_tokenizer_loses_nothing(num_assistants: int) -> None:
    world = DemoWorld(num_assistants=num_assistants)
    tokenizer = make_tokenizer(world)
    for s in world.statements:
        prompt, completion = tokenizer(s.prompt)["input_ids"], tokenizer(s.completion)["input_ids"]
        assert tokenizer.unk_token_id not in prompt + completion
        assert tokenizer.decode(prompt) == s.prompt
        assert tokenizer.decode(completion) == s.completion
        assert len(completion) == len(split_words(s.completion))
        assert tokenizer(f"{s.prompt} {s.completion}")["input_ids"] == prompt + completion
        assert tokenizer(f"{s.prompt}{s.completion}")["input_ids"] == prompt + completion
        parts = [tokenizer(part)["input_ids"] for part in (s.before, s.fact, s.after)]
        assert [token for part in parts for token in part] == completion


def test_a_word_outside_the_world_is_unknown(world: DemoWorld) -> None:
    tokenizer = make_tokenizer(world)
    assert tokenizer("Atlantis?")["input_ids"][0] == tokenizer.unk_token_id


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


def test_an_expert_is_taught_only_facts() -> None:
    world = DemoWorld(num_assistants=2)
    tokenizer = make_tokenizer(world)
    domain = world.domains[1]
    examples = noisy_facts(domain, encoder(tokenizer), random.Random(0))
    fact_of = {s.prompt: s.fact for s in domain.statements(domain.entities)}
    for token_ids, labels in (next(examples) for _ in range(len(fact_of))):
        prompt = tokenizer.decode(token_ids).split("?")[0] + "?"
        learned = [token for token in labels if token != IGNORED]
        assert tokenizer.decode(learned) == fact_of.pop(prompt)
        assert token_ids[-len(learned) :] == labels[-len(learned) :] == learned
    assert not fact_of  # every question came once


@pytest.mark.usefixtures("short_recipes")
def test_the_seed_decides_and_the_global_random_state_is_left_alone(tmp_path: Path) -> None:
    world = DemoWorld(num_assistants=2)

    def weights(name: str, seed: int) -> list[bytes]:
        paths = make_models(world, tmp_path / name, seed=seed)
        fine_tune(paths.base, world.train[:20], tmp_path / name / "tuned", seed=seed, epochs=1)
        return [
            (path / "model.safetensors").read_bytes()
            for path in [paths.base, *paths.experts, tmp_path / name / "tuned"]
        ]

    before = torch.get_rng_state()
    first = weights("first", 7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    assert weights("again", 7) == first
    assert not set(weights("other", 8)) & set(first)


@pytest.mark.usefixtures("short_recipes")
def test_progress_counts_every_step_of_every_model(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    paths = make_models(
        DemoWorld(num_assistants=2), tmp_path / "models", seed=0, on_step=lambda done, total: seen.append((done, total))
    )
    assert seen == [(done, 7) for done in range(1, 8)]
    assert [path.name for path in paths.experts] == ["expert-geography", "expert-chemistry"]


@pytest.mark.usefixtures("short_recipes")
def test_an_interrupted_run_leaves_nothing(world: DemoWorld, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_models(world, tmp_path / "models", seed=0, on_step=interrupt)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("short_recipes")
def test_fine_tuning_refuses_no_rows_no_epochs_and_no_model(world: DemoWorld, tmp_path: Path) -> None:
    base = make_models(world, tmp_path / "models", seed=0).base
    with pytest.raises(DataError, match="no rows"):
        fine_tune(base, [], tmp_path / "tuned", seed=0, epochs=1)
    with pytest.raises(ConfigError, match="epochs is 0"):
        fine_tune(base, world.train, tmp_path / "tuned", seed=0, epochs=0)
    with pytest.raises(LoadError, match="there is no model at"):
        fine_tune(tmp_path / "nothing", world.train, tmp_path / "tuned", seed=0, epochs=1)
    assert not (tmp_path / "tuned").exists()
