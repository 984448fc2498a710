"""Calibration: thresholds from quantiles, what came is what is recorded, the best is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial, partialmethod
from itertools import pairwise

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from collm import CoLLM, DeferralHead, SamplingParams
from collm.core.calibration import Calibration, CalibrationOptions, threshold_text
from collm.errors import ConfigError, DataError
from collm.evaluation.calibration import calibrate, check_on
from collm.run.calibrate import calibrate_on, curve_on
from collm.training.data import Row

PARAMS = SamplingParams(max_tokens=8)
options = partial(CalibrationOptions, metric="exact_match", max_tokens=8)


@pytest.fixture
def model(tiny_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast) -> CoLLM:
    head = DeferralHead(32)
    torch.nn.init.normal_(head.weight, std=0.5, generator=torch.Generator().manual_seed(0))
    return CoLLM(tiny_model(0), [tiny_model(1)], head, tokenizer)


@pytest.fixture
def items(model: CoLLM) -> list[Row]:
    """References that only the assistant alone gives."""
    prompts = [f"w{i} w{i + 3}" for i in range(12)]
    answers = model.generate(prompts, PARAMS, threshold=-1)
    return [Row(prompt, answer.text, None, "here") for prompt, answer in zip(prompts, answers, strict=True)]


@pytest.mark.slow
def test_it_finds_who_is_right_and_records_what_came(model: CoLLM, items: list[Row]) -> None:
    progress: list[tuple[int, int]] = []
    calibration = calibrate(model, items, options(), on_completion=lambda *p: progress.append(p))
    assert model.calibration is calibration
    assert calibration.best().threshold == -1
    assert (calibration.best().metric, calibration.best().deferral_rate) == (1.0, 1.0)
    assert calibration.points[0].threshold == 1.0
    assert calibration.points[0].deferral_rate == 0.0
    rates = [point.deferral_rate for point in calibration.points]
    assert rates == sorted(rates)
    assert len(rates) >= 10
    assert progress[-1] == (len(items) * len(rates), len(items) * len(rates))
    assert all(done <= total for done, total in progress)
    for point in calibration.points[::4]:
        out = model.generate([item.prompt for item in items], PARAMS, threshold=point.threshold)
        assert out.deferral_rate == point.deferral_rate
        right = [c.text.split() == item.completion.split() for c, item in zip(out, items, strict=True)]
        assert point.metric == pytest.approx(sum(right) / len(right))
        assert point.low <= point.metric <= point.high
        assert point.rate_low <= point.deferral_rate <= point.rate_high


@pytest.mark.slow
def test_thresholds_aim_at_their_rates_on_the_bases_own_text(model: CoLLM, items: list[Row]) -> None:
    alone = model.generate([item.prompt for item in items], PARAMS, threshold=1.0)
    probs = [prob for completion in alone for prob in completion.defer_probs]
    calibration = calibrate(model, items, options(rates=[0, 0.3, 1], refine=0))
    middle = [p.threshold for p in calibration.points if p.threshold not in (1.0, -1.0, 0.5)]
    assert len(middle) == 1
    assert sum(prob > middle[0] for prob in probs) / len(probs) == pytest.approx(0.3, abs=0.02)
    assert min(abs(prob - middle[0]) for prob in probs) > 1e-6  # rounding in another engine changes no author


@pytest.mark.slow
def test_a_head_that_nearly_always_defers_is_calibrated(model: CoLLM, items: list[Row]) -> None:
    """Its defer probs differ by less than fp32 can tell from 1."""
    with torch.no_grad():
        model.head.weight /= 8
        model.head.bias.fill_(22.0)
    calibration = calibrate(model, items, options(rates=[0, 0.3, 1], refine=0))
    (point,) = [one for one in calibration.points if one.threshold not in (1.0, -1.0, 0.5)]
    assert 1 - 1e-7 < point.threshold < 1
    assert 0.05 < point.deferral_rate < 0.7
    assert 0 < 1 - float(threshold_text(point.threshold)) < 1e-7


def test_a_threshold_below_1_is_not_shown_as_1() -> None:
    texts = {1.0: "1", -1.0: "-1", 0.5: "0.5", 2 / 3: "0.666667", 1 - 2e-10: "0.9999999998", 1 - 1e-16: repr(1 - 1e-16)}
    assert [threshold_text(threshold) for threshold in texts] == list(texts.values())


@pytest.mark.slow
def test_a_budget_is_kept_on_the_validation_set(model: CoLLM, items: list[Row]) -> None:
    calibrate(model, items, options(metric="token_f1"))
    for budget in (0.0, 0.25, 0.6):
        out = model.generate([item.prompt for item in items], PARAMS, budget=budget)
        assert out.deferral_rate <= budget
        assert model.calibration is not None
        assert model.calibration.best(budget).rate_high <= budget


@pytest.mark.slow
def test_thresholds_beyond_the_best_are_left_out_where_they_are_clearly_worse(model: CoLLM, items: list[Row]) -> None:
    """The references are what both models write together."""
    alone = model.generate([item.prompt for item in items], PARAMS, threshold=1.0)
    best = sorted(prob for completion in alone for prob in completion.defer_probs)[-20]
    both = model.generate([item.prompt for item in items], PARAMS, threshold=best)
    rows = [Row(item.prompt, answer.text, None, "here") for item, answer in zip(items, both, strict=True)]
    curve = curve_on(model, rows)
    whole, shorter = (calibrate(model, rows, options(refine=0), curve=known) for known in (None, curve))
    kept = {point.threshold: point for point in shorter.points}
    left_out = [point for point in whole.points if point.threshold not in kept]
    assert len(left_out) >= 3
    assert {1.0, -1.0} <= kept.keys()
    assert all(point.deferral_rate > shorter.best().deferral_rate for point in left_out)
    assert max(point.metric for point in left_out) < shorter.best().metric == whole.best().metric


@pytest.mark.slow
def test_the_base_wins_ties(model: CoLLM, items: list[Row]) -> None:
    unreachable = [Row(item.prompt, "w1 " * 30, None, "here") for item in items]
    assert calibrate(model, unreachable, options()).best().threshold == 1.0


@pytest.mark.slow
def test_a_metric_that_is_the_same_everywhere_leaves_the_choice_to_the_curve(
    model: CoLLM, items: list[Row], caplog: pytest.LogCaptureFixture
) -> None:
    """No answer of 8 tokens equals a completion that goes on, but the assistant predicts the 8 tokens before that."""
    long = [Row(item.prompt, item.completion + " w1" * 4, None, "here") for item in items]
    found, curve = calibrate_on(model, long, options(budgets=[0.3]), source="here", quiet=True), curve_on(model, long)
    assert {point.metric for point in found.points} == {0.0}
    assert found.best().threshold == curve.best().threshold < 1
    assert found.best().gold_accuracy == curve.best().accuracy == max(one.gold_accuracy or 0 for one in found.points)
    assert 0 < found.best(0.3).deferral_rate <= 0.3
    assert found.best(0.3).gold_accuracy > found.points[0].gold_accuracy  # type: ignore[operator]
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith("exact_match does not tell the thresholds apart: on 12 prompts it is 0.000 to 0.000")
    assert "the threshold is chosen teacher-forced" in warning
    assert Calibration.from_dict(json.loads(json.dumps(found.to_dict()))).warning() == warning


def test_the_threshold_of_youdens_j_is_the_only_one(model: CoLLM, items: list[Row]) -> None:
    curve = curve_on(model, items)
    found = calibrate(model, items, options(choose="youden"), curve=curve)
    best = max(range(len(curve)), key=lambda place: curve.youden[place].item())
    assert [point.threshold for point in found.points] == [curve[best].threshold]
    assert found.best().threshold == curve[best].threshold
    with pytest.raises(ConfigError, match="choose is 'youden', which needs the models in this process"):
        calibrate(model, items, options(choose="youden"))
    with pytest.raises(ConfigError, match="budgets have no effect with choose 'youden'"):
        options(choose="youden", budgets=[0.1])
    with pytest.raises(ConfigError, match="choose is 'roc', expected best or youden"):
        options(choose="roc")


@pytest.mark.slow
def test_a_difference_that_may_be_chance_is_none(model: CoLLM, items: list[Row]) -> None:
    """One answer of twelve is right at one end, which is the highest metric."""
    others = [Row(item.prompt, item.completion + " w1" * 4, None, "here") for item in items[1:]]
    found = calibrate(model, [items[0], *others], options(), curve=curve_on(model, items))
    assert max(point.metric for point in found.points) == pytest.approx(1 / 12)
    assert "it is 0.000 to 0.083, which may be chance" in str(found.warning())


@pytest.mark.slow
def test_where_the_metric_differs_it_decides(model: CoLLM, items: list[Row], caplog: pytest.LogCaptureFixture) -> None:
    found = calibrate_on(model, items, options(), source="here", quiet=True)
    assert (found.best().metric, found.warning()) == (1.0, None)
    assert not caplog.records


def test_the_default_metric_suits_the_rows(model: CoLLM, items: list[Row], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    found = calibrate(model, items[:2], CalibrationOptions(max_tokens=2, rates=[0], refine=0))
    assert found.metric_name == "token_f1"
    assert "the metric is token_f1, because most completions have several words" in caplog.text


def test_bad_input_is_refused(model: CoLLM, items: list[Row]) -> None:
    with pytest.raises(DataError, match="validation set is empty"):
        calibrate(model, [])
    with pytest.raises(ConfigError, match=r"rate of 1\.2"):
        CalibrationOptions(rates=[0, 1.2])
    with pytest.raises(ConfigError, match=r"rate of -1"):
        CalibrationOptions(budgets=[-1])
    with pytest.raises(ConfigError, match="refine is -1"):
        CalibrationOptions(refine=-1)
    with pytest.raises(ConfigError, match="nothing_known"):
        calibrate(model, items, CalibrationOptions("nothing_known"))


@pytest.mark.slow
def test_refining_splits_the_widest_step_beside_the_best(model: CoLLM, items: list[Row]) -> None:
    coarse = calibrate(model, items, options(rates=[0, 1], refine=0))
    rounds = []
    for refine in (1, 2, 3):
        finer = calibrate(model, items, options(rates=[0, 1], refine=refine))
        assert {point.threshold for point in coarse.points} < {point.threshold for point in finer.points}
        rounds.append([point for point in finer.points if point not in coarse.points])
    assert [len(new) for new in rounds] == [1, 2, 3]
    # The assistant alone is the best, so its step to the point before it is split, from there down.
    before = coarse.points[-2]
    [first] = rounds[0]
    assert -1 < first.threshold < before.threshold
    probs = [
        prob
        for one in model.generate([i.prompt for i in items], PARAMS, threshold=before.threshold)
        for prob in one.defer_probs
        if -1 < prob < before.threshold
    ]
    assert sum(prob > first.threshold for prob in probs) == pytest.approx(len(probs) / 2, abs=1)
    for earlier, later in pairwise([[round(point.threshold, 6) for point in new] for new in rounds]):
        assert set(earlier) < set(later)


def test_refining_ends_where_no_step_is_left(model: CoLLM, items: list[Row]) -> None:
    progress: list[tuple[int, int]] = []
    unreachable = [Row(item.prompt, "w1 " * 30, None, "here") for item in items[:2]]
    found = calibrate(
        model, unreachable, CalibrationOptions(max_tokens=2, refine=50), on_completion=lambda *p: progress.append(p)
    )
    assert len(found.points) < 20  # two prompts of two tokens: the base alone is the best, and the next token is 25 %
    assert progress[-1] == (2 * len(found.points), 2 * len(found.points))


@pytest.mark.slow
def test_budgets_are_looked_for_and_kept(model: CoLLM, items: list[Row], monkeypatch: pytest.MonkeyPatch) -> None:
    # How far is read ahead depends on measured times, and last digits on that.
    monkeypatch.setattr(CoLLM, "generate", partialmethod(CoLLM.generate, lookahead=0, max_wait=0))
    plain = calibrate(model, items, options(metric="token_f1"))
    found = calibrate(model, items, options(metric="token_f1", budgets=[0.4, 0.15, 0.4]))
    assert found.budgets == [0.15, 0.4]
    assert set(plain.points) < set(found.points)
    for budget in found.budgets:
        assert found.best(budget).deferral_rate <= budget
        assert found.best(budget).metric >= plain.best(budget).metric
        near = [abs(point.deferral_rate - budget) for point in found.points]
        assert min(near) <= min(abs(point.deferral_rate - budget) for point in plain.points)
        assert f"within {budget}" in found.uses(found.best(budget))
    assert found.uses(found.best())[0] == "default"
    assert Calibration.from_dict(json.loads(json.dumps(found.to_dict()))) == found


@pytest.mark.slow
def test_what_was_promised_is_checked_on_other_prompts(model: CoLLM, items: list[Row]) -> None:
    calibrate(model, items, options(budgets=[0.3]))
    prompts = [f"w{i} w{i + 7}" for i in range(20)]
    answers = model.generate(prompts, PARAMS, threshold=-1)
    others = [Row(prompt, answer.text, None, "here") for prompt, answer in zip(prompts, answers, strict=True)]
    progress: list[tuple[int, int]] = []
    checked = check_on(model, others, options(), on_completion=lambda *p: progress.append(p))
    assert model.calibration is checked
    default, budget = checked.checks
    assert (default.budget, budget.budget, default.num_prompts) == (1.0, 0.3, 20)
    assert progress[-1] == (40, 40)
    for check in checked.checks:
        assert check.promised == checked.best(check.budget)
        assert check.held_out.threshold == check.promised.threshold
        low, high = check.rate_difference
        assert low <= check.held_out.deferral_rate - check.promised.deferral_rate <= high
    assert "exact_match holds" in default.summary("exact_match")  # the assistant alone is always right
    opening = (
        "On 20 held-out prompts, the default threshold (-1): deferral rate holds (promised 100.0%, measured 100.0%, "
    )
    assert default.summary("exact_match").startswith(opening)
    assert "a budget of 0.3" in budget.summary("exact_match")
    assert "budget kept" in budget.summary("exact_match") or budget.held_out.rate_high > 0.3
    assert Calibration.from_dict(json.loads(json.dumps(checked.to_dict()))) == checked


@pytest.mark.slow
def test_a_promise_that_does_not_hold_is_called_that(model: CoLLM, items: list[Row]) -> None:
    calibrate(model, items, options())
    never = [Row(item.prompt, "w1 " * 30, None, "here") for item in items]
    [check] = check_on(model, never, options()).checks
    assert "deferral rate holds" in check.summary("exact_match")
    assert "exact_match does NOT hold (promised 100.0%, measured 0.0%, " in check.summary("exact_match")


def test_what_cannot_be_checked_is_refused(model: CoLLM, items: list[Row]) -> None:
    with pytest.raises(ConfigError, match="not calibrated"):
        check_on(model, items)
    calibrate(model, items, options(rates=[0], refine=0))
    with pytest.raises(DataError, match="no prompts to check"):
        check_on(model, [])
