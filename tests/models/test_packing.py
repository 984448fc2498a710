"""Packed layers compute what the plain ones do, in memory that does not grow with the numbers of rows they see."""

from __future__ import annotations

import psutil
import pytest
import torch
from torch import nn

from collm.models.packing import LONGEST, PackedLinear, fitting_rows


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 7), (1, 33), (2, 128), (1, LONGEST), (1, LONGEST + 1), (1, 700)])
def test_a_packed_layer_multiplies_as_the_plain_one(shape: tuple[int, int], bias: bool) -> None:
    linear = nn.Linear(48, 80, bias=bias)
    inputs = torch.randn(*shape, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(PackedLinear(linear)(inputs), linear(inputs), rtol=1e-5, atol=1e-5)


def test_rows_come_in_few_numbers() -> None:
    fitting = [fitting_rows(count) for count in range(1, LONGEST + 1)]
    assert all(count <= fit < 1.5 * count for count, fit in enumerate(fitting, start=1))
    assert len(set(fitting)) == 28
    assert [fitting_rows(fit) for fit in fitting] == fitting


@torch.no_grad()
def test_memory_stays_whatever_numbers_of_rows_come() -> None:
    layer = PackedLinear(nn.Linear(320, 320))
    for count in {fitting_rows(count) for count in range(1, LONGEST + 1)}:
        layer(torch.zeros(count, 320))
    before = psutil.Process().memory_info().rss
    for count in range(1, 600):
        layer(torch.zeros(count, 320))
    assert psutil.Process().memory_info().rss - before < 30e6  # 599 programs of their own take hundreds of megabytes
