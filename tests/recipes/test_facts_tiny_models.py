"""The tiny models of the demo, their tokenizer and their lessons."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from collm.errors import ConfigError, DataError, LoadError
from recipes.facts import tiny_models
from recipes.facts.lessons import IGNORED, encoder, noisy_facts
from recipes.facts.tiny_models import Recipe, fine_tune, make_models, make_tokenizer
from recipes.facts.world import DemoWorld, split_words

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world() -> DemoWorld:
    return DemoWorld(num_assistants=2, seed=0)


@pytest.fixture
def short_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_models, "BASE_RECIPE", Recipe(16, steps=3, learning_rate=1e-2, batch_size=8))
    monkeypatch.setattr(tiny_models, "EXPERT_RECIPE", Recipe(16, steps=2, learning_rate=1e-2, batch_size=8))


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
