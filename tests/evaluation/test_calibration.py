"""Calibration: thresholds from quantiles, what came is what is recorded, the best is kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from collm import CoLLM, DeferralHead, SamplingParams
from collm.errors import ConfigError, DataError
from collm.evaluation.calibration import ValidationItem, calibrate

PARAMS = SamplingParams(max_new_tokens=8)


@pytest.fixture
def model(tiny_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast) -> CoLLM:
    head = DeferralHead(32)
    torch.nn.init.normal_(head.weight, std=0.5, generator=torch.Generator().manual_seed(0))
    return CoLLM(tiny_model(0), [tiny_model(1)], head, tokenizer)


@pytest.fixture
def items(model: CoLLM) -> list[ValidationItem]:
    """References that only the assistant alone gives."""
    prompts = [f"w{i} w{i + 3}" for i in range(12)]
    answers = model.generate(prompts, PARAMS, threshold=-1)
    return [ValidationItem(prompt, answer.text) for prompt, answer in zip(prompts, answers, strict=True)]


def test_it_finds_who_is_right_and_records_what_came(model: CoLLM, items: list[ValidationItem]) -> None:
    progress: list[tuple[int, int]] = []
    calibration = calibrate(model, items, params=PARAMS, on_completion=lambda *p: progress.append(p))
    assert model.calibration is calibration
    assert calibration.best().threshold == -1
    assert (calibration.best().metric, calibration.best().deferral_rate) == (1.0, 1.0)
    assert calibration.points[0].threshold == 1.0
    assert calibration.points[0].deferral_rate == 0.0
    rates = [point.deferral_rate for point in calibration.points]
    assert rates == sorted(rates)
    assert len(rates) >= 10
    assert progress[-1] == (len(items) * len(rates), len(items) * len(rates))
    for point in calibration.points[::4]:
        out = model.generate([item.prompt for item in items], PARAMS, threshold=point.threshold)
        assert out.deferral_rate == point.deferral_rate
        right = [c.text.split() == item.reference.split() for c, item in zip(out, items, strict=True)]
        assert point.metric == pytest.approx(sum(right) / len(right))
        assert point.low <= point.metric <= point.high


def test_thresholds_aim_at_their_rates_on_the_bases_own_text(model: CoLLM, items: list[ValidationItem]) -> None:
    alone = model.generate([item.prompt for item in items], PARAMS, threshold=1.0)
    probs = [prob for completion in alone for prob in completion.defer_probs]
    calibration = calibrate(model, items, params=PARAMS, rates=(0, 0.3, 1))
    middle = [p.threshold for p in calibration.points if p.threshold not in (1.0, -1.0, 0.5)]
    assert len(middle) == 1
    assert sum(prob > middle[0] for prob in probs) / len(probs) == pytest.approx(0.3, abs=0.02)


def test_a_budget_is_kept_on_the_validation_set(model: CoLLM, items: list[ValidationItem]) -> None:
    calibrate(model, items, metric="token_f1", params=PARAMS)
    for budget in (0.0, 0.25, 0.6):
        out = model.generate([item.prompt for item in items], PARAMS, budget=budget)
        assert out.deferral_rate <= budget


def test_the_base_wins_ties(model: CoLLM, items: list[ValidationItem]) -> None:
    unreachable = [ValidationItem(item.prompt, "w1 " * 30) for item in items]
    assert calibrate(model, unreachable, params=PARAMS).best().threshold == 1.0


def test_bad_input_is_refused(model: CoLLM, items: list[ValidationItem]) -> None:
    with pytest.raises(DataError, match="validation set is empty"):
        calibrate(model, [])
    with pytest.raises(ConfigError, match=r"rate of 1\.2"):
        calibrate(model, items, rates=(0, 1.2))
    with pytest.raises(ConfigError, match="nothing_known"):
        calibrate(model, items, metric="nothing_known")
