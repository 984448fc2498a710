"""One pass for several adapters of one model gives what a pass for each of them gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from collm import CoLLM, ModelSpec, SamplingParams
from collm.core.combinations import MixturePolicy
from collm.core.policies import ThresholdPolicy
from collm.engine.runner import ModelRunner
from collm.engine.shared_pass import SharedPass, shared_passes
from collm.models.loading import load_adapted
from collm.models.members import load_members
from tests.engine.test_engine import random_head
from tests.models.test_adapters import save_adapter

SavedModel = Callable[..., Path]
PROMPTS = ["w1 w2", "w6 w7 w3", "w4", "w9 w8 w7 w6 w5"]


@pytest.fixture
def specs(saved_model: SavedModel, tmp_path: Path) -> list[ModelSpec]:
    """A model alone, and with adapters of different layers, ranks and scales."""
    path = saved_model("model", 0)
    kinds: list[dict[str, Any]] = [
        {},
        {"r": 3, "lora_alpha": 12, "target_modules": ["q_proj", "k_proj", "gate_proj"]},
        {"target_modules": ["o_proj", "q_proj"], "use_rslora": True},
    ]
    adapters = [save_adapter(path, tmp_path / f"{seed}", seed, **kind) for seed, kind in enumerate(kinds)]
    return [ModelSpec(str(path)), *(ModelSpec(str(path), adapter=str(one)) for one in adapters)]


def runners(specs: list[ModelSpec], tokenizer: PreTrainedTokenizerFast) -> list[Any]:
    return [ModelRunner(one) for one in load_members(specs, tokenizer, vocab_size=len(tokenizer))]  # type: ignore[arg-type]


def test_rows_of_each_adapter_are_as_in_its_own_pass(
    specs: list[ModelSpec], tokenizer: PreTrainedTokenizerFast
) -> None:
    together, alone = (runners(specs, tokenizer) for _ in range(2))
    (shared,) = shared_passes(together)
    assert shared.runners == together
    slots = [[[one.open() for _ in range(2)] for one in each] for each in (together, alone)]
    generator = torch.Generator().manual_seed(0)
    for members in ([0, 1, 2, 3], [3, 1], [2, 3, 0], [1, 2, 3]):
        unread = []
        for _ in members:
            lengths = torch.randint(1, 6, (2,), generator=generator).tolist()
            unread.append([torch.randint(3, 90, (n,), generator=generator).tolist() for n in lengths])
        arguments = {}
        for each, tokens in zip(members, unread, strict=True):
            own = dict(zip(slots[0][each], tokens, strict=True))
            arguments[together[each]] = own, {slot: len(text) for slot, text in own.items()}
        found = shared.extend(arguments)
        for each, tokens, output in zip(members, unread, found, strict=True):
            own = dict(zip(slots[1][each], tokens, strict=True))
            expected = alone[each].extend(own, {slot: len(text) for slot, text in own.items()})
            torch.testing.assert_close(output.logits, expected.logits, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(output.hidden, expected.hidden, rtol=1e-4, atol=1e-5)
        assert [one.usage for one in together] == [one.usage for one in alone]


@pytest.mark.slow
@pytest.mark.parametrize("policy", [MixturePolicy(), ThresholdPolicy(0.5)])
def test_the_loop_writes_what_it_writes_without(
    policy: Any, specs: list[ModelSpec], tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    extend = SharedPass.extend
    monkeypatch.setattr(SharedPass, "extend", lambda self, unread: calls.append(len(unread)) or extend(self, unread))
    said = []
    for given in (specs, [specs[0], *map(load_adapted, specs[1:])]):  # modules share nothing
        model = CoLLM(given[0], given[1:], random_head(32, 3, scale=1.0), tokenizer)  # type: ignore[arg-type]
        out = model.generate(PROMPTS, SamplingParams(max_tokens=10), policy=policy, max_batch=4, max_wait=0)
        said.append([(one.token_ids, one.authors) for one in out])
        calls.append(0)
    assert said[0] == said[1]
    assert calls.index(0) >= 5  # passes for several adapters
    assert calls[-1] == 0
    assert len(calls) == calls.index(0) + 2


@pytest.mark.slow
def test_where_the_pass_fails_each_adapter_reads_alone(
    specs: list[ModelSpec],
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = CoLLM(specs[0], specs[1:], random_head(32, 3, scale=1.0), tokenizer)
    params = SamplingParams(max_tokens=4)
    expected = [one.token_ids for one in model.generate(PROMPTS, params, policy=MixturePolicy())]

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr("collm.engine.shared_pass._SharedLayout.attend", fail)
    assert [one.token_ids for one in model.generate(PROMPTS, params, policy=MixturePolicy())] == expected
    said = "3 adapters failed in one pass (RuntimeError('no memory')); retrying them one by one"
    assert caplog.text.count(said) == 1  # it is not tried again


def test_adapters_keep_their_weights_once(specs: list[ModelSpec], tokenizer: PreTrainedTokenizerFast) -> None:
    each = runners(specs, tokenizer)
    before = [one.model.module.state_dict() for one in each]
    texts = [{name: values.clone() for name, values in state.items()} for state in before]
    assert shared_passes(each)
    for one, old in zip(each, texts, strict=True):
        assert all(torch.equal(values, old[name]) for name, values in one.model.module.state_dict().items())
    layers = [one.model.inner.get_submodule("model.layers.0.self_attn.q_proj") for one in each[1:]]
    assert len({layer.lora_A["default"].weight.untyped_storage().data_ptr() for layer in layers}) == 1


@pytest.mark.parametrize("kind", [{"use_dora": True}, {"bias": "all"}, {"init_lora_weights": "olora"}])
@pytest.mark.slow
def test_an_adapter_that_is_more_than_low_rank_reads_alone(
    kind: dict[str, Any], specs: list[ModelSpec], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    other = replace(specs[0], adapter=str(save_adapter(Path(specs[0].path), tmp_path / "other", 5, **kind)))
    each = runners([*specs, other], tokenizer)
    (shared,) = shared_passes(each)
    assert shared.runners == each[:4]
    alone = runners([other], tokenizer)[0]
    slots = alone.open(), each[4].open()
    assert torch.equal(alone.extend({slots[0]: [5, 6]}).logits, each[4].extend({slots[1]: [5, 6]}).logits)
