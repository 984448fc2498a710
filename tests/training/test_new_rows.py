"""New rows of a trained head: the same optimum as a slow fit of the loss, and everything else as it was."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from collm.core.head import DeferralHead
from collm.core.objective import deferral_cost, token_nll
from collm.training.fitting import Examples, concatenated
from collm.training.new_rows import fit_new_rows

H, OLD, NEW, TOKENS = 6, 2, 2, 20


def examples(count: int) -> list[dict[str, torch.Tensor]]:
    """Hidden states and scores. Where the first feature is positive, only the third assistant knows the token."""
    torch.manual_seed(0)
    return [_example() for _ in range(count)]


def _example() -> dict[str, torch.Tensor]:
    hidden = torch.randn(TOKENS, H) * torch.tensor([1.0, 3.0, 0.1, 1.0, 1.0, 0.0]) + 2
    knows = hidden[:, 0] > 2.5
    logprobs = torch.full((TOKENS, OLD + NEW), -6.0)
    logprobs[:, 2] = torch.where(knows, -0.1, -6.0)
    return {
        "hidden": hidden,
        "doubt": torch.zeros(TOKENS, 3),
        "base_logprob": torch.where(knows, -5.0, -0.5),
        "assistant_logprobs": logprobs,
        "base_correct": ~knows,
        "assistant_correct": logprobs > -1,
    }


def trained() -> DeferralHead:
    head = DeferralHead(H, OLD)
    torch.manual_seed(1)
    torch.nn.init.normal_(head.weight, std=0.1)
    torch.nn.init.constant_(head.bias, -1.0)
    return head


def loss(head: DeferralHead, data: Examples, costs: list[float]) -> torch.Tensor:
    tokens = concatenated(data)
    u = F.linear(tokens["hidden"], head.weight, head.bias)
    nll = token_nll(tokens["base_logprob"], tokens["assistant_logprobs"], u).mean()
    return nll + deferral_cost(u, costs) / len(u)


@pytest.mark.parametrize(("costs", "old_biases"), [([0.0] * 4, False), ([0.2] * 4, False), ([0.0] * 4, True)])
@pytest.mark.slow
def test_new_rows_minimise_the_loss_and_leave_the_rest(costs: list[float], old_biases: bool) -> None:
    data, old = examples(30), trained()
    head = old.with_rows([0, 1, None, None])
    report = fit_new_rows(head, NEW, data, costs=costs, seed=0, old_biases=old_biases)
    assert torch.equal(head.weight[:OLD], old.weight)
    assert torch.equal(head.bias[:OLD], old.bias) != old_biases
    assert report["after_nats"] < report["before_nats"] - 0.3
    assert report["num_tokens"] == 30 * TOKENS
    found = loss(head, data, costs)
    found.backward()  # type: ignore[no-untyped-call]
    assert head.bias.grad is not None
    assert head.bias.grad[0 if old_biases else OLD :].abs().max() < 1e-3  # biases have no penalty
    for row in (2, 3):  # no small step is better, but for the penalty
        for step in torch.randn(20, H) * 0.05:
            moved = head.with_rows([0, 1, 2, 3])
            moved.weight.data[row] += step
            assert loss(moved, data, costs) > found - 1e-3


def test_a_useless_assistant_stays_silent() -> None:
    data, head = examples(30), trained().with_rows([0, 1, None, None])
    fit_new_rows(head, NEW, data, costs=[0.0] * 4, seed=0)
    shares = torch.cat([F.linear(one["hidden"], head.weight, head.bias).argmax(-1) for one in data]).bincount()
    assert len(shares) <= 3 or shares[3] == 0


def test_rows_are_taken_in_order() -> None:
    old = trained()
    head = old.with_rows([1, None, 0])
    assert torch.equal(head.weight, torch.stack([old.weight[1], torch.zeros(H), old.weight[0]]))
    assert head.bias.tolist() == [old.bias[1].item(), 0.0, old.bias[0].item()]
