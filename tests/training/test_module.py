"""The joint module's loss: equal to the objective written out, in value and gradient, masked, chunked or padded."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import collm.training.module
from collm.core.head import DeferralHead, doubt_of
from collm.core.objective import Objective, deferral_cost, marginal_logprobs, token_nll
from collm.errors import MismatchError, UnsupportedModel
from collm.models.language_model import LanguageModel
from collm.training.examples import collate
from collm.training.inspection import TokenViews
from collm.training.module import JointModule, marginal_nll_sum
from collm.training.scores import TrainingSet
from tests.architectures import EXACT
from tests.tiny_models import make_model
from tests.training.conftest import Tiny, make_scores, random_examples

Gradients = tuple[Tensor, ...]
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


@pytest.mark.parametrize("objective", ["marginal", "separate"])
def test_a_head_reads_the_doubt_of_a_tuned_base_without_a_gradient_through_it(
    objective: Objective, tiny_model: Tiny
) -> None:
    base, head = tiny_model(1), DeferralHead(32, 2, width=5, doubt=True)
    torch.nn.init.normal_(head.output_weight)
    batch = collate([DATA[i] for i in range(len(DATA))])
    mask = batch["target_mask"]
    hidden = base.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state[mask]
    logits = base.lm_head(hidden)
    logprob = -F.cross_entropy(logits, batch["gold"][mask], reduction="none")
    u = head(hidden, doubt_of(logits))
    parameters = [*base.parameters(), *head.parameters()]
    loss = token_nll(logprob, batch["assistant_logprobs"][mask], u, objective).mean()
    expected = torch.autograd.grad(loss, parameters)
    module = JointModule(base, head, objective=objective)
    found = module(**batch)["loss"]
    assert found.item() == pytest.approx(loss.item(), rel=1e-5)
    for mine, theirs in zip(torch.autograd.grad(found, parameters), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)
    assert module(**batch, per_token=True)["loss"].item() == pytest.approx(loss.item(), rel=1e-5)


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


def plain(
    model: LanguageModel, hidden: Tensor, gold: Tensor, assistant_logprobs: Tensor, defer_logits: Tensor
) -> Tensor:
    """The definition, with all logits at once."""
    base_logprob = model.logits(hidden).float().log_softmax(-1).gather(-1, gold.unsqueeze(-1)).squeeze(-1)
    return -marginal_logprobs(base_logprob, assistant_logprobs, defer_logits).sum()


def inputs(model: LanguageModel, count: int, assistants: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    hidden = torch.randn(count, model.hidden_size, generator=generator).to(model.output_weight.dtype)
    gold = torch.randint(0, model.vocab_size, (count,), generator=generator)
    assistant_logprobs = -5 * torch.rand(count, assistants, generator=generator)
    return hidden, gold, assistant_logprobs, torch.randn(count, assistants, generator=generator)


def gradients(loss: Callable[..., Tensor], model: LanguageModel, count: int = 23, assistants: int = 2) -> Gradients:
    """Value, and gradients by hidden states, defer logits and output layer, of a scaled loss."""
    hidden, gold, assistant_logprobs, defer_logits = inputs(model, count, assistants)
    hidden.requires_grad_()
    defer_logits.requires_grad_()
    model.module.zero_grad()
    value = loss(model, hidden, gold, assistant_logprobs, defer_logits)
    (value * 0.37).backward()
    grads = [hidden.grad, defer_logits.grad, model.output_weight.grad]
    if model.output_bias is not None:
        grads.append(model.output_bias.grad)
    return value.detach(), *(grad.clone() for grad in grads if grad is not None)


def assert_same(model: LanguageModel, assistants: int = 2, **tolerance: float) -> None:
    expected = gradients(plain, model, assistants=assistants)
    result = gradients(marginal_nll_sum, model, assistants=assistants)
    assert len(result) == len(expected) >= 3
    for mine, theirs in zip(result, expected, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, **(tolerance or {"rtol": 1e-5, "atol": 1e-6}))


@pytest.fixture(params=[1, 5, 64], ids=lambda rows: f"{rows}-rows")
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of one position, of some with a remainder, and all in one."""
    monkeypatch.setattr(collm.training.module, "MIN_ROWS", request.param)


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("architecture", EXACT)
def test_equals_the_plain_form_on_every_architecture(architecture: str) -> None:
    """Softcaps, scales, biases and tied embeddings among them."""
    assert_same(LanguageModel(make_model(EXACT[architecture](), 0), name="base"))


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("assistants", [1, 3])
def test_equals_the_plain_form_where_the_vocabulary_is_padded(tiny_model: Tiny, assistants: int) -> None:
    assert_same(LanguageModel(tiny_model(3), name="base", vocab_size=50), assistants)


@pytest.mark.usefixtures("rows")
def test_a_biased_capped_and_scaled_layer(tiny_model: Tiny) -> None:
    module = tiny_model(3)
    module.lm_head = nn.Linear(32, 97)
    module.config.final_logit_softcapping = 0.8
    module.config.logit_scale = 0.3
    model = LanguageModel(module, name="base", vocab_size=60)
    assert model.output_bias is not None
    assert_same(model)


@pytest.mark.usefixtures("rows")
def test_bf16_weights_sum_their_gradient_in_fp32(tiny_model: Tiny) -> None:
    assert_same(LanguageModel(tiny_model(3).to(torch.bfloat16), name="base"), rtol=2e-2, atol=1e-2)


@pytest.mark.usefixtures("rows")
def test_autocast_computes_products_in_bf16_and_the_likelihood_in_fp32(
    tiny_model: Tiny,
) -> None:
    model = LanguageModel(tiny_model(3), name="base")
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(model, rtol=2e-2, atol=1e-2)
        in_bf16 = gradients(marginal_nll_sum, model)
    assert all(tensor.dtype == torch.float32 for tensor in in_bf16)
    assert not torch.equal(in_bf16[0], gradients(marginal_nll_sum, model)[0])


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_separate_gives_the_base_the_gradient_of_cross_entropy(architecture: str) -> None:
    """And the head that of the marginal likelihood, whose value is part of the loss."""
    model = LanguageModel(make_model(EXACT[architecture](), 0), name="base")

    def cross_entropy(model: LanguageModel, hidden: Tensor, gold: Tensor, _: Tensor, defer_logits: Tensor) -> Tensor:
        return F.cross_entropy(model.logits(hidden).float(), gold, reduction="sum") + 0 * defer_logits.sum()

    value, of_hidden, of_defer, *of_layer = gradients(partial(marginal_nll_sum, objective="separate"), model)
    alone, own_hidden, _, *own_layer = gradients(cross_entropy, model)
    marginal, _, own_defer, *_ = gradients(plain, model)
    near = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(value, alone + marginal, **near)
    torch.testing.assert_close(of_defer, own_defer, **near)
    torch.testing.assert_close([of_hidden, *of_layer], [own_hidden, *own_layer], **near)


def test_evaluation_measures_the_objective_that_is_trained(tiny_model: Tiny) -> None:
    module = JointModule(tiny_model(1), make_head(), deferral_costs=[0.7, 0.2], objective="separate")
    batch = collate([DATA[i] for i in range(6)])
    trained = module(**batch)["loss"].item()
    out = module(**batch, per_token=True)
    mask = batch["target_mask"]
    views = {name: out[name][mask].detach() for name in ("base_logprob", "base_correct", "defer_logits")}
    views |= {name: batch[name][mask] for name in ("assistant_logprobs", "assistant_correct")}
    assert out["loss"].item() == pytest.approx(trained, rel=1e-5)
    measured = TokenViews(**views).measures([0.7, 0.2], "separate")
    assert measured["loss"] == pytest.approx(trained, rel=1e-5)
    joint = JointModule(module.base, module.head, deferral_costs=[0.7, 0.2])(**batch)["loss"].item()
    assert trained == pytest.approx(joint + measured["base_nll"], rel=1e-5)


def test_a_frozen_output_layer_costs_no_gradient(tiny_model: Tiny) -> None:
    module = tiny_model(3)
    module.lm_head.requires_grad_(False)
    model = LanguageModel(module, name="base")
    expected, result = gradients(plain, model), gradients(marginal_nll_sum, model)
    assert len(result) == 3  # value, hidden states, defer logits
    for mine, theirs in zip(result, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_no_target_at_all_gives_zero(tiny_model: Tiny) -> None:
    """A process may draw a batch without one."""
    value, *grads = gradients(marginal_nll_sum, LanguageModel(tiny_model(3), name="base"), count=0)
    assert value == 0
    assert not any(grad.any() for grad in grads)


def test_chunks_grow_with_the_hidden_states(tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their logits take no more memory than the hidden states do, but never fewer than the least rows."""
    model = LanguageModel(tiny_model(3), name="base")  # 32 wide, 97 tokens
    seen: list[int] = []
    shape_logits = LanguageModel.shape_logits
    monkeypatch.setattr(
        LanguageModel, "shape_logits", lambda self, raw: seen.append(len(raw)) or shape_logits(self, raw)
    )
    for count, least in ((970, 64), (97, 64)):
        gradients(marginal_nll_sum, model, count=count)
        assert seen[0] == max(least, count * 32 // 97)
        assert sum(seen) == count
        seen.clear()


def test_a_second_backward_pass_is_refused(tiny_model: Tiny) -> None:
    model = LanguageModel(tiny_model(3), name="base")
    hidden, *rest = inputs(model, 5, 1)
    loss = marginal_nll_sum(model, hidden.requires_grad_(), *rest)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already computed"):
        loss.backward()


def test_a_quantized_output_layer_is_refused(tiny_model: Tiny) -> None:
    module = tiny_model(3)
    module.lm_head.weight = nn.Parameter(torch.zeros(97, 32, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UnsupportedModel, match=r"uint8; leave it unquantized for training"):
        marginal_nll_sum(LanguageModel(module, name="base"), *inputs(LanguageModel(tiny_model(3), name="b"), 5, 1))
