"""The engine against the slow, obvious loop: both models from scratch at every token, one prompt at a time."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from collm import CoLLM, DeferralHead, SamplingParams
from collm.core.policies import OraclePolicy, Policy, RandomPolicy, SingleAuthorPolicy, ThresholdPolicy
from collm.engine.engine import Engine
from collm.engine.request import Request
from collm.errors import ConfigError, ModelFailure, RequestError
from tests.architectures import ARCHITECTURES, EXACT, VOCAB_SIZE
from tests.engine.slow import slow_decode
from tests.tiny_models import DEVICES, make_model

Model = Callable[..., PreTrainedModel]
EOS = 1


SHAPES: list[dict[str, Any]] = [{"doubt": True}, {"width": 8}, {"width": 8, "doubt": True}]


def random_head(hidden_size: int, k: int, seed: int = 0, scale: float = 0.5, **shape: Any) -> DeferralHead:
    head = DeferralHead(hidden_size, k, **shape)
    generator = torch.Generator().manual_seed(seed)
    head.weight.data = scale * torch.randn(head.weight.shape, generator=generator)
    if head.width:
        head.output_weight.data = 2 * torch.randn(k, head.width, generator=generator)
    return head


def prompts_of(seed: int, count: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(2, VOCAB_SIZE) for _ in range(rng.randrange(1, 20))] for _ in range(count)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_equals_the_slow_loop_on_every_architecture(
    name: str, device: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    base, assistant = (make_model(EXACT[name](), seed, device) for seed in (0, 1))
    head = random_head(32, 1)
    model = CoLLM(base, [assistant], head, tokenizer)
    prompts = prompts_of(0, 5)
    # three at a time: the others join when one leaves
    out = model.generate(prompts, SamplingParams(max_tokens=20), threshold=0.5, max_batch=3)
    both = set()
    for prompt, completion in zip(prompts, out, strict=True):
        token_ids, authors = slow_decode(
            [base, assistant],
            head,
            prompt,
            ThresholdPolicy(0.5),
            SamplingParams(max_tokens=20),
            guess=completion.token_ids,
        )
        assert completion.token_ids == token_ids
        assert completion.authors == authors
        both |= set(authors)
    assert both == {0, 1}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_of_the_head_equals_the_slow_loop(
    shape: dict[str, Any], tiny_model: Model, tokenizer: PreTrainedTokenizerFast
) -> None:
    models, params = (
        [tiny_model(0), tiny_model(1), tiny_model(2)],
        SamplingParams(max_tokens=16, temperature=0.8, seed=3),
    )
    model = CoLLM(models[0], models[1:], random_head(32, 2, seed=1, **shape), tokenizer)
    (out,) = model.generate(prompts_of(1, 1), params, threshold=0.6)
    expected = slow_decode(models, model.head, prompts_of(1, 1)[0], ThresholdPolicy(0.6), params, guess=out.token_ids)
    assert (out.token_ids, out.authors) == expected
    assert len(set(out.authors)) > 1


@pytest.mark.slow
def test_two_assistants_of_other_architectures_equal_the_slow_loop(tokenizer: PreTrainedTokenizerFast) -> None:
    models = [make_model(EXACT[name](), seed) for seed, name in enumerate(["llama", "gpt2", "mistral-window"])]
    head = random_head(32, 2, seed=3)
    out = CoLLM(models[0], models[1:], head, tokenizer).generate(
        prompts_of(1, 4), SamplingParams(max_tokens=25), threshold=0.6
    )
    seen = set()
    for prompt, completion in zip(prompts_of(1, 4), out, strict=True):
        params = SamplingParams(max_tokens=25)
        token_ids, authors = slow_decode(models, head, prompt, ThresholdPolicy(0.6), params, guess=completion.token_ids)
        assert (completion.token_ids, completion.authors) == (token_ids, authors)
        seen |= set(authors)
    assert seen == {0, 1, 2}


@pytest.fixture
def pair(tiny_model: Model, tokenizer: PreTrainedTokenizerFast) -> CoLLM:
    return CoLLM(tiny_model(0), [tiny_model(1, hidden_size=48)], random_head(32, 1), tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize(("threshold", "author"), [(1.0, 0), (-1.0, 1)])
def test_threshold_extremes_are_each_model_alone_under_generate(pair: CoLLM, threshold: float, author: int) -> None:
    alone: Any = [pair.base, *pair.assistants][author]
    out = pair.generate(prompts_of(2, 4), SamplingParams(max_tokens=16), threshold=threshold)
    for prompt, completion in zip(prompts_of(2, 4), out, strict=True):
        ids = torch.tensor([prompt])
        expected = alone.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False, pad_token_id=0
        )
        assert completion.token_ids == expected[0, len(prompt) :].tolist()
        assert set(completion.authors) == {author}
    single = pair.generate(prompts_of(2, 4), SamplingParams(max_tokens=16), policy=SingleAuthorPolicy(author))
    assert [c.token_ids for c in single] == [c.token_ids for c in out]


@pytest.mark.slow
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_a_penalty_of_the_generation_config_is_a_sampling_parameter(
    penalty: float, tiny_model: Model, tokenizer: PreTrainedTokenizerFast
) -> None:
    base = tiny_model(0)
    base.generation_config.repetition_penalty = 1.3
    model = CoLLM(base, [tiny_model(1)], random_head(32, 1), tokenizer)
    params = SamplingParams(max_tokens=16, repetition_penalty=penalty)
    for prompt, completion in zip(
        prompts_of(2, 4), model.generate(prompts_of(2, 4), params, threshold=1.0), strict=True
    ):
        ids = torch.tensor([prompt])
        options: dict[str, Any] = {} if penalty == 1.3 else {"repetition_penalty": penalty}
        generate: Any = base.generate
        expected = generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, pad_token_id=0, **options)
        assert completion.token_ids == expected[0, len(prompt) :].tolist()


@pytest.mark.slow
def test_one_model_as_base_and_assistant_is_that_model(tiny_model: Model, tokenizer: PreTrainedTokenizerFast) -> None:
    model = CoLLM(tiny_model(0), [tiny_model(0)], random_head(32, 1), tokenizer)
    params = SamplingParams(max_tokens=16)
    outs = [model.generate(prompts_of(3, 3), params, threshold=t) for t in (1.0, 0.5, -1.0)]
    assert 0 < outs[1].deferral_rate < 1
    assert [c.token_ids for c in outs[0]] == [c.token_ids for c in outs[1]] == [c.token_ids for c in outs[2]]


@pytest.mark.slow
def test_batch_size_and_company_change_nothing_even_when_sampling(pair: CoLLM) -> None:
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=5)
    for policy in ("joint", RandomPolicy(0.5), ThresholdPolicy(0.5)):
        together = pair.generate(prompts_of(4, 5), params, policy=policy)
        in_turn = pair.generate(prompts_of(4, 5), params, policy=policy, max_batch=1)
        assert [c.token_ids for c in together] == [c.token_ids for c in in_turn]
        assert [c.authors for c in together] == [c.authors for c in in_turn]


def test_completions_with_seeds_on_both_sides_of_zero_differ(pair: CoLLM) -> None:
    params = SamplingParams(max_tokens=8, temperature=1.0, seed=-2)
    drawn = {tuple(one.token_ids) for one in pair.generate(["w3 w4"] * 5, params, threshold=0.5)}  # seeds -2 to 2
    assert len(drawn) == 5


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["joint", ThresholdPolicy(0.5)])
def test_the_first_token_follows_the_stated_law(
    policy: Policy | str, tiny_model: Model, tokenizer: PreTrainedTokenizerFast
) -> None:
    """2,000 draws; Pearson's statistic over cells of expectation >= 5 stays below mean + 6 standard deviations
    of its chi-squared law: odds of a false alarm below 1 in 100,000, and the seed is fixed."""
    base, assistant = tiny_model(0), tiny_model(1)
    head = random_head(32, 1, scale=0.2)
    model, prompt, n = CoLLM(base, [assistant], head, tokenizer), [5, 9, 33], 2_000
    with torch.no_grad():
        outputs = [m(torch.tensor([prompt]), output_hidden_states=True) for m in (base, assistant)]
        d = torch.sigmoid(head(outputs[0].hidden_states[-1][0, -1]))
    laws = [torch.softmax(output.logits[0, -1].double() / 0.8, -1) for output in outputs]
    if policy == "joint":  # at temperature 0.8 the authors' law is sharpened too
        sharp = torch.cat([1 - d, d]).double() ** (1 / 0.8)
        law = (sharp / sharp.sum()) @ torch.stack(laws)
    else:
        law = laws[int(d > 0.5)]
    params = SamplingParams(max_tokens=1, temperature=0.8, seed=0)
    out = model.generate([prompt] * n, params, policy=policy, max_batch=400)
    counts = torch.bincount(torch.tensor([c.token_ids[0] for c in out]), minlength=VOCAB_SIZE).double()
    cells = law * n >= 5
    statistic = ((counts - n * law) ** 2 / (n * law))[cells].sum()
    freedom = int(cells.sum())
    assert freedom > 10
    assert statistic < freedom + 6 * (2 * freedom) ** 0.5


def test_oracle_consults_all_and_defer_probs_and_logprobs_are_reported(pair: CoLLM) -> None:
    prompt = [4, 8, 15]
    alone = pair.generate([prompt], SamplingParams(max_tokens=6), threshold=-1.0)[0]
    out = pair.generate([prompt], SamplingParams(max_tokens=6), policy=OraclePolicy(tuple(alone.token_ids)))[0]
    assert out.token_ids == alone.token_ids
    with torch.no_grad():
        base: Any = pair.base
        output = base(torch.tensor([prompt]), output_hidden_states=True)
        d = torch.sigmoid(pair.head(output.hidden_states[-1][0, -1])).item()
    assert alone.defer_probs[0] == pytest.approx(d, abs=1e-5)
    assistant: Any = pair.assistants[0]
    with torch.no_grad():
        logprobs = assistant(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    assert alone.logprobs[0] == pytest.approx(logprobs.max().item(), abs=1e-5)


def test_usage_counts_what_each_model_did(pair: CoLLM) -> None:
    out = pair.generate([[3, 4, 5]], SamplingParams(max_tokens=8), threshold=0.5, lookahead=0)
    completion = out[0]
    base, assistant = out.usage["base"], out.usage["assistant"]
    written = len(completion.token_ids)
    assert base.forward_passes == written
    assert base.tokens_read == 3 + written - 1
    assert base.tokens_written + assistant.tokens_written == written
    assert assistant.forward_passes == assistant.tokens_written == sum(completion.authors)
    last = max(i for i, author in enumerate(completion.authors) if author)
    assert assistant.tokens_read == 3 + last  # every token once: catching up, never reading again
    assert out.deferral_rate == completion.deferral_rate == sum(completion.authors) / written
    again = pair.generate([[3, 4, 5]], SamplingParams(max_tokens=8), threshold=0.5, lookahead=0)
    assert again.usage == out.usage


def test_no_slot_outlives_its_sequence(pair: CoLLM) -> None:
    pair.generate(prompts_of(5, 4), SamplingParams(max_tokens=5), threshold=0.5)
    stream = pair.stream([3, 4], SamplingParams(max_tokens=5), threshold=0.5)
    next(stream)
    assert pair.runners[0].open_slots == 1
    stream.close()  # type: ignore[attr-defined]
    assert [author.open_slots for author in pair.runners] == [0, 0]


def test_a_draft_behind_a_prompt_that_was_read_before_is_answered_in_full(
    pair: CoLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slot that holds the drafted tokens too must not be taken over so far that there is nothing left to answer."""
    prompt, params = (prompts_of(3, 1)[0] * 20)[:60], SamplingParams(max_tokens=6)
    (alone,) = pair.generate([prompt], params, threshold=0.5, lookahead=0)
    monkeypatch.setattr("collm.engine.lookup.PromptLookup.draft", lambda self, length: alone.token_ids[:length])
    monkeypatch.setattr("collm.engine.planner.lookup_length", lambda odds, base, other, active, available: available)
    for completion in pair.generate([prompt] * 3, params, threshold=0.5, max_batch=1):
        assert (completion.token_ids, completion.authors) == (alone.token_ids, alone.authors)


def test_cancelled_sequences_leave_the_others_unchanged(pair: CoLLM) -> None:
    params, prompts = SamplingParams(max_tokens=10), prompts_of(6, 4)
    expected = [c.token_ids for c in pair.generate(prompts, params, threshold=0.5)]
    engine = pair.engine(max_batch=3)
    numbers = [engine.add(Request(p, params, ThresholdPolicy(0.5))) for p in prompts]
    came: dict[int, list[int]] = {number: [] for number in numbers}
    while len(came[1]) < 3:
        for output in engine.step():
            came[output.number].append(output.step.token_id)
    written = len(came[1])
    engine.cancel(numbers[1])
    while engine.has_work:
        for output in engine.step():
            came[output.number].append(output.step.token_id)
    assert came[1] == expected[1][:written]
    assert written < len(expected[1])
    assert [came[i] for i in (0, 2, 3)] == [expected[i] for i in (0, 2, 3)]


def test_any_models_eos_ends_a_text(tiny_model: Model, tokenizer: PreTrainedTokenizerFast) -> None:
    base, assistant = tiny_model(0), tiny_model(1)
    first = CoLLM(base, [assistant], random_head(32, 1), tokenizer).generate(
        [[5, 6]], SamplingParams(max_tokens=9), threshold=0.5
    )[0]
    ending = first.token_ids[4]
    assistant.generation_config.eos_token_id = [EOS, ending]
    model = CoLLM(base, [assistant], random_head(32, 1), tokenizer, accept_differences=["eos"])
    out = model.generate([[5, 6]], SamplingParams(max_tokens=9), threshold=0.5)[0]
    assert out.token_ids == first.token_ids[: first.token_ids.index(ending) + 1]
    assert out.finish_reason == "eos"


def test_context_end_and_token_limit_finish_with_length(tiny_model: Model, tokenizer: PreTrainedTokenizerFast) -> None:
    short = CoLLM(tiny_model(0), [tiny_model(1, max_position_embeddings=12)], random_head(32, 1), tokenizer)
    out = short.generate([[5, 6, 7]], SamplingParams(max_tokens=50), threshold=1.0)[0]
    assert (len(out.token_ids), out.finish_reason) == (9, "length")
    with pytest.raises(RequestError, match="12 tokens, but the context of assistant is 12 tokens"):
        short.generate([[5] * 12], threshold=1.0)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "empty"),
        ("", "empty"),
        ([VOCAB_SIZE], "outside the vocabulary"),
        ([-1], "outside"),
        (3.5, "expected a string, a list of messages"),
    ],
)
def test_bad_prompts_are_refused_before_anything_runs(pair: CoLLM, prompt: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        pair.generate([[5, 6], prompt], threshold=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "not calibrated"),
        ({"budget": 0.1}, "a budget needs a calibration"),
        ({"threshold": 2}, "from -1 to 1"),
        ({"threshold": 0.5, "budget": 0.1}, "give one of them"),
        ({"threshold": 0.5, "policy": "joint"}, "no effect"),
        ({"policy": "best"}, "policy is 'best', expected one of threshold, "),
        ({"policy": [ThresholdPolicy(0.5)] * 3}, "got 3 policies for 1"),
        ({"policy": SingleAuthorPolicy(2)}, "asks for author 2, expected 0 to 1"),
        ({"threshold": 0.5, "max_batch": 0}, "max_batch is 0"),
        ({"threshold": 0.5, "params": SamplingParams(seed=3)}, "seed=3 has no effect"),
    ],
)
def test_options_that_contradict_or_do_nothing_are_refused(pair: CoLLM, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pair.generate([[5, 6]], **options)


def test_nan_names_the_model_and_frees_every_slot(pair: CoLLM) -> None:
    assistant: Any = pair.assistants[0]
    pair.generate([[5]], SamplingParams(max_tokens=1), threshold=0.5)
    assistant.lm_head.weight.data[3] = torch.nan
    with pytest.raises(ModelFailure, match="assistant returned NaN"):
        pair.generate([[5], [6]], SamplingParams(max_tokens=4), threshold=-1.0)
    assert [author.open_slots for author in pair.runners] == [0, 0]


def test_streaming_equals_generating(pair: CoLLM) -> None:
    params = SamplingParams(max_tokens=15, temperature=0.9, seed=2, stop="w3")
    whole = pair.generate([[5, 6]], params, threshold=0.5)[0]
    steps = list(pair.stream([5, 6], params, threshold=0.5))
    assert [s.token_id for s in steps] == whole.token_ids
    assert "".join(s.text for s in steps) == whole.text
    assert [s.author for s in steps] == whole.authors


def test_stop_strings_cut_the_text_before_them(pair: CoLLM) -> None:
    whole = pair.generate([[5, 6]], SamplingParams(max_tokens=15), threshold=0.5)[0]
    words = whole.text.split()
    stop = f"{words[3][-1]} {words[4]}"  # begins in one token and ends in the next
    out = pair.generate([[5, 6]], SamplingParams(max_tokens=15, stop=stop), threshold=0.5)[0]
    assert out.text == whole.text[: whole.text.index(stop)]
    assert out.finish_reason == "stop"
    assert len(out.token_ids) < len(whole.token_ids)


def test_the_engine_can_be_driven_by_hand(pair: CoLLM) -> None:
    engine: Engine = pair.engine(max_batch=2)
    assert not engine.has_work
    number = engine.add(Request([5], SamplingParams(max_tokens=2), ThresholdPolicy(1.0)))
    assert [e.number for e in engine.step()] == [number]
    (last,) = engine.step()
    assert last.completion is not None
    assert last.completion.finish_reason == "length"
    assert not engine.has_work
