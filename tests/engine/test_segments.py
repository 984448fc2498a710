"""Models with different tokenizers write one text: the same as the law says, however they are batched."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from collm import CoLLM, DeferralHead, SamplingParams
from collm.core.policies import BudgetPolicy, JointPolicy, Policy, SingleAuthorPolicy, ThresholdPolicy
from collm.core.types import Completion
from collm.engine.engine import Engine
from collm.engine.request import Request
from collm.engine.runner import ModelRunner
from collm.errors import ConfigError, ModelFailure
from collm.models.language_model import LanguageModel
from collm.text.alignment import Alignment
from collm.text.grammars import Grammars
from collm.text.text_tokenizer import TextTokenizer
from collm.training.examples import aligned_example
from collm.training.scoring import read_scores
from tests.engine.slow_segments import SlowSegments
from tests.tools.functions import miles
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


def slow(model: CoLLM, prompt: str, policy: Policy, params: SamplingParams) -> tuple[list[int], list[int], list[float]]:
    """Token ids, authors and log-probabilities."""
    assert model.alignment is not None
    prompts = [model.template.encode_prompt(model.tokenizer, prompt), *model.alignment.assistant_prompts(prompt)]
    modules: Any = [model.base, *model.assistants]
    by_hand = SlowSegments(modules, model.alignment, model.head, prompts, policy, params)
    return *by_hand.run()[:2], by_hand.logprobs


def check(done: Sequence[Completion], wanted: Sequence[tuple[list[int], list[int], list[float]]]) -> None:
    for one, (token_ids, authors, logprobs) in zip(done, wanted, strict=True):
        assert (one.token_ids, one.authors) == (token_ids, authors)
        assert one.logprobs == pytest.approx(logprobs, abs=1e-4)


POLICIES = [
    ThresholdPolicy(0.5),
    ThresholdPolicy(0.2),
    ThresholdPolicy(0.8),
    SingleAuthorPolicy(0),
    SingleAuthorPolicy(1),
    BudgetPolicy(0.4, threshold=0.3),
]


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_greedy_equals_the_slow_loop_in_any_company(pair: CoLLM, policy: Policy) -> None:
    prompts, params = prompts_of(1, 6), SamplingParams(max_tokens=30)
    wanted = [slow(pair, prompt, policy, params) for prompt in prompts]
    for size in (1, 5):
        done = pair.generate(prompts, params, policy=policy, max_batch=size)
        check(done, wanted)
    assert {author for _, authors, _ in wanted for author in authors} >= (
        {policy.writer} if isinstance(policy, SingleAuthorPolicy) else {0, 1}
    )


@pytest.mark.slow
@pytest.mark.parametrize("policy", [ThresholdPolicy(0.5), JointPolicy(), BudgetPolicy(0.3, threshold=-1.0)], ids=str)
def test_sampled_equals_the_slow_loop_in_any_company(pair: CoLLM, policy: Policy) -> None:
    prompts = prompts_of(2, 8)
    drawn = [SamplingParams(max_tokens=25, temperature=0.8, top_p=0.95, seed=i) for i in range(8)]
    wanted = [slow(pair, prompt, policy, params) for prompt, params in zip(prompts, drawn, strict=True)]
    for size in (1, 8):
        done = pair.generate(prompts, drawn, policy=policy, max_batch=size)
        check(done, wanted)


@pytest.fixture(scope="module")
def several_ends() -> CoLLM:
    """Models that end a text with any of three tokens."""
    tokenizers, made = two_tokenizers(), []
    for seed, tokenizer in enumerate(tokenizers, start=1):
        model = writing_model(tokenizer, seed, ends=1.5)
        ends = [tokenizer.eos_token_id, *(tokenizer.convert_tokens_to_ids(sign) for sign in "Q!")]
        model.lm_head.bias.data[ends] = 1.5
        model.generation_config.eos_token_id = ends
        made.append(model)
    return CoLLM(made[0], [made[1]], random_head(32, 1), tokenizers[0], tokenizers=[tokenizers[1]])


@pytest.mark.slow
@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_reported_logprobs_are_those_of_the_segments(several_ends: CoLLM, top_p: float) -> None:
    """Of every text in the tokens that its authors' tokenizers cut it into, as training scores it."""
    alignment, found, by_end = several_ends.alignment, 0, Counter[int]()
    assert alignment is not None
    assert [len(one.eos_ids) for one in alignment.tokenizers] == [3, 3]
    prompts = prompts_of(13, 40)
    params = SamplingParams(max_tokens=40, temperature=1.0, top_p=top_p, seed=3)
    drawn = [replace(params, seed=3 + i) for i in range(len(prompts))]
    done = several_ends.generate(prompts, params, policy=JointPolicy())
    check(done, [slow(several_ends, *each) for each in zip(prompts, [JointPolicy()] * 40, drawn, strict=True)])
    members = several_ends.members
    for prompt, one in zip(prompts, done, strict=True):
        spelled = alignment.tokenizers[0].spell(one.token_ids[:-1])
        if one.finish_reason != "eos" or not spelled:
            continue
        ids = [several_ends.template.encode_prompt(several_ends.tokenizer, prompt)]
        examples = aligned_example(alignment, [*ids, *several_ends.assistant_prompts(prompt)], spelled.decode())
        if list(examples[0].token_ids[len(ids[0]) : -1]) != one.token_ids[:-1]:
            continue
        read = [read_scores(member, examples.read_by(author))["logprob"] for author, member in enumerate(members)]
        places = [at for at, row in enumerate(examples[0].opens[len(ids[0]) :]) if row >= 0]
        law = [read[one.authors[at]][n].item() for n, at in enumerate(places)]
        assert sum(one.logprobs) == pytest.approx(sum(law), abs=1e-3)
        found += 1
        by_end[one.token_ids[-1]] += 1
    assert found >= 5
    assert len(by_end) > 1


@pytest.mark.slow
def test_one_tokenizer_twice_that_never_defers_is_plain_generation() -> None:
    """Wherever the model writes the tokens that its tokenizer cuts the text into."""
    tokenizer = two_tokenizers()[0]
    base, same = writing_model(tokenizer, 1), 0
    text = TextTokenizer(tokenizer, eos_ids=[tokenizer.eos_token_id])
    head = random_head(32, 1)
    runners = ModelRunner(LanguageModel(base, name="base")), ModelRunner(LanguageModel(base, name="assistant"))
    grammars = Grammars(tokenizer, len(tokenizer), frozenset({tokenizer.eos_token_id}))
    engine = Engine(
        runners,
        head,
        tokenizer,
        grammars=grammars,
        alignment=Alignment([text, text]),
    )
    for prompt in prompts_of(3, 12):
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        engine.add(Request(ids, SamplingParams(max_tokens=20), ThresholdPolicy(1.0), [ids]))
        done = [one.completion for _ in range(100) if engine.has_work for one in engine.step() if one.completion]
        prompt_ids = torch.tensor([ids])
        alone = base.generate(
            prompt_ids, attention_mask=torch.ones_like(prompt_ids), max_new_tokens=20, do_sample=False
        )[0, len(ids) :].tolist()
        written = [token for token in alone if token != tokenizer.eos_token_id]
        encoded = text.encode_after(ids, tokenizer.decode(written))
        if encoded is not None and encoded.ids == written:
            same += 1
            assert done[0].token_ids == alone
    assert same >= 3


@pytest.mark.slow
def test_a_stream_is_the_completion_and_names_its_authors(pair: CoLLM) -> None:
    for prompt in prompts_of(4, 4):
        params = SamplingParams(max_tokens=20, logprobs=2)
        (whole,) = pair.generate(prompt, params, threshold=0.4)
        steps = list(pair.stream(prompt, params, threshold=0.4))
        assert [step.token_id for step in steps] == whole.token_ids
        assert "".join(step.text for step in steps) == whole.text
        assert [step.author for step in steps] == whole.authors
        assert all(len(step.top_logprobs) == (2 if step.author == 0 else 1) for step in steps)
        spelled = pair.tokenizer.decode(whole.token_ids, skip_special_tokens=True)
        assert whole.text == spelled


@pytest.mark.slow
def test_stop_strings_cut_the_text_wherever_they_stand(pair: CoLLM) -> None:
    (whole,) = pair.generate("the capital", SamplingParams(max_tokens=40), threshold=0.4)
    assert {0, 1} <= set(whole.authors)
    for at in range(3, len(whole.text) - 4, 5):
        stop = whole.text[at : at + 3]
        (cut,) = pair.generate("the capital", SamplingParams(max_tokens=40, stop=stop), threshold=0.4)
        assert cut.finish_reason == "stop"
        assert cut.text == whole.text[: whole.text.index(stop)]


@pytest.mark.slow
@pytest.mark.parametrize("threshold", [1.0, -1.0])
def test_either_author_ends_a_text_and_no_text_is_shorter_than_allowed(threshold: float) -> None:
    base, assistant = two_tokenizers()
    models = writing_model(base, 5, ends=14.0), writing_model(assistant, 6, ends=14.0)
    pair = CoLLM(models[0], [models[1]], random_head(32, 1), base, tokenizers=[assistant])
    done = pair.generate(prompts_of(5, 6), SamplingParams(max_tokens=30), threshold=threshold)
    assert {one.finish_reason for one in done} == {"eos"}
    assert all(one.token_ids[-1] == base.eos_token_id for one in done)
    assert {one.authors[-1] for one in done} == {0 if threshold == 1.0 else 1}
    longer = pair.generate(prompts_of(5, 6), SamplingParams(max_tokens=30, min_tokens=8), threshold=threshold)
    assert all(len(one.token_ids) >= 8 for one in longer)
    assert any(len(one.token_ids) < 8 for one in done)
    endless = pair.generate(prompts_of(5, 6), SamplingParams(max_tokens=30, ignore_eos=True), threshold=threshold)
    assert {(one.finish_reason, len(one.token_ids)) for one in endless} == {("length", 30)}


@pytest.mark.slow
def test_requests_that_do_not_fit_the_cache_wait_and_say_the_same(
    pair: CoLLM, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = prompts_of(6, 6)
    drawn = [SamplingParams(max_tokens=60, temperature=0.9 * (i % 2), seed=i if i % 2 else None) for i in range(6)]
    wanted = [(one.token_ids, one.authors) for one in pair.generate(prompts, drawn, threshold=0.5)]
    small = CoLLM(pair.base, pair.assistants, pair.head, pair.tokenizer, tokenizers=pair.author_tokenizers[1:])
    for runner in small.runners:
        assert isinstance(runner, ModelRunner)
        runner.set_capacity(640)
    with caplog.at_level(logging.DEBUG, "collm.engine.engine"):
        done = small.generate(prompts, drawn, threshold=0.5)
    assert [(one.token_ids, one.authors) for one in done] == wanted
    assert "was preempted because the KV caches are full" in caplog.text


@pytest.mark.slow
def test_three_authors_with_three_ways_to_write(pair: CoLLM) -> None:
    """A tool speaks the base's tokens; it is asked at boundaries, and has ended where it falls abstained."""
    base = two_tokenizers()[0]
    head = random_head(32, 2, seed=3)
    other = two_tokenizers()[1]
    three = CoLLM(pair.base, [pair.assistants[0], miles], head, base, tokenizers=[other, base])
    params = SamplingParams(max_tokens=40)
    done = three.generate(prompts_of(7, 6), params, threshold=0.3)
    assert {author for one in done for author in one.authors} == {0, 1, 2}
    written = {text for one in done for text, author in zip(one.token_texts, one.authors, strict=True) if author == 2}
    assert written
    assert all(text in " 12 miles" for text in written)
    alone = three.generate(prompts_of(7, 6), params, threshold=0.3, max_batch=1)
    assert [one.token_ids for one in alone] == [one.token_ids for one in done]


@pytest.mark.slow
def test_an_assistant_that_never_comes_to_a_boundary_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    base, assistant = two_tokenizers()
    endless = writing_model(assistant, 2)
    for token_id, spelled in enumerate(TextTokenizer(assistant).token_bytes):
        if spelled is None or not spelled.isalpha():
            endless.lm_head.bias.data[token_id] = -100.0
    pair = CoLLM(writing_model(base, 1), [endless], random_head(32, 1), base, tokenizers=[assistant])
    params = SamplingParams(max_tokens=200)
    (free,) = pair.generate("the capital", params, threshold=-1.0)
    monkeypatch.setattr("collm.engine.segments.MAX_SEGMENT_TOKENS", 4)
    (stopped,) = pair.generate("the capital", params, threshold=-1.0)
    longest = [max(map(len, one.text.split())) for one in (free, stopped)]
    assert longest[0] > 64
    assert longest[1] < longest[0], "the base goes on, and comes to boundaries"


def test_half_a_character_is_never_committed() -> None:
    """An assistant that writes bytes which make no character: the base writes in its place."""
    base, assistant = two_tokenizers()
    broken = writing_model(assistant, 2)
    for token_id, spelled in enumerate(TextTokenizer(assistant).token_bytes):
        if spelled == b"\xe2":
            broken.lm_head.bias.data[token_id] = 50.0
    pair = CoLLM(writing_model(base, 1), [broken], random_head(32, 1), base, tokenizers=[assistant])
    for one in pair.generate(prompts_of(8, 4), SamplingParams(max_tokens=12), threshold=0.3):
        assert "\N{REPLACEMENT CHARACTER}" not in one.text
        assert 0 in one.authors


def test_nan_in_an_assistant_fails_the_request_and_no_other(pair: CoLLM) -> None:
    base, assistant = two_tokenizers()
    poisoned = writing_model(assistant, 2, hidden_size=48)
    broken = CoLLM(pair.base, [poisoned], pair.head, base, tokenizers=[assistant])
    assert len(broken.runners) == 2
    poisoned.lm_head.weight.data[5] = float("nan")
    with pytest.raises(ModelFailure, match="assistant returned NaN"):
        broken.generate("the capital", SamplingParams(max_tokens=9), threshold=-1.0)
    (done,) = broken.generate("the capital", SamplingParams(max_tokens=9), threshold=1.0)
    assert len(done.token_ids) == 9


def test_every_slot_is_closed(pair: CoLLM) -> None:
    pair.generate(prompts_of(9, 5), SamplingParams(max_tokens=15), threshold=0.5)
    assert [runner.open_slots for runner in pair.runners if isinstance(runner, ModelRunner)] == [0, 0]


@pytest.mark.slow
def test_what_is_read_again_is_little(pair: CoLLM) -> None:
    """Reading is incremental: only segments that an author spelled in other tokens are read a second time."""
    before = [runner.usage.tokens_read for runner in pair.runners]
    done = pair.generate(prompts_of(10, 6), SamplingParams(max_tokens=40), threshold=0.5, max_batch=1)
    read = [runner.usage.tokens_read - b for runner, b in zip(pair.runners, before, strict=True)]
    tokens = sum(len(one.prompt_token_ids) + len(one.token_ids) for one in done)
    assert read[0] <= 2 * tokens
    assert read[1] <= 3 * tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "mixture"}, "compares tokens of several authors"),
        ({"policy": "product"}, "compares tokens of several authors"),
        ({"policy": "confidence"}, "compares tokens of several authors"),
        ({"params": SamplingParams(logit_bias={3: 1.0}), "threshold": 0.5}, "logit_bias needs one vocabulary"),
        ({"params": SamplingParams(allowed_token_ids=[3]), "threshold": 0.5}, "allowed_token_ids needs one vocabulary"),
    ],
)
def test_what_needs_one_vocabulary_is_refused(pair: CoLLM, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pair.generate("the", **options)


def test_candidates_of_other_tokens_stand_where_segments_begin(pair: CoLLM) -> None:
    (done,) = pair.generate("the capital", SamplingParams(max_tokens=20), threshold=0.5)
    found = pair.candidates("the capital", done.token_ids, 3)
    assert len(found) == len(done.token_ids)
    assert all(len(of_base) == 3 for of_base, _ in found)
    assert pair.alignment is not None
    spelled = [pair.alignment.tokenizers[0].token_bytes[token] or b"" for token in done.token_ids]
    boundaries = set(pair.alignment.boundaries(b"".join(spelled)))
    at = 0
    for piece, (_, of_assistant) in zip(spelled, found, strict=True):
        assert bool(of_assistant) == (at in boundaries)
        at += len(piece)


@pytest.mark.slow
def test_penalties_count_each_authors_own_tokens(pair: CoLLM) -> None:
    params = SamplingParams(max_tokens=40, frequency_penalty=2.0, presence_penalty=2.0)
    prompts = prompts_of(11, 6)
    assert pair.alignment is not None
    tokenizer = pair.alignment.tokenizers[1].tokenizer
    shares = []
    for drawn in (SamplingParams(max_tokens=40), params):
        texts = [one.text for one in pair.generate(prompts, drawn, threshold=-1.0)]
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        shares.append(sum(len(set(each)) for each in ids) / sum(map(len, ids)))
    assert shares[1] > shares[0] + 0.1


@torch.no_grad()
@pytest.mark.soak
def test_sampled_segments_follow_the_law() -> None:
    """The first segments, and those behind the commonest first one, against q of the authors, drawn evenly."""
    base, assistant = two_tokenizers()
    models = writing_model(base, 11, ends=-9.0), writing_model(assistant, 12, ends=-9.0)
    pair = CoLLM(models[0], [models[1]], DeferralHead(32, 1), base, tokenizers=[assistant])  # a head of zeros
    alignment, prompt, count = pair.alignment, "Sure, the capital", 1200
    assert alignment is not None
    for model in models:
        model.lm_head.bias.data *= 1.5
    params = SamplingParams(max_tokens=16, temperature=1.0, seed=1)
    texts = [one.text.encode() for one in pair.generate([prompt] * count, params, policy=JointPolicy(), max_batch=64)]
    ends = [alignment.boundaries(text)[1:-1] for text in texts]  # the last segment may be cut
    first = Counter(text[: at[0]] for text, at in zip(texts, ends, strict=True) if at)
    commonest, _ = first.most_common(1)[0]
    behind = Counter(
        text[at[0] : at[1]] for text, at in zip(texts, ends, strict=True) if len(at) > 1 and text[: at[0]] == commonest
    )
    for seen, before in ((first, b""), (behind, commonest)):
        total, stray = sum(seen.values()), 0.0
        q = {segment: _law(pair, prompt, before, segment) for segment in seen}
        assert sum(q.values()) <= 1 + 1e-3
        often = [segment for segment in seen if q[segment] * total >= 8]
        assert len(often) >= 4
        stray = sum((seen[one] - q[one] * total) ** 2 / (q[one] * total) for one in often)
        assert stray < len(often) + 4 * (2 * len(often)) ** 0.5, [(one, seen[one], q[one] * total) for one in often]


def _law(pair: CoLLM, prompt: str, before: bytes, segment: bytes) -> float:
    """Probability of a segment behind a text, from one pass of each model over both."""
    assert pair.alignment is not None
    prompts = [pair.tokenizer(prompt, add_special_tokens=False)["input_ids"], *pair.assistant_prompts(prompt)]
    examples = aligned_example(pair.alignment, prompts, (before + segment).decode())
    place = len(pair.alignment.boundaries(before)) - 1 if before else 0
    modules: Any = [pair.base, *pair.assistants]
    read = [
        read_scores(LanguageModel(one, name="one"), examples.read_by(k))["logprob"] for k, one in enumerate(modules)
    ]
    return sum(0.5 * logprobs[place].exp().item() for logprobs in read)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"temperature": 3.0, "top_p": 0.9}, {"temperature": 3.0, "top_k": 9}], ids=str)
def test_who_writes_makes_no_difference_where_both_are_one_model(options: dict[str, Any]) -> None:
    """With one tokenizer twice, aligned as if they differed: any rule writes what the model alone does."""
    tokenizer = two_tokenizers()[0]
    twice = Alignment([TextTokenizer(tokenizer, eos_ids=[tokenizer.eos_token_id])] * 2)
    model = writing_model(tokenizer, 1, ends=0.5)
    texts = []
    for policy in (SingleAuthorPolicy(0), SingleAuthorPolicy(1), ThresholdPolicy(0.5)):
        pair = CoLLM(model, [model], random_head(32, 1), tokenizer)
        pair.alignment = pair._in_memory.alignment = twice
        params = SamplingParams(max_tokens=25, seed=3 if options else None, **options)
        done = pair.generate(prompts_of(12, 8), params, policy=policy)
        texts.append([one.text for one in done])
        assert {author for one in done for author in one.authors} >= (
            {policy.writer} if isinstance(policy, SingleAuthorPolicy) else {0, 1}
        )
    for either in texts[1:]:
        for one, other in zip(texts[0], either, strict=True):
            assert one == other
