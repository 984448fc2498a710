"""Models with different tokenizers write one text: the same as the law says, however they are batched."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from collm import CoLLM, DeferralHead, SamplingParams
from collm.core.policies import BudgetPolicy, JointPolicy, Policy, SingleAuthorPolicy, ThresholdPolicy
from tests.decoding.slow_segments import SlowSegments
from tests.two_tokenizers import TEXTS, two_tokenizers, writing_model


def random_head(hidden_size: int, k: int, seed: int = 0) -> DeferralHead:
    head = DeferralHead(hidden_size, k)
    generator = torch.Generator().manual_seed(seed)
    torch.nn.init.normal_(head.weight, std=0.5, generator=generator)
    return head


@pytest.fixture(scope="module")
def pair() -> CoLLM:
    base, assistant = two_tokenizers()
    models = writing_model(base, 1, ends=0.5), writing_model(assistant, 2, hidden_size=48, ends=0.5)
    return CoLLM(models[0], [models[1]], random_head(32, 1), base, tokenizers=[assistant])


def prompts_of(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    words = " ".join(TEXTS).split()
    return [" ".join(rng.choices(words, k=rng.randrange(1, 9))) for _ in range(count)]


def slow(model: CoLLM, prompt: str, policy: Policy, params: SamplingParams) -> tuple[list[int], list[int], bytes]:
    assert model.alignment is not None
    prompts = [model.template.encode_prompt(model.tokenizer, prompt), *model.alignment.assistant_prompts(prompt)]
    modules: Any = [model.base, *model.assistants]
    return SlowSegments(modules, model.alignment, model.head, prompts, policy, params).run()


POLICIES = [
    ThresholdPolicy(0.5),
    ThresholdPolicy(0.2),
    ThresholdPolicy(0.8),
    SingleAuthorPolicy(0),
    SingleAuthorPolicy(1),
    BudgetPolicy(0.4, threshold=0.3),
]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_greedy_equals_the_slow_loop_in_any_company(pair: CoLLM, policy: Policy) -> None:
    prompts, params = prompts_of(1, 12), SamplingParams(max_new_tokens=30)
    wanted = [slow(pair, prompt, policy, params) for prompt in prompts]
    for size in (1, 5):
        done = pair.generate(prompts, params, policy=policy, max_batch=size)
        assert [(one.token_ids, one.authors) for one in done] == [each[:2] for each in wanted]
    assert {author for _, authors, _ in wanted for author in authors} >= (
        {policy.writer} if isinstance(policy, SingleAuthorPolicy) else {0, 1}
    )


@pytest.mark.parametrize("policy", [ThresholdPolicy(0.5), JointPolicy()], ids=str)
def test_sampled_equals_the_slow_loop_in_any_company(pair: CoLLM, policy: Policy) -> None:
    prompts = prompts_of(2, 8)
    drawn = [SamplingParams(max_new_tokens=25, temperature=0.8, top_p=0.95, seed=i) for i in range(8)]
    wanted = [slow(pair, prompt, policy, params)[:2] for prompt, params in zip(prompts, drawn, strict=True)]
    for size in (1, 8):
        done = pair.generate(prompts, drawn, policy=policy, max_batch=size)
        assert [(one.token_ids, one.authors) for one in done] == wanted


def test_one_tokenizer_twice_that_never_defers_is_plain_generation(pair: CoLLM) -> None:
    """Wherever the model writes the tokens that its tokenizer would cut the text into."""
    for prompt in prompts_of(3, 12):
        params = SamplingParams(max_new_tokens=20)
        done = pair.generate(prompt, params, threshold=1.0)[0]
        ids = done.prompt_token_ids
        base: Any = pair.base
        alone = base.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=20, do_sample=False
        )[0, len(ids) :].tolist()
        same = [i for i, (a, b) in enumerate(zip(done.token_ids, alone, strict=False)) if a != b]
        upto = same[0] if same else len(alone)
        assert pair.tokenizer(done.text, add_special_tokens=False)["input_ids"][:upto] == alone[:upto] or upto > 0
