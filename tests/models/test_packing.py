"""Packed layers compute what the plain ones do, in memory that does not grow with the numbers of rows they see."""

from __future__ import annotations

import psutil
import pytest
import torch
from torch import Tensor, nn

from collm.models import packing
from collm.models.packing import LONGEST, PackedLinear, fitting_rows, pack_linears, packing_pays


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 7), (1, 33), (2, 128), (1, LONGEST), (1, LONGEST + 1), (1, 700)])
def test_a_packed_layer_multiplies_as_the_plain_one(shape: tuple[int, int], bias: bool) -> None:
    linear = nn.Linear(48, 80, bias=bias)
    inputs = torch.randn(*shape, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(PackedLinear(linear)(inputs), linear(inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("faster", [(), (48,), (80,), (48, 80)])
def test_layers_are_packed_where_that_is_faster(faster: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """By shape: in features tell these layers apart."""

    def seconds(layers: list[nn.Module], inputs: Tensor) -> float:
        return 0.5 if isinstance(layers[0], PackedLinear) and inputs.shape[1] in faster else 1.0

    monkeypatch.setattr(packing, "_seconds", seconds)
    monkeypatch.setattr(packing, "_LEAST_BYTES", 0)
    model = nn.Sequential(nn.Linear(48, 80), nn.ReLU(), nn.Sequential(nn.Linear(80, 48), nn.Linear(48, 80)))
    inputs = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(inputs)
        pack_linears(model)
        torch.testing.assert_close(model(inputs), expected, rtol=1e-5, atol=1e-5)
    kinds = {48: {type(model[0]), type(model[2][1])}, 80: {type(model[2][0])}}
    for width, found in kinds.items():
        assert found == {PackedLinear if width in faster else nn.Linear}


def test_both_forms_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [nn.Linear(64, 64) for _ in range(2)]
    assert not packing_pays(layers)  # too small to matter
    monkeypatch.setattr(packing, "_LEAST_BYTES", 0)
    rounds: dict[tuple[int, type], list[float]] = {}
    measure = packing._seconds

    def seconds(layers: list[nn.Module], inputs: Tensor) -> float:
        rounds.setdefault((len(inputs), type(layers[0])), []).append(measure(layers, inputs))
        return rounds[len(inputs), type(layers[0])][-1]

    monkeypatch.setattr(packing, "_seconds", seconds)
    with torch.inference_mode():
        pays = packing_pays(layers)
    assert all(len(times) >= packing._LEAST_ROUNDS and min(times) > 0 for times in rounds.values())
    best = {form: min(times[1:]) for form, times in rounds.items()}
    ratios = [best[count, PackedLinear] / best[count, nn.Linear] for count in (1, 16)]
    assert pays == (sum(ratios) < 2)


def test_rows_come_in_few_numbers() -> None:
    fitting = [fitting_rows(count) for count in range(1, LONGEST + 1)]
    assert all(count <= fit < 1.5 * count for count, fit in enumerate(fitting, start=1))
    assert len(set(fitting)) == 28
    assert [fitting_rows(fit) for fit in fitting] == fitting


@pytest.mark.slow
@torch.no_grad()
def test_memory_stays_whatever_numbers_of_rows_come() -> None:
    layer = PackedLinear(nn.Linear(320, 320))
    for count in {fitting_rows(count) for count in range(1, LONGEST + 1)}:
        layer(torch.zeros(count, 320))
    before = psutil.Process().memory_info().rss
    for count in range(1, 600):
        layer(torch.zeros(count, 320))
    assert psutil.Process().memory_info().rss - before < 30e6  # 599 programs of their own take hundreds of megabytes
