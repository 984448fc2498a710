"""The runner against a forward pass without a cache, on random schedules of extends, rollbacks, joins and leaves."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma3TextConfig, LlamaConfig, PreTrainedModel

from collm.engine.runner import ModelRunner
from collm.errors import RequestError, UnsupportedModel
from collm.models.language_model import LanguageModel
from tests.architectures import ARCHITECTURES, COMMON, EXACT, REFUSED, VOCAB_SIZE
from tests.tiny_models import DEVICES, make_model, tiny_config

Model = Callable[..., PreTrainedModel]


def plain_logits(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([token_ids], device=model.device), use_cache=False).logits[0, -1]


def plain_rows(model: PreTrainedModel, texts: list[list[int]]) -> torch.Tensor:
    """`plain_logits` of each text; what stands behind a text changes nothing in it."""
    rows = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text)] = torch.tensor(text)
    with torch.no_grad():
        logits = model(rows.to(model.device), use_cache=False).logits
    return logits[torch.arange(len(texts)), torch.tensor([len(text) - 1 for text in texts])]


def play_schedule(model: PreTrainedModel, runner: ModelRunner, seed: int, steps: int, atol: float = 2e-4) -> int:
    """Random extends (one token or several), rollbacks, joins and leaves; every reading is compared."""
    rng, texts, compared = random.Random(seed), {}, 0
    for _ in range(steps):
        if len(texts) < 4 and (not texts or rng.random() < 0.5):
            texts[runner.open()] = []
        if len(texts) > 1 and rng.random() < 0.1:
            slot = rng.choice(list(texts))
            runner.close(slot)
            del texts[slot]
        unseen = {}
        for slot, text in texts.items():
            if text and rng.random() < 0.3:
                del text[rng.randrange(len(text)) + 1 :]
                runner.rollback(slot, len(text))
            if not text or rng.random() < 0.7:
                unseen[slot] = [rng.randrange(VOCAB_SIZE) for _ in range(rng.choice([1, 1, 2, 7]))]
        if not unseen:
            continue
        shuffled = dict(rng.sample(list(unseen.items()), len(unseen)))
        logits = runner.extend(shuffled).logits
        for slot, tokens in shuffled.items():
            texts[slot] += tokens
            assert runner.length(slot) == len(texts[slot])
        expected = plain_rows(model, [texts[slot] for slot in shuffled])
        torch.testing.assert_close(logits, expected, atol=atol, rtol=1e-3)
        compared += len(expected)
    return compared


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_equals_its_cache_free_forward(name: str, device: str) -> None:
    model = make_model(EXACT[name](), seed=0, device=device)
    runner = ModelRunner(LanguageModel(model, name=name))
    before = model.config._attn_implementation
    assert play_schedule(model, runner, seed=1, steps=30) > 30
    assert model.config._attn_implementation == before


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), window=st.sampled_from([None, 5]), budget=st.sampled_from([1, 3, 4096]))
def test_random_schedules_and_pass_budgets(seed: int, window: int | None, budget: int) -> None:
    from transformers import MistralConfig

    config = MistralConfig(**{**tiny_config().to_dict(), "sliding_window": window, "model_type": "mistral"})
    model = make_model(config, seed=2)
    play_schedule(model, ModelRunner(LanguageModel(model, name="m"), max_pass_tokens=budget), seed, steps=15)


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_a_model_whose_cache_cannot_be_driven_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedModel, match="cannot run on KV slots"):
        ModelRunner(LanguageModel(make_model(REFUSED[name](), seed=0), name=name))


def test_hidden_states_are_what_enters_the_output_layer(tiny_model: Model) -> None:
    model = tiny_model(3)
    runner = ModelRunner(LanguageModel(model, name="m"))
    slots = [runner.open(), runner.open()]
    reading = runner.extend({slots[1]: [5, 6], slots[0]: [7]})
    assert reading.hidden is not None
    with torch.no_grad():
        assert torch.allclose(model.lm_head(reading.hidden), reading.logits, atol=1e-6)


def test_counts_are_forward_passes_and_tokens(tiny_model: Model) -> None:
    runner = ModelRunner(LanguageModel(tiny_model(0), name="m"), max_pass_tokens=4)
    first, second = runner.open(), runner.open()
    runner.extend({first: [1, 2, 3], second: [4, 5, 6]})
    assert (runner.usage.forward_passes, runner.usage.tokens_read) == (2, 6)


def test_slots_are_reused_lowest_first(tiny_model: Model) -> None:
    runner = ModelRunner(LanguageModel(tiny_model(0), name="m"))
    slots = [runner.open() for _ in range(3)]
    runner.close(slots[1])
    assert runner.open() == slots[1]
    assert runner.open_slots == 3


def test_padded_vocabulary_rows_are_cut(tiny_model: Model) -> None:
    runner = ModelRunner(LanguageModel(tiny_model(0), name="m", vocab_size=90))
    assert runner.extend({runner.open(): [1]}).logits.shape == (1, 90)


def test_a_sequence_beyond_the_context_is_refused_before_reading(tiny_model: Model) -> None:
    runner = ModelRunner(LanguageModel(tiny_model(0, max_position_embeddings=8), name="m"))
    slot = runner.open()
    with pytest.raises(RequestError, match="at most 8 tokens, got a sequence of 9"):
        runner.extend({slot: list(range(9))})
    assert runner.length(slot) == 0


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
LONG = {**DYNAMIC, "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
YARN = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10_000.0, "original_max_position_embeddings": 64}
PLAIN = {"rope_type": "default", "rope_theta": 10_000.0}


@pytest.mark.parametrize(
    ("ropes", "length"),
    [
        ((PLAIN, PLAIN), 256),
        ((DYNAMIC, PLAIN), 256),
        ((PLAIN, {**DYNAMIC, "original_max_position_embeddings": 48}), 48),
        (({**LONG, "original_max_position_embeddings": 64}, {**DYNAMIC, "original_max_position_embeddings": 96}), 64),
        ((YARN, {**LONG, "original_max_position_embeddings": 32}), 32),
        ((YARN, YARN), 256),
    ],
)
def test_a_rope_that_depends_on_the_length_limits_it(ropes: tuple[dict[str, Any], ...], length: int) -> None:
    nested = dict(zip(("full_attention", "sliding_attention"), ropes, strict=True))
    gemma = Gemma3TextConfig(**COMMON, head_dim=8, sliding_window=4, rope_parameters=nested)
    assert LanguageModel(make_model(gemma, 0), name="m").max_length == length
    for rope in ropes:
        llama = LlamaConfig(**COMMON, head_dim=8, rope_parameters=rope)
        original = rope.get("original_max_position_embeddings") if rope["rope_type"] != "yarn" else None
        assert LanguageModel(make_model(llama, 0), name="m").max_length == (original or 256)


def test_nan_stays_in_its_row_and_a_wiped_slot_can_be_used_again(tiny_model: Model) -> None:
    model = tiny_model(0)
    runner = ModelRunner(LanguageModel(model, name="the expert"))
    good, bad = runner.open(), runner.open()
    runner.extend({good: [5, 6]})
    row = model.get_input_embeddings().weight.data[50].clone()
    model.get_input_embeddings().weight.data[50] = torch.nan
    logits = runner.extend({good: [7], bad: [50]}).logits
    torch.testing.assert_close(logits[0], plain_logits(model, [5, 6, 7]), atol=1e-4, rtol=1e-3)
    assert logits[1].isnan().all()
    runner.close(bad, wipe=True)
    model.get_input_embeddings().weight.data[50] = row
    assert runner.open() == bad
    logits = runner.extend({bad: [50, 3], good: [8]}).logits
    torch.testing.assert_close(logits[0], plain_logits(model, [50, 3]), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(logits[1], plain_logits(model, [5, 6, 7, 8]), atol=1e-4, rtol=1e-3)


def test_whatever_the_model_raises_slots_are_as_before(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(0)
    runner = ModelRunner(LanguageModel(model, name="m"), max_pass_tokens=2)
    slot = runner.open()
    runner.extend({slot: [5, 6]})
    plain, calls = runner.model.hidden_states, []

    def second_pass_fails(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no memory")
        return plain(*args, **kwargs)

    monkeypatch.setattr(runner.model, "hidden_states", second_pass_fails)
    with pytest.raises(RuntimeError, match="no memory"):
        runner.extend({slot: [7, 8, 9]})
    assert runner.length(slot) == 2
    logits = runner.extend({slot: [7, 8, 9]}).logits
    torch.testing.assert_close(logits[0], plain_logits(model, [5, 6, 7, 8, 9]), atol=1e-4, rtol=1e-3)


def test_rows_asked_for_are_those_of_the_last_tokens_across_passes(tiny_model: Model) -> None:
    model = tiny_model(0)
    runner = ModelRunner(LanguageModel(model, name="m"), max_pass_tokens=3)
    first, second = runner.open(), runner.open()
    logits = runner.extend({second: [5, 6, 7, 8, 9], first: [3, 4]}, {second: 4, first: 1}).logits
    texts = [[5, 6], [5, 6, 7], [5, 6, 7, 8], [5, 6, 7, 8, 9], [3, 4]]
    torch.testing.assert_close(logits, torch.stack([plain_logits(model, t) for t in texts]), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("live", [True, False])
def test_a_prefix_that_some_slot_holds_is_not_read_again(tiny_model: Model, live: bool) -> None:
    model = tiny_model(0)
    runner = ModelRunner(LanguageModel(model, name="m"))
    prompt = [2 + i for i in range(30)]
    first = runner.open(prompt)
    runner.extend({first: prompt})
    if not live:
        runner.close(first)
    second = runner.open([*prompt[:25], 90, 91])
    assert (second == first) is not live
    assert runner.length(second) == 25
    read = runner.usage.tokens_read
    logits = runner.extend({second: [90, 91]}).logits
    assert runner.usage.tokens_read == read + 2
    torch.testing.assert_close(logits[0], plain_logits(model, [*prompt[:25], 90, 91]), atol=1e-4, rtol=1e-3)
    if live:  # the slot it was copied from goes on undisturbed
        logits = runner.extend({first: [92]}).logits
        torch.testing.assert_close(logits[0], plain_logits(model, [*prompt, 92]), atol=1e-4, rtol=1e-3)


def test_the_last_token_is_always_left_to_read_and_forgetting_drops_prefixes(tiny_model: Model) -> None:
    runner = ModelRunner(LanguageModel(tiny_model(0), name="m"))
    prompt = [2 + i for i in range(30)]
    runner.extend({(slot := runner.open(prompt)): prompt})
    runner.close(slot)
    again = runner.open(prompt)
    assert runner.length(again) == 29
    runner.close(again)
    runner.extend({runner.open([1]): [1], runner.open([2]): [2]})
    runner.forget()
    assert runner.cache_bytes > 0, "slots are open"
    for slot in (0, 1):
        runner.close(slot)
    runner.forget()
    assert runner.cache_bytes == 0, "the memory went with the last slot"
    assert runner.length(runner.open(prompt)) == 0
