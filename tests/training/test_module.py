"""The joint module's loss: equal to the objective written out, blind to what is masked, chunked or padded."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import collm.training.module
from collm.core.head import DeferralHead
from collm.core.objective import deferral_cost, marginal_logprobs
from collm.errors import MismatchError
from collm.training.examples import collate
from collm.training.measures import TokenViews
from collm.training.module import JointModule
from collm.training.scores import TrainingSet
from tests.training.conftest import Tiny, make_scores, random_examples

EXAMPLES = random_examples(6)


def surprise(slope: float) -> Callable[[Tensor], Tensor]:
    return lambda gold: -slope * gold.float() / 20 - 0.01


DATA = TrainingSet(EXAMPLES, [make_scores(EXAMPLES, surprise(1.0)), make_scores(EXAMPLES, surprise(0.3))])


def make_head(seed: int = 0) -> DeferralHead:
    head = DeferralHead(32, 2)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.weight.normal_(0, 0.1, generator=generator)
        head.bias.normal_(generator=generator)
    return head


def test_the_loss_is_the_marginal_likelihood_written_out(tiny_model: Tiny) -> None:
    base, head = tiny_model(1), make_head()
    batch = collate([DATA[i] for i in range(len(DATA))])
    out = JointModule(base, head)(**batch, per_token=True)
    costs = [0.7, 0.2]
    costly = JointModule(base, head, deferral_costs=costs)
    views = TokenViews(
        out["base_logprob"][batch["target_mask"]],
        out["base_correct"][batch["target_mask"]],
        batch["assistant_logprobs"][batch["target_mask"]],
        batch["assistant_correct"][batch["target_mask"]],
        out["defer_logits"][batch["target_mask"]].detach(),
    )
    total, base_total, defer_total, cost, count = 0.0, 0.0, 0.0, 0.0, 0
    for index, example in enumerate(EXAMPLES):
        with torch.no_grad():
            ids = torch.tensor([example.token_ids])
            logprobs = base(ids).logits[0].log_softmax(-1)
            hidden = base.model(ids).last_hidden_state[0]
        place = 0
        for t in range(len(example.token_ids) - 1):
            if not example.is_target[t + 1]:
                continue
            gold = example.token_ids[t + 1]
            u = [sum(w * h for w, h in zip(row, hidden[t].tolist(), strict=True)) for row in head.weight.tolist()]
            odds = [1.0, *(math.exp(value + b) for value, b in zip(u, head.bias.tolist(), strict=True))]
            says = [logprobs[t, gold].item(), *(one.logprob(index)[place].item() for one in DATA.assistant_scores)]
            total -= math.log(sum(o / sum(odds) * math.exp(s) for o, s in zip(odds, says, strict=True)))
            base_total -= says[0]
            defer_total += 1 - odds[0] / sum(odds)
            cost += (0.7 * odds[1] + 0.2 * odds[2]) / sum(odds)
            place, count = place + 1, count + 1
    assert len(views.base_logprob) == count
    assert out["loss"].item() == pytest.approx(total / count, rel=1e-4)
    measured = views.measures()
    assert measured["loss"] == pytest.approx(total / count, rel=1e-4)
    assert measured["base_nll"] == pytest.approx(base_total / count, rel=1e-4)
    assert measured["defer_prob"] == pytest.approx(defer_total / count, rel=1e-4)
    assert not out["base_logprob"][~batch["target_mask"]].any()
    with_cost = (total + cost) / count
    assert costly(**batch)["loss"].item() == pytest.approx(with_cost, rel=1e-4)
    assert costly(**batch, per_token=True)["loss"].item() == pytest.approx(with_cost, rel=1e-4)
    assert views.measures(costs)["loss"] == pytest.approx(with_cost, rel=1e-4)


def test_batching_and_chunks_change_nothing(tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    module = JointModule(tiny_model(1), make_head(), deferral_costs=[0.4, 0.1])
    total = sum(example.num_targets for example in EXAMPLES)

    def gradients(batches: list[list[int]]) -> list[Tensor]:
        module.zero_grad()
        for batch in batches:
            module(**collate([DATA[i] for i in batch]), num_items_in_batch=total)["loss"].backward()
        return [parameter.grad.clone() for parameter in module.parameters() if parameter.grad is not None]

    together = gradients([list(range(6))])
    assert len(together) == len(list(module.parameters()))
    one_by_one = gradients([[i] for i in range(6)])
    monkeypatch.setattr(collm.training.module, "MIN_ROWS", 3)
    for other in (one_by_one, gradients([list(range(6))])):
        for mine, theirs in zip(together, other, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_masked_positions_give_no_gradient_whatever_they_hold(tiny_model: Tiny) -> None:
    module = JointModule(tiny_model(1), make_head())
    batch = collate([DATA[i] for i in range(6)])
    poisoned = {name: tensor.clone() for name, tensor in batch.items()}
    off = ~batch["target_mask"]
    poisoned["gold"][off] = 5
    poisoned["assistant_logprobs"][off] = torch.nan
    results = []
    for inputs in (batch, poisoned):
        module.zero_grad()
        loss = module(**inputs)["loss"]
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in module.parameters() if p.grad is not None)])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*results, strict=True))


def test_a_frozen_base_takes_no_gradient_and_stays_in_evaluation_mode(
    tiny_model: Tiny,
) -> None:
    base = tiny_model(1, attention_dropout=0.5)
    module = JointModule(base, make_head(), frozen=True).train()
    assert module.training
    assert not base.training
    module(**collate([DATA[0]]))["loss"].backward()
    assert all(parameter.grad is None for parameter in base.parameters())
    assert module.head.weight.grad is not None
    assert module.head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("cost", [0.0, 0.5, 1.0, 3.0])
def test_the_best_defer_prob_rises_with_the_gain_and_falls_with_the_cost(cost: float) -> None:
    """Compared with every defer prob of a grid."""
    gains = torch.tensor([-1.0, 0.1, 0.3, 0.5, 1.0, 2.0, 4.0])
    grid = torch.linspace(0.005, 0.995, 199)
    u = grid.logit().unsqueeze(-1)  # (199, 1)
    best = []
    for gain in gains:
        nll = -marginal_logprobs((-gain).expand(199), torch.zeros(199, 1), u)
        best.append(grid[(nll + torch.stack([deferral_cost(each, [cost]) for each in u])).argmin()])
    formula = torch.where(gains > 0, (1 / cost if cost else torch.inf) - 1 / gains.expm1(), 0.0).clamp(0, 1)
    torch.testing.assert_close(torch.stack(best), formula, atol=6e-3, rtol=0)


def test_a_head_of_another_width_is_refused(tiny_model: Tiny) -> None:
    with pytest.raises(MismatchError, match="hidden states of size 31, the base has 32"):
        JointModule(tiny_model(1), DeferralHead(31, 1))
