"""What scores promise before training."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from collm.errors import ArtefactError, ConfigError
from collm.models.language_model import LanguageModel
from collm.models.loading import ModelSpec
from collm.training.inspection import LabelReport, TokenViews, label_tokens, stored_scores
from collm.training.scores import load_scores
from collm.training.scoring import write_scores
from tests.training.conftest import Tiny, make_scores, random_examples

EXAMPLES = random_examples(30)
NEVER = make_scores(EXAMPLES, lambda gold: torch.full(gold.shape, -5.0))
EVEN = make_scores(EXAMPLES, lambda gold: torch.where(gold % 2 == 0, -0.1, -5.0))
THIRD = make_scores(EXAMPLES, lambda gold: torch.where(gold % 3 == 0, -0.2, -6.0))


def golds() -> torch.Tensor:
    return torch.cat([torch.tensor(one.token_ids)[1:][torch.tensor(one.is_target)[1:]] for one in EXAMPLES])


def test_reads_the_scores_of_a_run(tiny_model: Tiny, tmp_path: Path) -> None:
    names = ("base", "assistant", "assistant-2")
    for seed, name in enumerate(names):
        write_scores(LanguageModel(tiny_model(seed), name=name), EXAMPLES, tmp_path / name, spec=ModelSpec(name))
    found = stored_scores(tmp_path)
    for name, scores in zip(names, found, strict=True):
        assert torch.equal(scores.logprobs, load_scores(tmp_path / name, EXAMPLES).logprobs)


def test_labels_follow_the_scores_example_by_example() -> None:
    labels, report = label_tokens(NEVER, [THIRD, EVEN])
    gold = golds()
    wanted = torch.where(gold % 2 == 0, 2, torch.where(gold % 3 == 0, 1, 0))  # both right: the surer one
    assert torch.equal(labels, wanted)
    assert report.shares == pytest.approx([(wanted == k).float().mean().item() for k in (1, 2)])
    assert report.share == pytest.approx(sum(report.shares))
    assert report.better == pytest.approx((wanted != 0).float().mean().item())


def test_variant_b_labels_wherever_the_base_is_wrong() -> None:
    assert torch.equal(label_tokens(EVEN, [NEVER], "b")[0], (golds() % 2 != 0).long())
    assert label_tokens(EVEN, [NEVER], "a")[1].share == 0


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


def test_what_is_missing_or_does_not_fit_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="has no assistant"):
        stored_scores(tmp_path)
    with pytest.raises(ConfigError, match="assistant was scored on other examples"):
        label_tokens(EVEN, [make_scores(random_examples(4), lambda gold: -gold)])
    with pytest.raises(ConfigError, match="at least one assistant"):
        label_tokens(EVEN, [])


@pytest.mark.parametrize(
    "changes",
    [
        *({"num_examples": number} for number in (10**12, 29, 31, -1, float("nan"))),
        *({"shard_size": 0}, {"shard_size": "7"}, {"path": None}),
    ],
)
def test_absurd_headers_take_no_memory(changes: dict[str, object], tiny_model: Tiny, tmp_path: Path) -> None:
    for name in ("base", "assistant"):
        write_scores(LanguageModel(tiny_model(0), name=name), EXAMPLES, tmp_path / name, spec=ModelSpec(name))
    header = tmp_path / "base" / "scores.json"
    header.write_text(json.dumps({**json.loads(header.read_text()), **changes}))
    with pytest.raises(ArtefactError, match="scores"):
        stored_scores(tmp_path)


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
