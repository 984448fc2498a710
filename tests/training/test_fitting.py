"""Heads on stored hidden states: the optimum that a slow optimiser finds, in the units of the hidden states."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from collm.core.head import DeferralHead
from collm.core.objective import deferral_cost, token_nll
from collm.training import fitting
from collm.training.fitting import Examples, fit_layers, fit_likelihood, gathered
from collm.training.scores import stored_examples
from tests.training.conftest import make_scores, random_examples

EXAMPLES = random_examples(200, seed=5)
COUNTS = [one.num_targets for one in EXAMPLES]
SIZE = 6


def planted() -> Examples:
    """An assistant that is better where a hidden state is beyond a sphere, or the doubt is large."""
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(sum(COUNTS), SIZE, generator=generator) * torch.logspace(-2, 1, SIZE) + 2
    doubt = torch.randn(sum(COUNTS), 3, generator=generator)
    norm = ((hidden - 2) / torch.logspace(-2, 1, SIZE)).square().sum(-1)
    base = replace(make_scores(EXAMPLES, lambda gold: -3.0 - gold / 50), hidden=hidden.split(COUNTS), doubt=doubt)
    gains = torch.where((norm > SIZE) | (doubt[:, 1] > 1), 2.5, -2.0)
    return stored_examples(base, [replace(base, logprobs=base.logprobs + gains)])


@pytest.mark.slow
def test_a_linear_head_is_what_a_slow_optimizer_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "PENALTIES", (1e-1, 1e-2))
    data, head, costs = planted(), DeferralHead(SIZE, 1, doubt=True), [0.3]
    fit_likelihood(head, data, costs, seed=0)
    inputs, cut, values = gathered(head, data, 0)
    base, assistants = values["base_logprob"], values["assistant_logprobs"]
    assert 0.75 < cut / len(inputs) < 0.85
    features = ((inputs - inputs.mean(0)) / inputs.std(0, correction=0)).double()

    def objective(u: Tensor, rows: slice | Tensor) -> Tensor:
        return token_nll(base[rows], assistants[rows], u).mean() + deferral_cost(u, costs) / len(u)

    _, penalty, _ = fit_layers(DeferralHead(SIZE, 1, doubt=True), inputs.clone(), cut, objective)
    weight = torch.zeros(1, SIZE + 3, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([weight, bias], lr=2.0)
    for _ in range(200):
        optimizer.zero_grad()
        loss = objective(features @ weight.T + bias, slice(None)) + penalty / 2 * weight.square().sum()
        loss.backward()
        optimizer.step()
    expected = (features @ weight.T + bias).detach()
    torch.testing.assert_close(head(inputs[:, :SIZE], inputs[:, SIZE:]).double(), expected, rtol=1e-2, atol=1e-2)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PENALTIES": (1e-2,), "LEARNING_RATE": 2e-2, "PATIENCE": 1}.items():
        monkeypatch.setattr(fitting, name, value)


@pytest.mark.slow
def test_each_input_and_the_hidden_layer_lower_the_held_out_loss(quick: None) -> None:
    data = planted()
    shapes: list[dict[str, Any]] = [{}, {"doubt": True}, {"width": 16}, {"width": 16, "doubt": True}]
    losses = [fit_likelihood(DeferralHead(SIZE, 1, **shape), data, [0.0], seed=0) for shape in shapes]
    assert losses[1] < losses[0] - 0.02
    assert losses[2] < losses[0] - 0.1
    assert losses[3] < losses[2] - 0.02


@pytest.mark.slow
def test_the_same_seed_gives_the_same_head(quick: None) -> None:
    heads = [DeferralHead(SIZE, 1, width=4) for _ in range(2)]
    losses = [fit_likelihood(head, planted(), [0.0], seed=1) for head in heads]
    assert losses[0] == losses[1]
    assert all(map(torch.equal, heads[0].state_dict().values(), heads[1].state_dict().values()))
