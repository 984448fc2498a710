"""Every threshold at once, against counting token by token."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from collm import CoLLM, DeferralHead
from collm.core.head import defer_probs
from collm.errors import ConfigError
from collm.evaluation import gold
from collm.evaluation.gold import TeacherForcedPoint, confusion, deferred, gold_views, greedy_writes, teacher_forced
from collm.tools.spec import ToolSpec
from collm.training.examples import Example, Examples
from collm.training.inspection import TokenViews
from collm.training.scores import Scores
from collm.training.scoring import read_scores


def counted(views: TokenViews, threshold: float) -> TeacherForcedPoint:
    """One threshold, token by token."""
    writes, correct, logprob = deferred(views)
    by_assistant = right = 0
    nll = 0.0
    probs = defer_probs(views.defer_logits).tolist()
    for token, prob in enumerate(probs):
        if prob > threshold:
            by_assistant += bool(writes[token])
            right += bool(correct[token])
            nll -= logprob[token].item()
        else:
            right += bool(views.base_correct[token])
            nll -= views.base_logprob[token].item()
    return TeacherForcedPoint(threshold, by_assistant / len(probs), right / len(probs), nll / len(probs))


def youden(views: TokenViews, threshold: float) -> float:
    """Sensitivity + specificity - 1 of deferring, for the tokens that an assistant predicts and the base does not."""
    wanted = views.assistant_correct.any(-1) & ~views.base_correct
    defers = [prob > threshold for prob in defer_probs(views.defer_logits).tolist()]
    pairs = list(zip(defers, wanted.tolist(), strict=True))
    sensitivity = pairs.count((True, True)) / int(wanted.sum())
    return sensitivity + pairs.count((False, False)) / int((~wanted).sum()) - 1


def drawn(num_tokens: int, num_assistants: int, *, distinct: int) -> TokenViews:
    """Views whose defer logits take few values, so that many tie."""
    draw = torch.Generator().manual_seed(num_tokens)
    values = torch.randn(distinct, generator=draw)
    shape = (num_tokens, num_assistants)
    return TokenViews(
        -torch.rand(num_tokens, generator=draw) * 5,
        torch.rand(num_tokens, generator=draw) < 0.5,
        -torch.rand(shape, generator=draw) * 5,
        torch.rand(shape, generator=draw) < 0.6,
        values[torch.randint(distinct, shape, generator=draw)],
        torch.rand(shape, generator=draw) < 0.2,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("num_assistants", "distinct"), [(1, 7), (2, 4), (1, 1), (3, 200)])
def test_each_point_is_what_counting_gives(num_assistants: int, distinct: int) -> None:
    views = drawn(300, num_assistants, distinct=distinct)
    curve = teacher_forced(views)
    assert len(curve) == len(defer_probs(views.defer_logits).unique()) + 1
    assert (curve[0].threshold, curve[len(curve) - 1].threshold) == (1.0, -1.0)
    assert (curve.thresholds.diff() < 0).all()
    for place in range(len(curve)):
        expected = counted(views, curve[place].threshold)
        assert curve[place].deferral_rate == pytest.approx(expected.deferral_rate, abs=1e-12)
        assert curve[place].accuracy == pytest.approx(expected.accuracy, abs=1e-12)
        assert curve[place].nll == pytest.approx(expected.nll, rel=1e-6)
        assert curve.youden[place].item() == pytest.approx(youden(views, curve[place].threshold), abs=1e-12)
    assert curve.reachable == (views.base_correct | views.assistant_correct.any(-1)).double().mean()


def test_thresholds_lie_half_way_between_defer_probs() -> None:
    """So rounding in another engine changes no author, and any threshold in between is found."""
    views = drawn(200, 1, distinct=20)
    curve, probs = teacher_forced(views), defer_probs(views.defer_logits).unique().flip(0)
    assert curve.thresholds[1:-1].tolist() == pytest.approx(((probs[1:] + probs[:-1]) / 2).tolist())
    for threshold in (probs[3].item(), probs[3].item() - 1e-9, probs[3].item() + 1e-9, 0.5, 1.0, -1.0):
        assert curve.at(threshold).accuracy == pytest.approx(counted(views, threshold).accuracy)


def test_neighbouring_numbers_leave_the_lower_one_as_threshold() -> None:
    views = drawn(2, 1, distinct=2)
    views.defer_logits[:, 0] = torch.tensor([36.0, 36.7])  # 1 minus a few units in the last place
    curve = teacher_forced(views)
    higher, lower = curve.defer_probs.tolist()
    assert lower <= curve.thresholds[1] < higher < 1


@pytest.mark.slow
def test_no_threshold_between_gives_anything_else() -> None:
    views = drawn(200, 1, distinct=20)
    curve = teacher_forced(views)
    outcomes = {counted(views, threshold / 997).accuracy for threshold in range(-997, 998)}
    assert outcomes <= {round(one, 12) for one in curve.accuracies.tolist()} | set(curve.accuracies.tolist())
    assert curve.best().accuracy >= max(outcomes)


def test_the_best_is_the_most_accurate_within_a_budget() -> None:
    views = drawn(500, 2, distinct=50)
    curve = teacher_forced(views)
    points = [curve[place] for place in range(len(curve))]
    for budget in (0.0, 0.1, 0.35, 1.0):
        allowed = [point for point in points if point.deferral_rate <= budget]
        assert curve.best(budget) == max(allowed, key=lambda point: (point.accuracy, -point.deferral_rate))
    assert curve.at_rates([0.0, 0.3, 1.0]) == [
        [point for point in points if point.deferral_rate <= rate][-1] for rate in (0.0, 0.3, 1.0)
    ]
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="from 0 to 1"):
            curve.best(bad)
        with pytest.raises(ConfigError, match="from 0 to 1"):
            curve.at_rates([bad])


def test_log_probabilities_of_minus_infinity_spoil_no_point_but_their_own() -> None:
    views = drawn(3, 1, distinct=3)
    views.defer_logits[:, 0] = torch.tensor([2.0, 1.0, 0.0])
    views.base_logprob[0] = -torch.inf
    views.assistant_logprobs[2] = -torch.inf
    views.assistant_abstained[:] = False
    nlls = teacher_forced(views).nlls
    assert nlls.isinf().tolist() == [True, False, False, True]
    assert not nlls.isnan().any()


@pytest.fixture
def model(tiny_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast) -> CoLLM:
    head = DeferralHead(32, 2)
    torch.nn.init.normal_(head.weight, std=0.5, generator=torch.Generator().manual_seed(0))
    return CoLLM(tiny_model(0), [tiny_model(1), ToolSpec.parse("tool:calculator")], head, tokenizer)


EXAMPLES = Examples(
    [
        Example([5, 6, 7, 8, 9, 10], [False, False, True, True, True, True]),
        Example([7, 3, 9], [False, True, True]),
    ]
)


def test_the_curve_of_a_collaboration_agrees_with_its_greedy_choices(model: CoLLM) -> None:
    views = gold_views(model, EXAMPLES)
    curve = teacher_forced(views)
    for place in range(len(curve)):
        writes = greedy_writes(views, curve[place].threshold)
        assert curve[place].accuracy == pytest.approx(writes.double().mean().item())


def test_a_tool_without_an_answer_leaves_its_tokens_to_the_base(model: CoLLM) -> None:
    views = gold_views(model, EXAMPLES)
    by_assistant, _, logprob = deferred(views)
    asked_tool = views.defer_logits.argmax(-1) == 1
    assert asked_tool.any()
    assert not asked_tool.all()
    assert (by_assistant == ~asked_tool).all()  # there is nothing to calculate
    assert (logprob[asked_tool] == views.base_logprob[asked_tool]).all()
    assert (logprob[~asked_tool] == views.assistant_logprobs[~asked_tool, 0]).all()
    curve = teacher_forced(views)
    assert curve[len(curve) - 1].deferral_rate == pytest.approx((~asked_tool).double().mean().item())


def test_with_scores_of_the_assistants_no_other_model_than_the_base_is_read(
    model: CoLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = gold_views(model, EXAMPLES)
    scores = []
    for member in model.members[1:]:
        found = read_scores(member, EXAMPLES)
        scores.append(Scores(found["logprob"], found["correct"], torch.tensor([0, 4, 6]), ""))

    read: list[str] = []
    monkeypatch.setattr(gold, "read_scores", lambda one, *a, **b: read.append(one.name) or read_scores(one, *a, **b))
    gold_views(model, EXAMPLES)
    assert read == ["assistant", "base"]
    read.clear()
    apart = gold_views(model, EXAMPLES, scores)
    for name in ("base_logprob", "base_correct", "assistant_logprobs", "assistant_correct", "defer_logits"):
        assert torch.equal(getattr(apart, name), getattr(whole, name))
    assert read == ["base"]


def test_confusion_counts_who_writes_where_who_should() -> None:
    views = TokenViews(
        base_logprob=torch.zeros(5),
        base_correct=torch.tensor([True, False, False, False, False]),
        assistant_logprobs=torch.tensor([[-1.0, -1], [-1, -2], [-2, -1], [-2, -1], [-1, -1]]),
        assistant_correct=torch.tensor([[True, True], [True, True], [True, True], [False, True], [False, False]]),
        defer_logits=torch.tensor([[3.0, 0], [3, 0], [3, 0], [0, 3], [-9, -9]]),
        assistant_abstained=torch.tensor([[False, False]] * 3 + [[False, True], [False, False]]),
    )
    assert confusion(views, 0.5).tolist() == [[1, 1, 0], [0, 1, 0], [1, 1, 0]]
    assert confusion(views, 1.0).tolist() == [[2, 0, 0], [1, 0, 0], [2, 0, 0]]
