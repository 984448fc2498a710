"""The chunked marginal likelihood equals the plain one, in value and in every gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import collm.training.module
from collm.core.objective import marginal_logprobs
from collm.errors import UnsupportedModel
from collm.models.language_model import LanguageModel
from collm.training.module import marginal_nll_sum
from tests.architectures import EXACT
from tests.tiny_models import make_model
from tests.training.conftest import Tiny

Gradients = tuple[Tensor, ...]


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
