"""The objective against brute force in Python floats, its limits, its gradient; pseudo-labels by truth table."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from collm.core.head import author_logprobs, defer_probs
from collm.core.objective import label_nll, marginal_logprobs, pseudo_labels, token_nll
from collm.errors import ConfigError

logprobs = st.floats(-20, 0)
logits = st.floats(-15, 15)


@given(base=logprobs, pairs=st.lists(st.tuples(logprobs, logits), min_size=1, max_size=4))
def test_the_marginal_is_the_mixture_written_out(base: float, pairs: list[tuple[float, float]]) -> None:
    assistants, u = zip(*pairs, strict=True)
    weights = [1.0, *map(math.exp, u)]
    likelihood = sum(w / sum(weights) * math.exp(lp) for w, lp in zip(weights, [base, *assistants], strict=True))
    result = marginal_logprobs(torch.tensor(base), torch.tensor(assistants), torch.tensor(u))
    assert result.item() == pytest.approx(math.log(likelihood), rel=1e-5, abs=1e-5)


def test_separate_is_the_marginal_and_the_base_alone() -> None:
    base, assistants, u = (one.requires_grad_() for one in random_inputs(5, 2))
    nll = token_nll(base, assistants, u, "separate")
    assert torch.allclose(nll, -base - marginal_logprobs(base, assistants, u))
    of_base, of_head = torch.autograd.grad(nll.sum(), (base, u))
    assert torch.equal(of_base, -torch.ones_like(base))
    assert torch.allclose(of_head, torch.autograd.grad(-marginal_logprobs(base, assistants, u).sum(), u)[0])


def test_weak_supervision_is_the_formula_by_hand() -> None:
    """2/3 of the language model's loss and 1/3 of the labels' cross-entropy, with weight 5 for assistants."""
    base, u = torch.tensor([-1.0, -3.0], requires_grad=True), torch.tensor([[0.5], [-0.2]], requires_grad=True)
    labels = torch.tensor([1, 0])
    loss = token_nll(base, torch.zeros(2, 1), u, "weak").sum() + label_nll(u, labels, 5.0).sum() / 3
    p, q = 1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(0.2))
    assert loss.item() == pytest.approx(2 / 3 * 4 - (5 * math.log(p) + math.log(1 - q)) / 3, rel=1e-6)
    of_base, of_head = torch.autograd.grad(loss, (base, u))
    assert of_base.tolist() == pytest.approx([-2 / 3, -2 / 3])
    assert of_head.flatten().tolist() == pytest.approx([-5 * (1 - p) / 3, q / 3])


def test_labels_of_several_assistants_have_the_cross_entropy_over_authors() -> None:
    u, labels = random_inputs(6, 2)[2][0], torch.tensor([0, 1, 2, 0, 2, 1, 0])
    expected = [-(5 if y else 1) * author_logprobs(u)[i, y].item() for i, y in enumerate(labels.tolist())]
    assert label_nll(u, labels, 5.0).tolist() == pytest.approx(expected)


def random_inputs(seed: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    base, assistants = (-5 * torch.rand(3, 7, *shape, generator=g) for shape in ((), (k,)))
    return base, assistants, torch.randn(3, 7, k, generator=g)


@pytest.mark.parametrize("k", [1, 3])
def test_limits_are_each_model_alone(k: int) -> None:
    base, assistants, u = random_inputs(0, k)
    assert torch.allclose(marginal_logprobs(base, assistants, torch.full_like(u, -1e4)), base)
    for chosen in range(k):
        u = torch.full_like(u, -1e4)
        u[..., chosen] = 1e4
        assert torch.allclose(marginal_logprobs(base, assistants, u), assistants[..., chosen])


def test_one_assistant_is_the_sigmoid_form() -> None:
    base, assistants, u = random_inputs(1, 1)
    d = torch.sigmoid(u[..., 0])
    mixture = (1 - d) * base.exp() + d * assistants[..., 0].exp()
    assert torch.allclose(marginal_logprobs(base, assistants, u), mixture.log(), atol=1e-6)
    assert torch.allclose(defer_probs(u), d.double())
    assert torch.allclose(author_logprobs(u).exp().sum(-1), torch.ones(3, 7))


@pytest.mark.parametrize("k", [1, 3])
def test_the_defer_prob_is_what_the_base_does_not_have(k: int) -> None:
    u = random_inputs(2, k)[2]
    assert torch.allclose(defer_probs(u), 1 - author_logprobs(u)[..., 0].exp().double(), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_that_nearly_always_defers_still_ranks_tokens(dtype: torch.dtype) -> None:
    probs = defer_probs(torch.tensor([[17.0], [20.0], [25.0], [30.0], [36.0]], dtype=dtype))
    assert len(probs.unique()) == 5
    assert probs.tolist() == sorted(probs.tolist())
    assert probs[-1] < 1


def test_all_authors_equal_makes_the_choice_irrelevant() -> None:
    base, _, u = random_inputs(3, 2)
    same = base.unsqueeze(-1).expand(3, 7, 2)
    assert torch.allclose(marginal_logprobs(base, same, u), base, atol=1e-6)


@pytest.mark.parametrize("variant", ["a", "b"])
def test_pseudo_labels_truth_table(variant: str) -> None:
    for base_right, first_right, second_right in itertools.product([False, True], repeat=3):
        for first_logprob, second_logprob in [(-1.0, -2.0), (-2.0, -1.0)]:
            came = pseudo_labels(
                torch.tensor([[base_right]]),
                torch.tensor([[[first_right, second_right]]]),
                torch.tensor([[[first_logprob, second_logprob]]]),
                variant,  # type: ignore[arg-type]
            ).item()
            likelier = 1 if first_logprob > second_logprob else 2
            if base_right:
                expected = 0
            elif variant == "b":
                expected = likelier
            else:
                expected = {(0, 0): 0, (1, 0): 1, (0, 1): 2, (1, 1): likelier}[(first_right, second_right)]
            assert came == expected, (variant, base_right, first_right, second_right, first_logprob)


def test_an_unknown_variant_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected 'a' or 'b'"):
        pseudo_labels(torch.ones(1, 1), torch.ones(1, 1, 1), torch.zeros(1, 1, 1), "c")  # type: ignore[arg-type]
