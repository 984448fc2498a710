"""The head: shape, start, precision."""

from __future__ import annotations

import pytest
import torch

from collm.core.head import DeferralHead, author_logprobs
from collm.errors import ConfigError


def test_a_new_head_finds_all_authors_equally_probable() -> None:
    u = DeferralHead(8, 3)(torch.randn(2, 5, 8))
    assert u.shape == (2, 5, 3)
    assert torch.allclose(author_logprobs(u).exp(), torch.full((2, 5, 4), 0.25))


def test_it_is_the_linear_map_in_fp32_even_for_bf16_hidden_states() -> None:
    head, hidden = DeferralHead(4, 2), torch.randn(3, 4).bfloat16()
    torch.nn.init.normal_(head.weight)
    torch.nn.init.normal_(head.bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        u = head(hidden)
    expected = [[sum(w * x for w, x in zip(row, h, strict=True)) + b for row, b in zip(*params, strict=True)]
                for h in hidden.double().tolist()
                for params in [(head.weight.tolist(), head.bias.tolist())]]  # fmt: skip
    assert u.dtype == torch.float32
    assert torch.allclose(u.double(), torch.tensor(expected, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("size", [(0, 1), (4, 0)])
def test_sizes_below_one_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ConfigError):
        DeferralHead(*size)
