"""The measures of an evaluation, counted by hand on four tokens."""

from __future__ import annotations

import math

import pytest
import torch

from collm.training.measures import TokenViews


def test_measures_of_four_tokens_and_two_assistants() -> None:
    views = TokenViews(
        base_logprob=torch.tensor([-1.0, -2.0, -3.0, -4.0]),
        base_correct=torch.tensor([True, False, False, False]),
        assistant_logprobs=torch.tensor([[-0.1, -5.0], [-0.2, -0.1], [-6.0, -0.3], [-7.0, -8.0]]),
        assistant_correct=torch.tensor([[True, False], [True, True], [False, True], [False, False]]),
        defer_logits=torch.tensor([[-9.0, -9.0], [9.0, -9.0], [-9.0, 9.0], [1.0, -9.0]]),
    )
    measured = views.measures()
    # pseudo-labels: 0, 2 (surer of two), 2, 0; the head says 0, 1, 2, 1
    assert measured["pseudo_label_share"] == 0.5
    assert measured["pseudo_label_agreement"] == 0.5
    assert measured["deferral_rate"] == 0.75
    assert measured["head_auc"] == 1.0
    assert measured["base_nll"] == 2.5
    assert measured["assistant_1_nll"] == pytest.approx(13.3 / 4)
    assert measured["assistant_2_nll"] == pytest.approx(13.4 / 4)
    odds = [1 + 2 * math.exp(-9), *[1 + math.exp(9) + math.exp(-9)] * 2, 1 + math.e + math.exp(-9)]
    assert measured["defer_prob"] == pytest.approx(sum(1 - 1 / each for each in odds) / 4)
    says = [
        math.exp(-1) + math.exp(-9) * (math.exp(-0.1) + math.exp(-5)),
        math.exp(-2) + math.exp(9 - 0.2) + math.exp(-9 - 0.1),
        math.exp(-3) + math.exp(-9 - 6) + math.exp(9 - 0.3),
        math.exp(-4) + math.exp(1 - 7) + math.exp(-9 - 8),
    ]
    expected = -sum(math.log(each / odd) for each, odd in zip(says, odds, strict=True)) / 4
    assert measured["loss"] == pytest.approx(expected, rel=1e-5)


def test_one_assistant_needs_no_number_and_nobody_to_ask_no_auc() -> None:
    views = TokenViews(*(torch.zeros(2), torch.ones(2, dtype=torch.bool)), *(torch.zeros(2, 1),) * 3)
    measured = views.measures()
    assert "assistant_nll" in measured
    assert math.isnan(measured["head_auc"])
