"""Pseudo-labels of scored sets, and what their share says."""

from __future__ import annotations

import pytest
import torch

from collm.errors import ConfigError
from collm.training.labels import LabelReport, label_tokens
from tests.training.conftest import make_scores, random_examples

EXAMPLES = random_examples(12)
NEVER = make_scores(EXAMPLES, lambda gold: torch.full(gold.shape, -5.0))
EVEN = make_scores(EXAMPLES, lambda gold: torch.where(gold % 2 == 0, -0.1, -5.0))
THIRD = make_scores(EXAMPLES, lambda gold: torch.where(gold % 3 == 0, -0.2, -6.0))


def golds() -> torch.Tensor:
    return torch.cat([torch.tensor(one.token_ids)[1:][torch.tensor(one.is_target)[1:]] for one in EXAMPLES])


def test_labels_follow_the_scores_example_by_example() -> None:
    labels = label_tokens(NEVER, [THIRD, EVEN])
    gold = golds()
    wanted = torch.where(gold % 2 == 0, 2, torch.where(gold % 3 == 0, 1, 0))  # both right: the surer one
    assert torch.equal(labels.values, wanted)
    assert torch.equal(torch.cat([labels.of(index) for index in range(len(EXAMPLES))]), wanted)
    shares = labels.report().shares
    assert shares == pytest.approx([(wanted == k).float().mean().item() for k in (1, 2)])
    assert labels.report().share == pytest.approx(sum(shares))
    assert labels.report().better == pytest.approx((wanted != 0).float().mean().item())


def test_variant_b_labels_wherever_the_base_is_wrong() -> None:
    labels = label_tokens(EVEN, [NEVER], "b")
    assert torch.equal(labels.values, (golds() % 2 != 0).long())
    assert label_tokens(EVEN, [NEVER], "a").report().share == 0


@pytest.mark.parametrize(
    ("shares", "better", "meaning"),
    [
        ((0.0,), 0.0, "deferring has no benefit"),
        ((0.004,), 0.3, "expect few deferrals"),
        ((0.03,), 0.7, "3 % on GSM8K"),
        ((0.2, 0.0), 0.7, "no token is labelled with assistant-2"),
        ((0.2, 0.1), 0.84, "gives 84% of the tokens more probability than the base does"),
    ],
)
def test_the_report_says_what_a_share_means(shares: tuple[float, ...], better: float, meaning: str) -> None:
    text = str(LabelReport(1000, shares, better))
    assert meaning in text
    assert f"{sum(shares):.2%} of 1000 target tokens" in text


def test_scores_of_different_sets_do_not_mix() -> None:
    other = random_examples(12, seed=5)
    with pytest.raises(ConfigError, match="assistant-2 was scored on other examples"):
        label_tokens(NEVER, [EVEN, make_scores(other, lambda gold: -gold.float())])
    with pytest.raises(ConfigError, match="at least one assistant"):
        label_tokens(NEVER, [])
