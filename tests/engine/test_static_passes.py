"""Passes of fixed shapes over pages: on a CPU the kernels run in Triton's interpreter, and nothing is captured."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MistralConfig, PreTrainedModel

from collm.engine.runner import ModelRunner
from collm.engine.static_passes import MOST_TOKENS, bucket_of, mask_kind
from collm.models.language_model import LanguageModel
from tests.architectures import ARCHITECTURES, EXACT
from tests.engine.test_runner import plain_logits, play_schedule
from tests.tiny_models import DEVICES, make_model, tiny_config

Model = Callable[..., PreTrainedModel]


def static_runner(model: PreTrainedModel, name: str = "m") -> ModelRunner:
    return ModelRunner(LanguageModel(model, name=name), static=True, cache_memory="4MB")


def obvious_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    slots: Tensor,
    positions: Tensor,
    mask_kind: Tensor,
    **options: Any,
) -> Tensor:
    """One query at a time over the keys that it sees."""
    window, chunk = mask_kind.tolist()
    width, shared = len(query) // len(slots), query.shape[1] // key.shape[2]
    attended = torch.zeros(*query.shape[:2], value.shape[-1], device=query.device)
    for token, position in enumerate(positions.tolist()):
        if position < 0:
            continue
        first = max(0, position - window + 1) if window else position // chunk * chunk if chunk else 0
        pages = table[slots[token // width]].long()
        keys, values = (
            each[pages].flatten(0, 1)[first : position + 1].float().repeat_interleave(shared, 1)
            for each in (key, value)
        )
        scores = torch.einsum("hd,lhd->hl", query[token].float(), keys) * options["scale"]
        if options["softcap"]:
            scores = torch.tanh(scores / options["softcap"]) * options["softcap"]
        if options["sinks"] is not None:
            scores = torch.cat([scores, options["sinks"][:, None].float()], dim=1)
        attended[token] = torch.einsum("hl,lhd->hd", scores.softmax(-1)[:, : len(keys)], values)
    return attended.to(query.dtype)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("width", "heads", "kv_heads", "dim", "dim_v", "window", "chunk", "softcap", "sinks"),
    [
        pytest.param(1, 4, 2, 16, 16, 0, 0, None, False, id="one query"),
        pytest.param(4, 4, 4, 24, 40, 5, 0, None, False, id="sliding, odd dimensions"),
        pytest.param(2, 6, 2, 32, 16, 0, 8, 3.0, False, id="chunks, softcap"),
        pytest.param(4, 8, 1, 16, 16, 0, 0, None, True, id="sinks"),
        pytest.param(8, 9, 1, 8, 8, 20, 0, None, True, id="several tiles"),
    ],
)
def test_the_kernel_equals_attention_one_query_at_a_time(
    width: int,
    heads: int,
    kv_heads: int,
    dim: int,
    dim_v: int,
    window: int,
    chunk: int,
    softcap: float | None,
    sinks: bool,
    dtype: torch.dtype,
    device: str,
) -> None:
    from collm.engine.paged_attention import paged_attention

    generator = torch.Generator().manual_seed(width)
    key, value = (torch.randn(20, 16, kv_heads, d, generator=generator).to(dtype) for d in (dim, dim_v))
    table = torch.randperm(19, generator=generator)[:18].add(1).reshape(3, 6).int()
    slots = torch.tensor([2, 0, 1])
    positions = torch.full((3, width), -1)
    for row, (start, size) in enumerate([(50, width), (0, max(1, width - 1)), (80, 1)]):
        positions[row, :size] = torch.arange(start, start + size)
    query = torch.randn(heads, 3 * width, dim, generator=generator).to(dtype).transpose(0, 1)
    given = [query, key, value, table, slots, positions.flatten()]
    options: dict[str, Any] = {"mask_kind": torch.tensor([window, chunk], dtype=torch.int32)}
    options |= {"sinks": torch.randn(heads, generator=generator) if sinks else None}
    expected = obvious_attention(
        *(each.float() for each in given[:3]), *given[3:], **options, scale=0.5, softcap=softcap
    )
    moved = {name: None if each is None else each.to(device) for name, each in options.items()}
    came = paged_attention(*(each.to(device) for each in given), **moved, scale=0.5, softcap=softcap)
    assert came.dtype == dtype
    torch.testing.assert_close(came.cpu().float(), expected, atol=2e-5 if dtype == torch.float32 else 4e-3, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_static_passes_equal_the_plain_forward_on_every_architecture(
    name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cpu":  # the interpreter takes its time
        monkeypatch.setattr("collm.engine.paged_attention.paged_attention", obvious_attention)
    _check_static(name, device, steps=15)


@pytest.mark.soak
def test_static_passes_with_the_kernels_equal_the_plain_forward() -> None:
    _check_static("gemma2", "cpu", steps=3)


def _check_static(name: str, device: str, steps: int) -> None:
    model = make_model(EXACT[name](), seed=0, device=device)
    runner = static_runner(model, name)
    assert runner._static is not None
    before = model.config._attn_implementation
    play_schedule(model, runner, seed=3, steps=steps)
    assert runner._static._passes
    assert model.config._attn_implementation == before


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_passes_over_pages_equal_the_plain_forward(
    name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("collm.engine.runner.can_run_static", lambda model: False)
    model = make_model(EXACT[name](), seed=0, device=device)
    runner = static_runner(model, name)
    assert runner._static is None
    play_schedule(model, runner, seed=4, steps=20)


def test_a_mask_that_the_kernel_does_not_know_is_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("collm.engine.static_passes.mask_kind", _unknown)
    model = make_model(tiny_config(), seed=0)
    with caplog.at_level(logging.WARNING):
        runner = static_runner(model, "the expert")
        play_schedule(model, runner, seed=5, steps=10)
    assert [record.getMessage() for record in caplog.records] == [
        "the expert runs without CUDA graphs, which is slower: the model's attention mask is new"
    ]


def _unknown(*args: Any) -> tuple[int, int]:
    from collm.errors import UnsupportedModel

    raise UnsupportedModel("the model's attention mask is new")


def test_kinds_of_masks() -> None:
    from transformers import masking_utils as masks

    device = torch.device("cpu")
    zero = torch.zeros(1, dtype=torch.long)
    assert mask_kind(masks.causal_mask_function, None, device) == (0, 0)
    assert mask_kind(masks.sliding_window_causal_mask_function(7), 7, device) == (7, 0)
    assert mask_kind(masks.chunked_causal_mask_function(8192, zero), 8192, device) == (0, 8192)
    for function, size in [
        (masks.bidirectional_mask_function, None),
        (masks.sliding_window_causal_mask_function(7), None),
        (masks.sliding_window_causal_mask_function(7), 8),
        (masks.or_masks(masks.causal_mask_function, lambda b, h, q, k: k == 3), None),
        (masks.and_masks(masks.causal_mask_function, lambda b, h, q, k: k > q - 100_000), None),
    ]:
        with pytest.raises(Exception, match="neither causal, nor a sliding window"):
            mask_kind(function, size, device)


def test_which_shape_a_pass_takes() -> None:
    assert bucket_of([1]) == (1, 1)
    assert bucket_of([1, 3, 2]) == (4, 4)
    assert bucket_of([17]) is None, "a prompt"
    assert bucket_of([1] * 65) is None
    assert bucket_of([8] + [1] * 63) is None, f"more than {MOST_TOKENS} tokens, most of them padding"


@pytest.mark.slow
def test_a_window_smaller_than_the_text_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("collm.engine.paged_attention.paged_attention", obvious_attention)
    config = MistralConfig(**{**tiny_config().to_dict(), "sliding_window": 5, "model_type": "mistral"})
    model = make_model(config, seed=2)
    runner = static_runner(model)
    slot, text = runner.open(), list(range(2, 16))
    runner.extend({slot: text[:13]})
    torch.testing.assert_close(
        runner.extend({slot: text[13:]}).logits[0], plain_logits(model, text), atol=2e-4, rtol=1e-3
    )


@pytest.mark.slow
def test_an_engine_makes_the_passes_of_its_batch_ahead(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("collm.engine.paged_attention.paged_attention", obvious_attention)
    runner = static_runner(make_model(tiny_config(), seed=0))
    assert runner._static is not None
    with caplog.at_level(logging.INFO):
        runner.prepare(3)
        runner.prepare(2)
    assert set(runner._static._passes) == {(width, batch) for width in (1, 2, 4, 8, 16) for batch in (1, 2, 4)}
    assert [record.getMessage()[:20] for record in caplog.records] == ["m: 15 CUDA graphs in"]
    logits = runner._static._passes[1, 1].logits
    assert not logits.requires_grad
