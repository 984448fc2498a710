"""The warm start recovers a planted rule, for one assistant and for two, and touches nothing but the head."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from collm.core.head import DeferralHead, author_logprobs
from collm.errors import DataError
from collm.models.language_model import LanguageModel
from collm.training.examples import Examples, shift
from collm.training.fitting import fit_linear
from collm.training.inspection import LabelReport, auc, label_tokens
from collm.training.warm_start import warm_start, weighted_nll
from tests.training.conftest import Make, Tiny, make_scores, random_examples

Fit = Callable[..., dict[str, float]]
EXAMPLES = random_examples(200, seed=3)


def hidden_states(module: PreTrainedModel, examples: Examples) -> Tensor:
    """One example at a time: hidden states at the target positions, shape (M, H)."""
    parts = []
    for example in examples:
        shifted = shift(example)
        with torch.no_grad():
            parts.append(module.model(shifted["input_ids"][None]).last_hidden_state[0, shifted["target_mask"]])
    return torch.cat(parts)


def planted(hidden: Tensor, num_assistants: int) -> Tensor:
    """Labels by a random linear rule that gives every author a share."""
    weight = torch.randn(num_assistants, hidden.shape[1], generator=torch.Generator().manual_seed(4))
    logits = F.linear(hidden - hidden.mean(0), weight)
    return author_logprobs(logits - 0.5 * logits.std()).argmax(-1)


@pytest.fixture
def fit(config: Make) -> Callable[..., dict[str, float]]:
    """Fits a head to labels of these examples: fit(module, head, labels, **options)."""

    def run(
        module: PreTrainedModel,
        head: DeferralHead,
        labels: Tensor,
        examples: Examples = EXAMPLES,
        num_assistants: int | None = None,
        **options: Any,
    ) -> dict[str, float]:
        _, *counts = labels.bincount(minlength=1 + (num_assistants or head.num_assistants)).tolist()
        report = LabelReport(len(labels), tuple(count / len(labels) for count in counts), better=0.5)
        base = LanguageModel(module, name="base")
        return warm_start(base, head, examples, (labels, report), config(**{"warm_start": True, "seed": 0, **options}))

    return run


@pytest.mark.slow
@pytest.mark.parametrize("num_assistants", [1, 2, 3])
def test_a_planted_linear_rule_is_recovered(tiny_model: Tiny, fit: Fit, num_assistants: int) -> None:
    module = tiny_model(1)
    hidden = hidden_states(module, EXAMPLES)
    values = planted(hidden, num_assistants)
    assert values.unique().numel() == num_assistants + 1
    head = DeferralHead(32, num_assistants)
    report = fit(module, head, values, positive_weight=1.0)
    assert (author_logprobs(head(hidden)).argmax(-1) == values).float().mean() > 0.99
    assert report["accuracy"] > 0.93
    assert report["auc"] > 0.98
    assert report["num_tokens"] == len(values)
    assert report["share"] == pytest.approx((values != 0).float().mean().item())


@pytest.mark.slow
def test_two_assistants_get_the_tokens_they_own(tiny_model: Tiny, fit: Fit) -> None:
    """Assistant 1 knows what follows tokens 3..6, assistant 2 what follows 7..10; the base knows the rest."""
    module = tiny_model(1, num_hidden_layers=1)
    with torch.no_grad():
        module.model.embed_tokens.weight.mul_(20)  # hidden states that tell their own token
    examples = random_examples(300, vocab_size=15, seed=8)
    before = torch.cat([shift(one)["input_ids"][shift(one)["target_mask"]] for one in examples])
    owner = torch.where(before < 7, 1, torch.where(before < 11, 2, 0))

    def knows(author: int) -> Callable[[Tensor], Tensor]:
        pieces = iter(owner.split([one.num_targets for one in examples]))
        return lambda gold: torch.where(next(pieces) == author, -0.1, -4.0)

    scores = [make_scores(examples, knows(author), knows(author)) for author in range(3)]
    for one, author in zip(scores, range(3), strict=True):
        one.corrects.copy_(owner == author)
    labels, _ = label_tokens(scores[0], scores[1:])
    assert torch.equal(labels, owner)
    head = DeferralHead(32, 2)
    report = fit(module, head, labels, examples)
    found = author_logprobs(head(hidden_states(module, examples))).argmax(-1)
    for author in range(3):
        assert (found[owner == author] == author).float().mean() > 0.95
    assert report["accuracy"] > 0.95


@pytest.mark.slow
def test_the_same_seed_gives_the_same_head_and_the_base_is_only_read(tiny_model: Tiny, fit: Fit) -> None:
    module = tiny_model(1).train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    values = planted(hidden_states(module, EXAMPLES), 1)
    heads = [DeferralHead(32, 1) for _ in range(3)]
    for head, seed in zip(heads, (0, 0, 1), strict=True):
        assert fit(module, head, values, seed=seed, warm_start_tokens=300)["num_tokens"] == 300
    assert torch.equal(heads[0].weight, heads[1].weight)
    assert not torch.equal(heads[0].weight, heads[2].weight)
    assert module.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_what_does_not_fit_is_refused(tiny_model: Tiny, fit: Fit) -> None:
    module = tiny_model(1)
    ones = torch.ones(sum(example.num_targets for example in EXAMPLES), dtype=torch.int64)
    with pytest.raises(DataError, match=r"no positive .*deferring has no benefit"):
        fit(module, DeferralHead(32, 1), 0 * ones)


def test_one_example_with_all_labels_alike_can_be_fitted(tiny_model: Tiny, fit: Fit) -> None:
    examples = random_examples(1)
    head = DeferralHead(32, 1)
    report = fit(tiny_model(1), head, torch.ones(examples[0].num_targets, dtype=torch.int64), examples)
    assert report["accuracy"] == 1
    assert math.isnan(report["auc"])
    assert torch.isfinite(head.weight).all()
    assert torch.isfinite(head.bias).all()


@pytest.mark.slow
def test_a_feature_that_never_varies_gets_no_weight(tiny_model: Tiny, fit: Fit) -> None:
    module = tiny_model(1)
    with torch.no_grad():
        module.model.norm.weight[5] = 0
    head = DeferralHead(32, 1)
    fit(module, head, planted(hidden_states(module, EXAMPLES), 1))
    assert head.weight[0, 5] == 0
    assert torch.isfinite(head.weight).all()


def test_the_weighted_loss_is_that_of_repeated_positives() -> None:
    logits, labels = torch.randn(20, 2), torch.randint(0, 3, (20,))
    repeats = torch.where(labels != 0, 4, 1)
    repeated = weighted_nll(logits.repeat_interleave(repeats, 0), labels.repeat_interleave(repeats), 1.0)
    torch.testing.assert_close(weighted_nll(logits, labels, 4.0), repeated)


def test_the_fit_is_a_minimum() -> None:
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(200, 5, generator=generator), torch.randint(0, 3, (200,), generator=generator)
    head = DeferralHead(5, 2)
    fit_linear(head, features, lambda u, rows: weighted_nll(u, labels[rows], 3.0), slice(None), penalty=0.01)
    loss = weighted_nll(head(features), labels, 3.0) + 0.005 * head.weight.square().sum()
    for gradient in torch.autograd.grad(loss, (head.weight, head.bias)):
        assert gradient.abs().max() < 1e-4


def test_auc_counts_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 6, (40,), generator=generator).float()
    positive = torch.rand(40, generator=generator) < 0.4
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[positive].tolist() for n in scores[~positive].tolist()]
    assert auc(scores, positive) == pytest.approx(sum(pairs) / len(pairs))
    assert math.isnan(auc(scores, torch.zeros(40, dtype=torch.bool)))
