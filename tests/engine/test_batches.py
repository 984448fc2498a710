"""What sequences share and what they must not: prefixes, slots, waiting, and each other's failures."""

from __future__ import annotations

import mmap
import random
import re
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from collm import CoLLM, SamplingParams
from collm.core.combinations import MixturePolicy
from collm.core.policies import Policy, SingleAuthorPolicy, StepView, ThresholdPolicy
from collm.engine import planner as planner_module
from collm.engine.engine import Engine
from collm.engine.kv_cache import MOST_SLOTS
from collm.engine.request import Request
from collm.engine.runner import ModelRunner
from collm.engine.sequence import Sequence
from collm.errors import CacheFull, CollmError, ConfigError, ModelFailure, PolicyFailure, RequestError
from collm.models.loading import ModelSpec
from tests.architectures import VOCAB_SIZE
from tests.engine.test_engine import prompts_of, random_head

Model = Callable[..., PreTrainedModel]
PARAMS = SamplingParams(max_tokens=12)
POISON = 94


@pytest.fixture
def pair(tiny_model: Model, tokenizer: PreTrainedTokenizerFast) -> CoLLM:
    base = tiny_model(0, eos_token_id=None)
    base.get_output_embeddings().weight.data[POISON] = 0  # never drafted, so that no assistant reads it
    return CoLLM(base, [tiny_model(1, hidden_size=48)], random_head(32, 1), tokenizer)


def run(engine: Engine) -> tuple[dict[int, list[int]], dict[int, CollmError]]:
    """Tokens and failures of all requests, by number."""
    came: dict[int, list[int]] = {}
    failures: dict[int, CollmError] = {}
    while engine.has_work:
        for output in engine.step():
            if output.failure is not None:
                failures[output.number] = output.failure
            else:
                assert output.step is not None
                came.setdefault(output.number, []).append(output.step.token_id)
    return came, failures


@pytest.mark.slow
@pytest.mark.parametrize("policy", [ThresholdPolicy(0.5), MixturePolicy()])
@pytest.mark.parametrize("author", [0, 1])
def test_nan_in_one_sequence_harms_no_other(pair: CoLLM, author: int, policy: Policy) -> None:
    """The poisoned token is read by one author in one sequence only, at once or later in its prompt's company."""
    prompts = [[5, 6], [7, POISON, 8], [9, 10, 11], [12]]
    policy = SingleAuthorPolicy(author) if policy == ThresholdPolicy(0.5) else policy
    good = [c.token_ids for c in pair.generate([prompts[i] for i in (0, 2, 3)], PARAMS, policy=policy)]
    assert not any(POISON in token_ids for token_ids in good)
    model: Any = [pair.base, *pair.assistants][author]
    model.get_input_embeddings().weight.data[POISON] = torch.nan
    engine = pair.engine(max_batch=4)
    for prompt in prompts:
        engine.add(Request(prompt, PARAMS, policy))
    came, failures = run(engine)
    assert [came[i] for i in (0, 2, 3)] == good
    assert list(failures) == [1]
    assert isinstance(failures[1], ModelFailure)
    assert f"{['base', 'assistant'][author]} returned NaN logits after 3 tokens" in str(failures[1])
    assert [a.open_slots for a in pair.runners] == [0, 0]
    for runner in pair.runners:
        assert isinstance(runner, ModelRunner)
        held = [each[: len(runner._texts)] for layer in runner._cache.memory.values() for each in layer]
        assert all(bool(each.isfinite().all()) for each in held), "the slot was wiped"
    later = pair.generate([prompts[i] for i in (0, 2, 3)] * 2, PARAMS, policy=policy)  # in the wiped slot too
    assert [c.token_ids for c in later] == good * 2


@pytest.mark.slow
@pytest.mark.parametrize("author", [0, 1])
def test_a_model_that_raises_for_one_sequence_fails_that_one(
    pair: CoLLM, author: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = [[5, 6], [7, POISON, 8], [9, 10, 11]]
    policy = SingleAuthorPolicy(author)
    good = [c.token_ids for c in pair.generate(prompts[::2], PARAMS, policy=policy)]
    model = pair.runners[author].model
    plain = model.hidden_states

    def fails_on_poison(input_ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
        if (input_ids == POISON).any():
            raise RuntimeError("device-side assert")
        return plain(input_ids, **inputs)

    monkeypatch.setattr(model, "hidden_states", fails_on_poison)
    engine = pair.engine(max_batch=3)
    for prompt in prompts:
        engine.add(Request(prompt, PARAMS, policy))
    came, failures = run(engine)
    assert [came[0], came[2]] == good
    assert list(failures) == [1]
    assert "raised RuntimeError: device-side assert" in str(failures[1])
    assert "failed on 3 sequences" in caplog.text
    assert [a.open_slots for a in pair.runners] == [0, 0]


@dataclass(frozen=True)
class BadPolicy(Policy):
    """Breaks down at one position."""

    at: int

    def author(self, step: StepView) -> int:
        if step.position == self.at:
            raise KeyError("no such rule")
        return 0


@dataclass(frozen=True)
class Stranger(Policy):
    """Chooses an author that does not exist."""

    def author(self, step: StepView) -> int:
        return 7


@dataclass(frozen=True)
class BadMixture(MixturePolicy):
    """Makes NaN."""

    def combine(self, logprobs: Any, author_logprobs: torch.Tensor) -> torch.Tensor:
        return super().combine(logprobs, author_logprobs) * torch.nan


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "error", "message", "written"),
    [
        (BadPolicy(3), PolicyFailure, "BadPolicy.* raised KeyError: 'no such rule'", 3),
        (BadMixture(), PolicyFailure, "BadMixture.* returned NaN logits although", 0),
        (Stranger(), ConfigError, "chose author 7, expected 0 to 1", 0),
    ],
)
def test_a_policy_that_breaks_down_fails_its_own_sequence(
    pair: CoLLM, policy: Policy, error: type[CollmError], message: str, written: int
) -> None:
    good = [c.token_ids for c in pair.generate([[5, 6], [9]], PARAMS, threshold=0.5)]
    engine = pair.engine(max_batch=3)
    for prompt, each in (([5, 6], ThresholdPolicy(0.5)), ([7], policy), ([9], ThresholdPolicy(0.5))):
        engine.add(Request(prompt, PARAMS, each))
    came, failures = run(engine)
    assert [came[0], came[2]] == good
    assert len(came.get(1, [])) == written
    with pytest.raises(error, match=message):
        raise failures[1]
    with pytest.raises(error, match=message):
        pair.generate([[7]], PARAMS, policy=policy)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["product:weight=0", "product:weight=1", "contrastive", "mixture"])
def test_a_token_that_an_author_excludes_breaks_no_combination(
    pair: CoLLM, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models that mask a part of their vocabulary give logits of -inf."""
    for runner in pair.runners:
        plain = runner.model.logits
        cut = runner.name == "base"

        def masked(hidden: torch.Tensor, plain: Any = plain, cut: bool = cut) -> torch.Tensor:
            logits: torch.Tensor = plain(hidden)
            return logits.index_fill(-1, torch.tensor([3, 4] if cut else [5]), -torch.inf)

        monkeypatch.setattr(runner.model, "logits", masked)
    out = pair.generate([[7, 8], [9]], PARAMS, policy=policy)
    assert all(len(completion.token_ids) == 12 or completion.finish_reason == "eos" for completion in out)
    single = {"product:weight=0": 1, "product:weight=1": 0}.get(policy)
    if single is not None:
        alone = pair.generate([[7, 8], [9]], PARAMS, policy=SingleAuthorPolicy(single))
        assert [c.token_ids for c in out] == [c.token_ids for c in alone]


@pytest.mark.soak
def test_thousands_of_joins_leaves_and_cancellations_leave_nothing_behind(pair: CoLLM) -> None:
    rng = random.Random(0)
    engine = pair.engine(max_batch=8)
    live: list[int] = []
    sizes = []
    for round_ in range(3000):
        params = SamplingParams(max_tokens=rng.randint(1, 3))
        policy = rng.choice([ThresholdPolicy(0.5), ThresholdPolicy(0.2), MixturePolicy()])
        live.append(
            engine.add(Request([rng.randrange(2, VOCAB_SIZE) for _ in range(rng.randint(1, 4))], params, policy))
        )
        if rng.random() < 0.3:
            engine.cancel(live.pop(rng.randrange(len(live))))
        if len(live) > 8:
            finished = {output.number for output in engine.step() if output.completion is not None}
            live = [number for number in live if number not in finished]
        if round_ in (1500, 2999):
            for number in live:
                engine.cancel(number)
            live.clear()
            if round_ == 1500:
                tracemalloc.start()
            sizes.append(tracemalloc.get_traced_memory()[0])
            assert [author.open_slots for author in pair.runners] == [0, 0]
            assert not engine.has_work
    tracemalloc.stop()
    assert sizes[1] - sizes[0] < 200_000, "bytes kept after 1,500 requests"
    assert all(len(author._texts) == 8 for author in pair.runners)


@pytest.mark.slow
def test_completions_of_one_prompt_read_it_once(pair: CoLLM) -> None:
    prompt = list(range(2, 62))
    params = SamplingParams(max_tokens=1)
    for author, name in enumerate(("base", "assistant")):
        out = pair.generate([prompt] * 5, params, policy=SingleAuthorPolicy(author), lookahead=0)
        assert out.usage[name].tokens_read == len(prompt) + 4
        assert out.usage[name].forward_passes == 2
        assert len({tuple(c.token_ids) for c in out}) == 1
    sampled = SamplingParams(max_tokens=12, temperature=1.0, seed=1)
    together = pair.generate([prompt] * 5, sampled, threshold=0.5)
    one_by_one = [
        pair.generate([prompt], SamplingParams(max_tokens=12, temperature=1.0, seed=1 + i), threshold=0.5)[0]
        for i in range(5)
    ]
    assert [c.token_ids for c in together] == [c.token_ids for c in one_by_one]
    assert len({tuple(c.token_ids) for c in together}) > 1


@pytest.mark.slow
def test_the_next_turn_of_a_chat_reads_only_what_is_new(
    saved_model: Callable[..., Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    specs = [ModelSpec(str(saved_model(name, seed))) for seed, name in enumerate(("base", "assistant"))]
    model = CoLLM(specs[0], [specs[1]], random_head(32, 1), tokenizer)
    first = list(range(2, 42))
    answer = model.generate([first], PARAMS, threshold=0.5, lookahead=0)[0]
    second = first + answer.token_ids + [9, 8, 7]
    out = model.generate([second], PARAMS, threshold=0.5, lookahead=0)
    read = out.usage["base"].tokens_read
    assert read <= 4 + len(out[0].token_ids)  # the last token of the answer, the new ones, and its own
    fresh = CoLLM(specs[0], [specs[1]], random_head(32, 1), tokenizer)
    assert fresh.generate([second], PARAMS, threshold=0.5)[0].token_ids == out[0].token_ids


def test_a_model_trained_between_two_calls_is_read_afresh(pair: CoLLM) -> None:
    prompt = list(range(2, 42))
    pair.generate([prompt], PARAMS, threshold=1.0)
    with torch.no_grad():
        for parameter in pair.base.parameters():  # type: ignore[union-attr]
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    after = pair.generate([prompt], PARAMS, threshold=1.0)[0]
    fresh = CoLLM(pair.base, pair.assistants, pair.head, pair.tokenizer)
    assert after.token_ids == fresh.generate([prompt], PARAMS, threshold=1.0)[0].token_ids


@pytest.mark.slow
def test_sequences_wait_for_company_and_no_longer_than_allowed(pair: CoLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, params = prompts_of(3, 6), SamplingParams(max_tokens=30)
    alone = pair.generate(prompts, params, threshold=0.9, lookahead=0, max_wait=0)
    monkeypatch.setattr(planner_module, "wait_steps", lambda *rest: rest[-1])
    passes = [alone.usage["assistant"].forward_passes]
    for max_wait in (1, 3):
        engine = pair.engine(max_batch=6, lookahead=0, max_wait=max_wait)
        before = pair.runners[1].usage.forward_passes
        for prompt in prompts:
            engine.add(Request(prompt, params, ThresholdPolicy(0.9)))
        came: dict[int, list[int]] = {number: [] for number in range(6)}
        abstained = dict.fromkeys(came, 0)
        while engine.has_work:
            abstained = {number: steps + 1 for number, steps in abstained.items()}
            for output in engine.step():
                assert output.step is not None
                came[output.number].append(output.step.token_id)
                abstained[output.number] = 0
                if output.completion is not None:
                    del abstained[output.number]
            assert max(abstained.values(), default=0) <= max_wait
        assert list(came.values()) == [c.token_ids for c in alone]
        passes.append(pair.runners[1].usage.forward_passes - before)
    assert passes[0] > passes[1] > passes[2]


def test_one_sequence_never_waits(pair: CoLLM) -> None:
    engine = pair.engine(max_batch=4, lookahead=0)
    engine.add(Request([5, 6], PARAMS, ThresholdPolicy(-1.0)))
    while engine.has_work:
        assert len(engine.step()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lookahead": -1}, "lookahead is -1, expected at least 0"),
        ({"max_wait": -2}, "max_wait is -2, expected at least 0"),
        ({"policy": "contrastive:expert=3"}, "asks for author 3, expected 0 to 1"),
        ({"policy": "proxy"}, "asks for author 2, expected 0 to 1"),
        ({"policy": "single:writer=2"}, "asks for author 2, expected 0 to 1"),
    ],
)
def test_limits_and_authors_that_do_not_exist_are_refused(pair: CoLLM, options: Any, message: str) -> None:
    chosen = {} if "policy" in options else {"threshold": 0.5}
    with pytest.raises(ConfigError, match=message):
        pair.generate([[5]], PARAMS, **chosen, **options)


def small_cache(pair: CoLLM, positions: int) -> CoLLM:
    for runner in pair.runners:
        assert isinstance(runner, ModelRunner)
        runner.set_capacity(positions)
    return pair


@pytest.mark.slow
@pytest.mark.parametrize("lookahead", [0, None])
def test_requests_that_do_not_fit_the_cache_wait_and_say_the_same(
    pair: CoLLM, lookahead: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, params = prompts_of(3, 8), SamplingParams(max_tokens=75, temperature=0.5, seed=3)
    expected = [c.token_ids for c in pair.generate(prompts, params, max_batch=8, threshold=0.5)]
    paused, pause = [], Sequence.preempt
    monkeypatch.setattr(Sequence, "preempt", lambda sequence: (paused.append(sequence.number), pause(sequence)))
    small_cache(pair, 240)
    came = pair.generate(prompts, params, max_batch=8, threshold=0.5, lookahead=lookahead)
    assert [c.token_ids for c in came] == expected
    assert paused, "all fitted"
    assert [author.open_slots for author in pair.runners] == [0, 0]
    assert all(runner._cache.used <= 240 for runner in pair.runners)


def test_a_prompt_that_never_fits_the_cache_is_refused_with_the_numbers(pair: CoLLM) -> None:
    small_cache(pair, 48)
    with pytest.raises(RequestError, match="the prompt has 50 tokens, but the KV cache of base holds 48 tokens"):
        pair.generate([[5] * 50], PARAMS, threshold=0.5)
    (full,) = pair.generate([[5] * 40], SamplingParams(max_tokens=90), threshold=0.5)
    assert (len(full.token_ids), full.finish_reason) == (8, "length")


def test_closed_slots_give_their_memory_to_those_that_need_it(pair: CoLLM) -> None:
    small_cache(pair, 64)
    runner = pair.runners[0]
    first, second = runner.open([]), runner.open([])
    runner.extend({first: [5] * 30, second: [6] * 20})
    runner.close(second)
    runner.extend({first: [5] * 20})
    assert (runner.length(first), runner.length(second)) == (50, 0)
    with pytest.raises(CacheFull, match="holds 64 tokens, 16 too few for the running sequences"):
        runner.extend({first: [5] * 20})
    assert runner.length(first) == 50


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ("4 apples", "expected a size such as 4GiB"),
        ("0%", "expected a size"),
        (0, "expected a size"),
        ("500000GiB", "cache_memory is 500000GiB, but no device here has more than .*GiB; give less"),
    ],
)
def test_cache_memory_that_is_none(pair: CoLLM, memory: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CoLLM(pair.base, pair.assistants, pair.head, pair.tokenizer, cache_memory=memory)


def test_cache_memory_is_shared_so_that_all_models_hold_equally_much(pair: CoLLM) -> None:
    model = CoLLM(pair.base, pair.assistants, pair.head, pair.tokenizer, cache_memory="1MiB")
    capacities = [runner.capacity for runner in model.runners]
    per_position = [runner.bytes_per_position for runner in model.runners]
    assert len(set(per_position)) == 2
    assert capacities == [2**20 // sum(per_position) // 16 * 16] * 2
    with pytest.raises(ConfigError, match="the KV cache memory of base holds 1 tokens"):
        _ = CoLLM(pair.base, pair.assistants, pair.head, pair.tokenizer, cache_memory=sum(per_position)).runners


def test_memory_is_taken_as_it_is_written_and_given_back(pair: CoLLM) -> None:
    runner = pair.runners[0]
    runner.extend({(first := runner.open([])): [5]})
    keys = runner._cache.memory[0][0]
    before = _resident(keys)
    runner.extend({(slot := runner.open([])): [5] * 90})
    taken = _resident(keys) - before
    assert 90 * keys[0, :, 0].nbytes <= taken < 10 * 90 * runner.bytes_per_position < keys.nbytes
    runner.close(slot)
    runner.forget()
    assert _resident(keys) == before
    runner.close(first)


def test_a_system_that_promises_little_memory_serves_fewer_sequences_at_once(
    pair: CoLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserve, most = mmap.mmap, 2**22

    def limited(fileno: int, size: int, **options: Any) -> mmap.mmap:
        if size > most:
            raise OSError(12, "Cannot allocate memory")
        return reserve(fileno, size, **options)

    expected = [c.token_ids for c in pair.generate(prompts_of(3, 8), PARAMS, threshold=0.5)]
    monkeypatch.setattr("collm.engine.kv_cache.mmap.mmap", limited)
    limits = CoLLM(pair.base, pair.assistants, pair.head, pair.tokenizer)
    came = limits.generate(prompts_of(3, 8), PARAMS, threshold=0.5, max_batch=8)
    assert [c.token_ids for c in came] == expected
    assert all(runner.most_slots < MOST_SLOTS for runner in limits.runners if isinstance(runner, ModelRunner))
    most = 2**10
    with pytest.raises(ConfigError, match="cannot reserve addresses for a sequence"):
        _ = CoLLM(pair.base, pair.assistants, pair.head, pair.tokenizer).runners


def _resident(tensor: torch.Tensor) -> int:
    """Bytes in memory of the mapping that a tensor lies in, as Linux counts them."""
    for block in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        start, end = (int(part, 16) for part in block.split(" ")[0].split("-"))
        if start <= tensor.data_ptr() < end:
            found = re.search(r"Anonymous: +(\d+) kB", block)
            assert found is not None
            return int(found[1]) * 1024
    raise AssertionError("not mapped")


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_the_host_waits_for_each_author_once_in_a_step(
    pair: CoLLM, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many sequences there are, sampled or not, with log-probabilities or without."""
    waits: list[str] = []
    for name in ("tolist", "item", "__bool__", "__float__", "__int__", "cpu"):
        method = getattr(torch.Tensor, name)

        def waited(tensor: torch.Tensor, *args: Any, method: Any = method, name: str = name) -> Any:
            waits.append(name)
            return method(tensor, *args)

        monkeypatch.setattr(torch.Tensor, name, waited)
    engine = pair.engine(max_batch=6)
    for i, prompt in enumerate(prompts_of(4, 6)):
        top_p = 0.9 if i % 2 and temperature else 1.0
        params = SamplingParams(max_tokens=10, temperature=temperature, top_p=top_p, logprobs=i)
        engine.add(Request(prompt, params, ThresholdPolicy(0.5)))
    while engine.has_work:
        waits.clear()
        before = sum(runner.usage.forward_passes for runner in pair.runners)
        engine.step()
        passes = sum(runner.usage.forward_passes for runner in pair.runners) - before
        assert len(waits) <= passes, waits
