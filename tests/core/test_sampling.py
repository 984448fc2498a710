"""Sampling laws: exact supports, and frequencies with the odds of a false alarm stated."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from collm.core.sampling import sample, seeded, token_probs

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])


def test_temperature_zero_is_the_argmax() -> None:
    assert token_probs(LOGITS, 0.0).tolist() == [1, 0, 0, 0, 0, 0]


def test_temperature_divides_the_logits() -> None:
    assert torch.allclose(token_probs(LOGITS, 0.7), torch.softmax(LOGITS / 0.7, -1))


def test_top_k_keeps_the_k_most_probable_renormalised() -> None:
    expected = torch.softmax(LOGITS[:3], -1)
    assert torch.allclose(token_probs(LOGITS, 1.0, top_k=3)[:3], expected)
    assert token_probs(LOGITS, 1.0, top_k=3)[3:].sum() == 0
    assert torch.equal(token_probs(LOGITS, 1.0, top_k=99), token_probs(LOGITS, 1.0))


@pytest.mark.slow
@given(st.floats(0.01, 1.0), st.lists(st.floats(-5, 5), min_size=2, max_size=12))
def test_top_p_keeps_the_smallest_set_that_reaches_the_share(top_p: float, logits: list[float]) -> None:
    full = torch.softmax(torch.tensor(logits), -1)
    kept = token_probs(torch.tensor(logits), 1.0, top_p=top_p) > 0
    ranked = full.sort(descending=True).values
    size = int(kept.sum())
    assert ranked[:size].sum() >= top_p - 1e-5
    assert size == 1 or ranked[: size - 1].sum() < top_p + 1e-5
    assert full[kept].min() >= (full[~kept].max() if (~kept).any() else 0)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.8}])
def test_frequencies_follow_the_stated_law(options: dict[str, float]) -> None:
    """Each of 6 cells lies within 5 standard deviations: a false alarm has odds below 1 in 250,000 per case,
    and the fixed seed makes it the same at every run."""
    n = 20_000
    probs = token_probs(LOGITS, **{"temperature": 1.0, **options})  # type: ignore[arg-type]
    draws = sample(probs.expand(n, -1), torch.rand(n, generator=torch.Generator().manual_seed(0)))
    counts = torch.bincount(draws, minlength=6).double()
    spread = (n * probs * (1 - probs)).sqrt().double()
    assert ((counts - n * probs).abs() <= 5 * spread).all()


@given(st.floats(0, 1, exclude_max=True), st.lists(st.sampled_from([0.0, 1e-9, 0.1, 3.0]), min_size=1, max_size=9))
def test_a_token_of_probability_zero_is_never_drawn(uniform: float, weights: list[float]) -> None:
    probs = torch.tensor([*weights, 1.0])
    drawn = sample(probs / probs.sum(), torch.tensor(uniform, dtype=torch.float64))
    assert probs[drawn] > 0


def test_every_seed_draws_its_own_numbers() -> None:
    near = [sign * (2**power + one) for power in (31, 32, 62, 63) for one in (-1, 0, 1) for sign in (-1, 1)]
    seeds = [*range(-50, 50), *near]
    drawn = {seed: tuple(seeded(seed).random() for _ in range(4)) for seed in seeds}
    assert len(set(drawn.values())) == len(set(seeds))
    assert all(tuple(seeded(seed).random() for _ in range(4)) == numbers for seed, numbers in drawn.items())
    assert seeded(None).random() != seeded(None).random()
