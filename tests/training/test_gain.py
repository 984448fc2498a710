"""The head of objective "gain": ridge regression in closed form, and thresholds that are prices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from collm.core.head import DeferralHead, author_logprobs, check_prices, defer_probs
from collm.core.policies import PricePolicy, StepView
from collm.errors import ConfigError, DataError
from collm.training import fitting
from collm.training.gain import FOLDS, PENALTIES, crossed_gains, fit_gain
from collm.training.scores import Scores, TrainingSet, stored_examples
from collm.training.trainer import CoLLMTrainer, fit_head
from tests.training.conftest import Make, make_scores, random_examples

EXAMPLES = random_examples(200, seed=3)
SIZE = 12


def planted(num_assistants: int, noise: float = 0.5) -> tuple[TrainingSet, Tensor, Tensor]:
    """Examples whose gains are linear in the hidden states but for noise, with these states and the gains."""
    generator = torch.Generator().manual_seed(1)
    counts = [one.num_targets for one in EXAMPLES]
    hidden = torch.randn(sum(counts), SIZE, generator=generator) * torch.logspace(-2, 2, SIZE) + 3
    hidden[:, 5] = 3.0
    weight = torch.randn(SIZE, num_assistants, generator=generator) / torch.logspace(-2, 2, SIZE)[:, None]
    gains = (hidden - 3) @ weight + noise * torch.randn(sum(counts), num_assistants, generator=generator)
    base = replace(make_scores(EXAMPLES, lambda gold: -9.0 - gold / 20), hidden=hidden.split(counts))
    base = replace(base, doubt=torch.rand(sum(counts), 3, generator=generator))
    assistants = [replace(base, logprobs=base.logprobs + gains[:, k], hidden=None) for k in range(num_assistants)]
    return TrainingSet(EXAMPLES, assistants, base), hidden, gains


def stored(data: TrainingSet) -> list[dict[str, Tensor]]:
    return stored_examples(data.base_scores, data.assistant_scores)


def with_scores(data: TrainingSet, scores: Scores) -> TrainingSet:
    return TrainingSet(EXAMPLES, [scores], data.base_scores)


@pytest.mark.parametrize("num_assistants", [1, 2])
def test_the_closed_form_is_what_a_slow_optimizer_finds(num_assistants: int) -> None:
    data, hidden, gains = planted(num_assistants)
    head = DeferralHead(SIZE, num_assistants)
    report = fit_gain(head, stored(data), clip=4.0, seed=0)
    features = ((hidden - hidden.mean(0)) / hidden.std(0, correction=0).clamp(min=1e-3)).double()
    weight = torch.zeros(SIZE, num_assistants, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(num_assistants, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        error = (features @ weight + bias - gains.double().clamp(-4, 4)).square().sum(-1).mean()
        loss = error + report["penalty"] * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    predicted = F.linear(hidden, head.weight, head.bias)
    torch.testing.assert_close(predicted.double(), (features @ weight + bias).detach(), rtol=1e-3, atol=1e-3)
    assert head.weight[:, 5].eq(0).all()  # a feature that never varies


def test_the_penalty_is_weak_for_a_rule_and_strong_for_noise() -> None:
    data, _, gains = planted(1, noise=0.3)
    report = fit_gain(DeferralHead(SIZE), stored(data), clip=100.0, seed=0)
    assert report["penalty"] < 0.1
    assert report["error_nats"] == pytest.approx(0.3, rel=0.1)
    assert report["spread_nats"] == pytest.approx(gains.std().item(), rel=0.2)
    assert report["mean_nats"] == pytest.approx(gains.mean().item(), rel=1e-4)
    assert report["num_tokens"] == len(gains)
    noise = with_scores(data, make_scores(EXAMPLES, lambda gold: -torch.rand(len(gold))))
    assert fit_gain(DeferralHead(SIZE), stored(noise), clip=100.0, seed=0)["penalty"] >= 0.1


@pytest.mark.slow
def test_a_hidden_layer_finds_the_line_and_what_no_line_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PENALTIES": (1e-4,), "LEARNING_RATE": 2e-2, "PATIENCE": 2}.items():
        monkeypatch.setattr(fitting, name, value)
    data, hidden, gains = planted(2, noise=0.1)
    line, layer = DeferralHead(SIZE, 2), DeferralHead(SIZE, 2, width=16)
    fit_gain(line, stored(data), clip=100.0, seed=0)
    fit_gain(layer, stored(data), clip=100.0, seed=0)
    assert (layer(hidden) - line(hidden)).std() < 0.15
    bent = with_scores(data, replace(data.base_scores, logprobs=data.base_scores.logprobs + gains[:, 0].abs()))
    reports = [fit_gain(DeferralHead(SIZE, width=width), stored(bent), clip=100.0, seed=0) for width in (0, 16)]
    assert reports[1]["error_nats"] < 0.4 * reports[0]["error_nats"]
    assert reports[1]["spread_nats"] == pytest.approx(reports[0]["spread_nats"], rel=1e-3)


def test_the_doubt_is_an_input() -> None:
    data, _, _ = planted(1)
    seen = data.base_scores.doubt[:, 1]
    knows = with_scores(data, replace(data.base_scores, logprobs=data.base_scores.logprobs + seen))
    reports = [fit_gain(DeferralHead(SIZE, doubt=doubt), stored(knows), clip=100.0, seed=0) for doubt in (False, True)]
    assert reports[0]["error_nats"] > 0.2
    assert reports[1]["error_nats"] < 0.01


def test_gains_are_clipped() -> None:
    """A few tokens that lose a thousand nats hardly move the fit."""
    data, hidden, _ = planted(1)
    (scores,) = data.assistant_scores
    outliers = replace(scores, logprobs=scores.logprobs - 1000 * (torch.arange(len(scores.logprobs)) < 20))
    predicted = []
    for one in (scores, outliers):
        head = DeferralHead(SIZE)
        fit_gain(head, stored(with_scores(data, one)), clip=2.0, seed=0)
        predicted.append(head(hidden))
    assert (predicted[0] - predicted[1]).abs().mean() < 0.2


@pytest.mark.parametrize("num_assistants", [1, 2, 3])
@pytest.mark.parametrize("price", [-2.0, 0.0, 0.7, 5.0])
def test_a_price_is_the_threshold_of_the_largest_gain(num_assistants: int, price: float) -> None:
    generator = torch.Generator().manual_seed(2)
    head = DeferralHead(SIZE, num_assistants, predicts_gain=True)
    torch.nn.init.normal_(head.weight, generator=generator)
    torch.nn.init.normal_(head.bias, generator=generator)
    hidden = torch.randn(500, SIZE, generator=generator)
    u, gains = head(hidden), F.linear(hidden, head.weight, head.bias)
    clear = (gains.amax(-1) - price).abs() > 1e-5
    deferred = defer_probs(u) > PricePolicy((price,)).threshold_at(0, 0, 0.0)
    assert torch.equal(deferred[clear], (gains.amax(-1) > price)[clear])
    assert torch.equal(author_logprobs(u)[:, 1:].argmax(-1), gains.argmax(-1))
    assert deferred.any()
    assert not deferred.all()


@pytest.mark.parametrize("prices", [(0.5, 2.0), (2.0, -1.0, 0.5), (0.3, 0.3), (torch.inf, 0.0), (0.4,)])
def test_with_prices_the_assistant_that_is_worth_most_writes(prices: tuple[float, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    head = DeferralHead(SIZE, max(len(prices), 2), predicts_gain=True)
    torch.nn.init.normal_(head.weight, generator=generator)
    hidden = torch.randn(300, SIZE, generator=generator)
    u, gains = head(hidden), F.linear(hidden, head.weight, head.bias)
    worth = gains - torch.tensor(prices)
    expected = torch.where(worth.amax(-1) > 0, worth.argmax(-1) + 1, 0)
    probs, defer = author_logprobs(u).exp().tolist(), defer_probs(u).tolist()
    views = [StepView(0, 0, one, prob, 0.0, 0.0) for one, prob in zip(probs, defer, strict=True)]
    assert [PricePolicy(prices).author(view) for view in views] == expected.tolist()
    assert len(set(expected.tolist())) > 1


def test_a_gain_that_no_number_can_hold_has_an_author() -> None:
    policy = PricePolicy((0.5, 1.0))
    assert policy.author(StepView(0, 0, [1.0, 0.0, 0.0], 0.0, 0.0, 0.0)) == 0
    assert policy.author(StepView(0, 0, [0.0, 1.0, 0.0], 1.0, 0.0, 0.0)) == 1


def test_what_has_no_price_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"price is 0.7, but this head predicts no gains .* objective 'gain'"):
        check_prices(DeferralHead(4), [0.7])
    with pytest.raises(ConfigError, match="got 3 prices for 2 assistants; give one, or one for each"):
        check_prices(DeferralHead(4, 2, predicts_gain=True), [0.7, 1.0, 2.0])
    with pytest.raises(ConfigError, match=r"prices are \[nan\], expected nats per token"):
        PricePolicy((float("nan"),))


def test_a_head_alone_is_fitted_and_measured(config: Make, tiny_model: Callable[..., torch.nn.Module]) -> None:
    data, *_ = planted(2)
    head, args = DeferralHead(SIZE, 2), config(method="head", objective="gain", gain_clip=4.0)
    measured = fit_head(head, args, data, data)
    assert measured["gain_error_nats"] < measured["gain_spread_nats"] / 2
    assert head.predicts_gain
    assert (
        measured["eval_loss"] < min(measured[f"eval_{one}_nll"] for one in ("base", "assistant_1", "assistant_2")) - 1
    )
    again = DeferralHead(SIZE, 2)
    fit_gain(again, stored(data), clip=4.0, seed=args.seed)
    assert torch.equal(again.weight, head.weight)
    with pytest.raises(ConfigError, match="objective 'gain' reads stored hidden states"):
        CoLLMTrainer(tiny_model(1), DeferralHead(32, 2), config(method="head", objective="gain"), data)


def test_crossed_gains_come_from_heads_that_never_saw_the_example() -> None:
    data, hidden, _ = planted(2)
    (base, assistants), counts = (data.base_scores, data.assistant_scores), [one.num_targets for one in EXAMPLES]
    assert base is not None
    targets = torch.stack([one.logprobs - base.logprobs for one in assistants], -1).clamp(-4, 4).double()
    of_example = torch.arange(len(EXAMPLES)).repeat_interleave(torch.tensor(counts))
    order = torch.randperm(len(EXAMPLES), generator=torch.Generator().manual_seed(7))
    for size, found in zip(
        (1, 4),
        crossed_gains(DeferralHead(SIZE, 2), stored(data), clip=4.0, seed=7, sizes=(1, 4)),
        strict=True,
    ):
        by_penalty = []
        for penalty in PENALTIES:
            predicted = torch.empty_like(targets)
            for fold in range(FOLDS):
                others = torch.cat([order[(fold + step) % FOLDS :: FOLDS] for step in range(1, size + 1)])
                train, test = (torch.isin(of_example, some) for some in (others, order[fold::FOLDS]))
                predicted[test] = slow_ridge(hidden[train].double(), targets[train], penalty)(hidden[test].double())
            by_penalty.append(predicted)
        best = min(by_penalty, key=lambda each: (each - targets).square().mean())
        torch.testing.assert_close(found, best, rtol=1e-4, atol=1e-4)


def slow_ridge(x: Tensor, y: Tensor, penalty: float) -> Callable[[Tensor], Tensor]:
    mean, spread = x.mean(0), x.std(0, correction=0)
    scale = torch.where(spread > 1e-6 * mean.abs(), 1 / spread, 0.0)
    rows = torch.cat([(x - mean) * scale, (penalty * len(x)) ** 0.5 * torch.eye(SIZE).double()])
    weight = torch.linalg.lstsq(rows, torch.cat([y - y.mean(0), torch.zeros(SIZE, y.shape[1]).double()])).solution
    return lambda other: (other - mean) * scale @ weight + y.mean(0)


def test_crossed_gains_need_an_example_for_each_fold() -> None:
    with pytest.raises(DataError, match="4 examples are too few for cross-validation, expected at least 5"):
        crossed_gains(DeferralHead(SIZE), [{}] * 4, clip=4.0, seed=0)
