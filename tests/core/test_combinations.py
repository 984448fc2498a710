"""Distributions made of several authors': formulas, the ends of their ranges, credit, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from collm.core.combinations import (
    CombiningPolicy,
    ContrastivePolicy,
    MixturePolicy,
    ProductPolicy,
    ProxyTuningPolicy,
)
from collm.errors import ConfigError

N, V = 3, 11
EACH_K = pytest.mark.parametrize("num_assistants", [1, 2])


def some_logprobs(num_assistants: int) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(num_assistants)
    return {
        author: torch.log_softmax(2 * torch.randn(N, V, generator=generator), -1)
        for author in range(num_assistants + 1)
    }


def some_author_logprobs(num_assistants: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + num_assistants)
    return torch.log_softmax(torch.randn(N, num_assistants + 1, generator=generator), -1)


def normalised(policy: CombiningPolicy, logprobs: dict[int, Tensor]) -> Tensor:
    return torch.log_softmax(policy.combine(logprobs, some_author_logprobs(len(logprobs) - 1)), -1)


@EACH_K
def test_the_mixture_is_the_sum_of_the_authors_weighted_by_the_head(num_assistants: int) -> None:
    logprobs, by_author = some_logprobs(num_assistants), some_author_logprobs(num_assistants)
    mixed = MixturePolicy().combine(logprobs, by_author).exp()
    for row in range(N):
        for token in range(V):
            terms = [by_author[row, z].exp() * logprobs[z][row, token].exp() for z in logprobs]
            assert float(mixed[row, token]) == pytest.approx(float(sum(terms)), abs=1e-6)
    assert torch.allclose(mixed.sum(-1), torch.ones(N))


@EACH_K
def test_a_gated_mixture_is_the_base_where_the_head_does_not_defer(num_assistants: int) -> None:
    logprobs, by_author = some_logprobs(num_assistants), some_author_logprobs(num_assistants)
    deferring = (1 - by_author[:, 0].exp()).sort().values
    gated = MixturePolicy(threshold=float(deferring[0] + deferring[1]) / 2)
    expected = MixturePolicy().combine(logprobs, by_author)
    lowest = int(by_author[:, 0].argmax())
    expected[lowest] = logprobs[0][lowest]
    assert torch.equal(gated.combine(logprobs, by_author), expected)
    never_base = {author: torch.full((N,), float(author)) for author in logprobs}
    credited = gated.credit(never_base, torch.where(by_author < 0, by_author, by_author))
    assert credited[lowest] == 0
    assert (credited == MixturePolicy().credit(never_base, by_author)).sum() == N - 1


@EACH_K
def test_a_head_that_is_certain_of_one_author_mixes_nothing_in(num_assistants: int) -> None:
    logprobs = some_logprobs(num_assistants)
    for certain in logprobs:
        by_author = torch.full((N, num_assistants + 1), -torch.inf)
        by_author[:, certain] = 0.0
        assert torch.allclose(MixturePolicy().combine(logprobs, by_author), logprobs[certain], atol=1e-6)


@EACH_K
def test_the_mixture_credits_the_largest_posterior(num_assistants: int) -> None:
    logprobs, by_author = some_logprobs(num_assistants), some_author_logprobs(num_assistants)
    credited = set()
    for token in range(V):
        of_token = {author: each[:, token] for author, each in logprobs.items()}
        credit = MixturePolicy().credit(of_token, by_author).tolist()
        for row in range(N):
            joint = [float(by_author[row, z].exp() * of_token[z][row].exp()) for z in range(num_assistants + 1)]
            assert credit[row] == joint.index(max(joint))
        credited.update(credit)
    assert credited == set(logprobs)


def test_the_mixture_credits_the_head_where_the_authors_agree_and_the_lowest_on_a_tie() -> None:
    alike = {author: torch.tensor([-1.0, -1.0]) for author in (0, 1, 2)}
    by_author = torch.tensor([[0.2, 0.3, 0.5], [0.2, 0.4, 0.4]]).log()
    assert MixturePolicy().credit(alike, by_author).tolist() == [2, 1]


@EACH_K
def test_a_product_of_weight_1_is_the_base(num_assistants: int) -> None:
    logprobs = some_logprobs(num_assistants)
    assert torch.allclose(normalised(ProductPolicy(1.0), logprobs), logprobs[0], atol=1e-6)


def test_a_product_with_one_assistant_is_the_assistant_at_weight_0_and_an_author_if_both_are_equal() -> None:
    logprobs = some_logprobs(1)
    assert torch.allclose(normalised(ProductPolicy(0.0), logprobs), logprobs[1], atol=1e-6)
    twins = {0: logprobs[0], 1: logprobs[0].clone()}
    assert torch.allclose(normalised(ProductPolicy(0.5), twins), logprobs[0], atol=1e-6)


@pytest.mark.parametrize("weight", [0.0, 0.25, 0.5])
def test_a_product_is_the_weighted_geometric_mean_of_the_authors(weight: float) -> None:
    logprobs = some_logprobs(2)
    base, first, second = (logprobs[author].exp() for author in range(3))
    mean = base**weight * first ** ((1 - weight) / 2) * second ** ((1 - weight) / 2)
    expected = mean / mean.sum(-1, keepdim=True)
    assert torch.allclose(normalised(ProductPolicy(weight), logprobs).exp(), expected, atol=1e-6)


def test_a_product_credits_who_gave_the_token_the_most_probability_and_the_lowest_on_a_tie() -> None:
    of_tokens = {2: torch.tensor([-1.0, -9.0, -2.0]), 0: torch.tensor([-3.0, -9.0, -1.0]), 1: torch.full((3,), -9.0)}
    assert ProductPolicy().credit(of_tokens, some_author_logprobs(2)).tolist() == [2, 0, 0]


def test_contrast_without_strength_or_truncation_is_exactly_the_expert() -> None:
    logprobs = some_logprobs(2)
    for expert, amateur in [(1, 0), (0, 1), (2, 1)]:
        policy = ContrastivePolicy(alpha=0.0, beta=0.0, expert=expert, amateur=amateur)
        assert torch.equal(policy.combine(logprobs, some_author_logprobs(2)), logprobs[expert])


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.9, 1.0])
def test_contrast_without_strength_has_the_experts_argmax(alpha: float) -> None:
    logprobs = some_logprobs(1)
    scores = ContrastivePolicy(alpha=alpha, beta=0.0).combine(logprobs, some_author_logprobs(1))
    assert torch.equal(scores.argmax(-1), logprobs[1].argmax(-1))


@pytest.mark.parametrize("beta", [0.0, 0.5, 5.0])
def test_alpha_1_leaves_only_the_experts_argmax(beta: float) -> None:
    logprobs = some_logprobs(1)
    scores = ContrastivePolicy(alpha=1.0, beta=beta).combine(logprobs, some_author_logprobs(1))
    only = torch.nn.functional.one_hot(logprobs[1].argmax(-1), V).bool()
    assert torch.equal(scores.isfinite(), only)
    assert (scores[~only] == -torch.inf).all()


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.5), (0.1, 0.5), (0.3, 2.0), (0.1, 0.0)])
def test_contrast_follows_its_formula_on_plausible_tokens_and_drops_the_others(alpha: float, beta: float) -> None:
    logprobs = some_logprobs(2)
    policy = ContrastivePolicy(alpha=alpha, beta=beta, expert=2, amateur=1)
    scores = policy.combine(logprobs, some_author_logprobs(2))
    expert, amateur = logprobs[2].exp(), logprobs[1].exp()
    plausible = expert >= alpha * expert.amax(-1, keepdim=True)
    assert plausible.all() == (alpha == 0)
    expected = (expert ** (1 + beta) / amateur**beta).log()
    assert torch.allclose(scores[plausible], expected[plausible], atol=1e-4)
    assert (scores[~plausible] == -torch.inf).all()


def test_contrast_drops_what_the_expert_excludes_even_if_the_amateur_does_too() -> None:
    expert, amateur = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[0.9, 0.1, 0.0]]).log()
    scores = ContrastivePolicy(alpha=0.1, beta=0.5).combine({0: amateur, 1: expert}, torch.zeros(1, 2))
    assert scores.argmax(-1).tolist() == [1]
    assert scores[0, 2] == -torch.inf


def test_contrast_credits_the_expert() -> None:
    of_tokens = {0: torch.tensor([-0.1, -0.1]), 1: torch.tensor([-5.0, -5.0])}
    assert ContrastivePolicy().credit(of_tokens, some_author_logprobs(1)).tolist() == [1, 1]
    assert ContrastivePolicy(expert=0, amateur=1).credit(of_tokens, some_author_logprobs(1)).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ContrastivePolicy(expert=1, amateur=1), "both author 1"),
        (lambda: ContrastivePolicy(expert=0), "both author 0"),
        (lambda: ContrastivePolicy(beta=-0.1), "beta is -0.1"),
        (lambda: ContrastivePolicy(beta=math.nan), "beta is nan"),
        (lambda: ContrastivePolicy(beta=math.inf), "beta is inf"),
        (lambda: ContrastivePolicy(alpha=-0.1), "alpha is -0.1"),
        (lambda: ContrastivePolicy(alpha=1.1), "alpha is 1.1"),
        (lambda: ContrastivePolicy(alpha=math.nan), "alpha is nan"),
        (lambda: ProductPolicy(-0.1), "weight is -0.1, expected a number from 0 to 1"),
        (lambda: ProductPolicy(1.1), "weight is 1.1, expected a number from 0 to 1"),
        (lambda: ProductPolicy(math.nan), "weight is nan, expected a number from 0 to 1"),
        (lambda: ProxyTuningPolicy(model=0), "author 0"),
        (lambda: ProxyTuningPolicy(model=2), "author 2"),
    ],
)
def test_combinations_refuse_options_out_of_range(build: Callable[[], CombiningPolicy], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()


@pytest.mark.parametrize("proxy", [0, 2])
def test_a_proxy_that_tuning_did_not_change_leaves_the_model_as_it_is(proxy: int) -> None:
    logprobs = some_logprobs(2)
    policy = ProxyTuningPolicy(model=1, tuned=proxy, untuned=proxy)
    assert torch.equal(policy.combine(logprobs, some_author_logprobs(2)), logprobs[1])
    twins = {**logprobs, 2: logprobs[0].clone()}
    assert torch.equal(ProxyTuningPolicy().combine(twins, some_author_logprobs(2)), logprobs[1])


@pytest.mark.parametrize(("model", "tuned", "untuned"), [(1, 0, 2), (0, 2, 1), (2, 1, 0)])
def test_proxy_tuning_multiplies_the_model_by_what_tuning_did(model: int, tuned: int, untuned: int) -> None:
    logprobs = some_logprobs(2)
    probs = {author: each.exp() for author, each in logprobs.items()}
    steered = probs[model] * probs[tuned] / probs[untuned]
    expected = steered / steered.sum(-1, keepdim=True)
    policy = ProxyTuningPolicy(model, tuned, untuned)
    assert torch.allclose(normalised(policy, logprobs).exp(), expected, atol=1e-5)


@pytest.mark.parametrize(("policy", "model"), [(ProxyTuningPolicy(), 1), (ProxyTuningPolicy(0, 1, 2), 0)])
def test_proxy_tuning_credits_the_model(policy: ProxyTuningPolicy, model: int) -> None:
    of_tokens = {author: torch.full((2,), -float(1 + (author == model))) for author in range(3)}
    credit = policy.credit(of_tokens, some_author_logprobs(2))
    assert credit.tolist() == [model, model]
    assert credit.dtype == torch.long


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (MixturePolicy(), {1: [1], 2: [1, 2], 3: [1, 2, 3]}),
        (ProductPolicy(), {1: [1], 2: [1, 2], 3: [1, 2, 3]}),
        (ContrastivePolicy(), {1: [1], 2: [1], 3: [1]}),
        (ContrastivePolicy(expert=0, amateur=1), {1: [1], 2: [1], 3: [1]}),
        (ContrastivePolicy(expert=3, amateur=2), {3: [2, 3]}),
        (ProxyTuningPolicy(), {2: [1, 2], 3: [1, 2]}),
        (ProxyTuningPolicy(model=0, tuned=2, untuned=1), {2: [1, 2], 3: [1, 2]}),
        (ProxyTuningPolicy(model=1, tuned=3, untuned=3), {3: [1, 3]}),
    ],
)
def test_combinations_consult_the_assistants_they_read(
    policy: CombiningPolicy, expected: dict[int, Sequence[int]]
) -> None:
    assert {k: list(policy.consults(k)) for k in expected} == expected
