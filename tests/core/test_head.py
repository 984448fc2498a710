"""The head: shape, start, precision."""

from __future__ import annotations

import math

import pytest
import torch

from collm.core.head import DeferralHead, author_logprobs, doubt_of
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


def test_the_doubt_is_that_of_the_distribution() -> None:
    logits = 4 * torch.randn(6, 11)
    logits[1, 3:] = -torch.inf  # tokens that cannot follow
    logits[2, 4] = logits[2, 7] = 30.0  # a tie
    doubt, p = doubt_of(logits.bfloat16()), logits.bfloat16().double().softmax(-1)
    first, second = p.sort(descending=True).values[:, :2].unbind(-1)
    expected = [first.log(), torch.special.entr(p).sum(-1), first.log() - second.log()]
    assert doubt.dtype == torch.float32
    torch.testing.assert_close(doubt.double(), torch.stack(expected, -1), atol=1e-5, rtol=1e-5)


def test_a_hidden_layer_and_the_doubt_are_the_equation() -> None:
    head, hidden, doubt = DeferralHead(4, 2, width=3, doubt=True), torch.randn(5, 4), torch.randn(5, 3)
    assert not head(hidden, doubt).any()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    w, b, a_weight, a_bias, v = (one.detach().double() for one in head.state_dict().values())
    for row, x in zip(head(hidden, doubt).tolist(), torch.cat([hidden, doubt], -1).double(), strict=True):
        before = [float(unit @ x + bias) for unit, bias in zip(a_weight, a_bias, strict=True)]
        units = torch.tensor([one * (1 + math.erf(one / 2**0.5)) / 2 for one in before], dtype=torch.float64)
        assert row == pytest.approx((w @ x + b + v @ units).tolist(), abs=1e-5)
    logits = torch.randn(5, 9)
    assert torch.equal(head.read(hidden, logits), head(hidden, doubt_of(logits)))
    with pytest.raises(ConfigError, match="reads the base's doubt"):
        head(hidden)


@pytest.mark.parametrize("size", [(0, 1), (4, -1)])
def test_sizes_that_are_too_small_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ConfigError):
        DeferralHead(*size)
