"""Every rule and judge draws each token from its law: all random numbers of a grid, with drafts, over seven tokens."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from collm import CoLLM, DeferralHead, SamplingParams
from collm.core.head import author_logprobs, doubt_of
from tests.engine.test_engine import random_head
from tests.engine.test_exactness import Plans
from tests.tiny_models import make_model, tiny_config
from tests.tokenizers import SEVEN_TOKENS, seven_tokens

NUMBERS = 256
"""Random numbers of a grid. A token's share of them differs from its probability by as many numbers as its set has
pieces, of which there is at most one for each token that the base can draft."""
V = len(SEVEN_TOKENS)
TEXT = [5, 2, 0]

Law = Callable[[list[Tensor], Tensor], Tensor]
"""(authors' probabilities, each (V,); probabilities of the authors (K + 1,)) -> the token's probabilities (V,)."""


def likely(probs: list[Tensor], weights: Tensor) -> Tensor:
    return probs[1 + int(weights[1:].argmax())]


def mixed(probs: list[Tensor], weights: Tensor) -> Tensor:
    return sum(weight * each for weight, each in zip(weights, probs, strict=True))  # type: ignore[return-value]


def gated(threshold: float, where_the_base_writes: Law) -> Law:
    return lambda probs, weights: (likely if 1 - weights[0] > threshold else where_the_base_writes)(probs, weights)


def regret(nats: float) -> Law:
    def law(probs: list[Tensor], weights: Tensor) -> Tensor:
        assistant = likely(probs, weights)
        stands = probs[0] * (assistant.max().log() - assistant.log() <= nats)
        return stands + (1 - stands.sum()) * assistant

    return law


def product(probs: list[Tensor], weights: Tensor) -> Tensor:
    share = 0.6 / (len(probs) - 1)
    whole = probs[0] ** 0.4 * torch.stack([each**share for each in probs[1:]]).prod(0)
    return whole / whole.sum()


def contrastive(probs: list[Tensor], weights: Tensor) -> Tensor:
    whole = probs[1] ** 1.5 / probs[0] ** 0.5 * (probs[1] >= 0.1 * probs[1].max())
    return whole / whole.sum()


def proxy(probs: list[Tensor], weights: Tensor) -> Tensor:
    whole = probs[1] * probs[0] / probs[2]
    return whole / whole.sum()


def base(probs: list[Tensor], weights: Tensor) -> Tensor:
    return probs[0]


def blend(probs: list[Tensor], weights: Tensor) -> Tensor:
    return 0.6 * likely(probs, weights) + 0.4 * probs[0]


def surest(probs: list[Tensor], weights: Tensor) -> Tensor:
    return max(probs, key=lambda each: float(each.max()))


LAWS: dict[str, Law] = {
    "threshold:threshold=0.5": gated(0.5, base),
    "schedule:start=0.3,end=0.9,steps=4": gated(0.3 + 0.6 / 4, base),  # at the second token
    "budget:budget=0,threshold=0.5,burst=9": gated(0.5, base),
    "random:rate=0.4": lambda probs, weights: 0.4 * likely(probs, weights) + 0.6 * probs[0],
    "single:writer=1": lambda probs, weights: probs[1],
    "joint": mixed,
    "confidence": surest,
    "mixture": mixed,
    "mixture:threshold=0.5": lambda probs, weights: mixed(probs, weights) if weights[0] < 0.5 else probs[0],
    "product:weight=0.4": product,
    "contrastive": contrastive,
    "proxy": proxy,
}
JUDGED: dict[str, Law] = {
    "exact": likely,
    "blend:weight=0.6": blend,
    "joint": mixed,
    "regret:nats=0.7": regret(0.7),
    "regret:nats=9,budget=9": regret(9),
}
for judge, of_judge in JUDGED.items():
    for threshold in (0.5, 1.0):
        LAWS[f"threshold:threshold={threshold},judge={judge}"] = gated(threshold, of_judge)
    LAWS[f"random:rate=0.4,judge={judge}"] = lambda probs, weights, of_judge=of_judge: (  # type: ignore[misc]
        0.4 * likely(probs, weights) + 0.6 * of_judge(probs, weights)
    )


class Grid(random.Random):
    """Numbers of the first position that stay, then those of a grid for the author and the token of the second."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        across = ((seed * 0.6180339887) % 1, (seed + 0.5) / NUMBERS)  # evenly spread also over the square
        self._numbers = [0.35, 0.6, *across]

    def random(self) -> float:
        return self._numbers.pop(0) if self._numbers else super().random()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return seven_tokens()


@pytest.fixture(scope="module")
def members() -> list[PreTrainedModel]:
    config = tiny_config(vocab_size=V, initializer_range=0.35, eos_token_id=None)
    return [make_model(config, seed) for seed in (3, 4, 5)]


def seen(models: list[PreTrainedModel], head: DeferralHead, text: list[int]) -> tuple[list[Tensor], Tensor]:
    """What each model gives to the next token, and what the head gives to each model, from passes without a cache."""
    with torch.no_grad():
        read = [model(torch.tensor([text]), use_cache=False, output_hidden_states=True) for model in models]
        logits = [each.logits[:, -1].float() for each in read]
        weights = author_logprobs(head(read[0].hidden_states[-1][:, -1], doubt_of(logits[0])))[0].exp()
    return [each[0].softmax(-1) for each in logits], weights


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "num_assistants"), [(rule, n) for rule in LAWS for n in (1, 2) if (rule, n) != ("proxy", 1)]
)
def test_the_second_token_has_the_distribution_of_its_law(
    rule: str,
    num_assistants: int,
    members: list[PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = members[: 1 + num_assistants]
    model = CoLLM(models[0], models[1:], random_head(32, num_assistants), tokenizer)
    monkeypatch.setattr("collm.engine.sequence.seeded", Grid)
    Plans(monkeypatch, random.Random(0))
    params = SamplingParams(max_tokens=2, temperature=1.0)
    policy = model.policy(rule)
    done = model.generate(
        [TEXT] * NUMBERS, [replace(params, seed=seed) for seed in range(NUMBERS)], policy=policy, max_batch=NUMBERS
    )
    (first,) = {one.token_ids[0] for one in done}
    law = LAWS[rule](*seen(models, model.head, [*TEXT, first]))
    assert float(law.sum()) == pytest.approx(1, abs=1e-5)
    counts = Counter(one.token_ids[1] for one in done)
    shares = torch.tensor([counts[token] / NUMBERS for token in range(V)])
    torch.testing.assert_close(shares, law, rtol=0, atol=V / NUMBERS)
