"""The deferral head on the base's last hidden state, what else it may read, and the distribution of the author."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from collm.errors import ConfigError

DOUBT = 3  # numbers of `doubt_of`


class DeferralHead(nn.Module):
    """Computes u_k = w_k . x + b_k for K assistants (arXiv 2403.03870, with a bias and K >= 1).

    x is the base's last hidden state h, or with `doubt` h and the base's doubt. A hidden layer of W units adds
    v_k . gelu(A x + a).

    Parameters and arithmetic stay in fp32, because defer probs are compared with a threshold and the head is cheap
    next to the base. A new head finds every author equally probable: w, b and v are zeros.

    Args:
        hidden_size: H, the width of the base's last hidden state, at least 1.
        num_assistants: K, at least 1. 0 stands for a base that is tuned alone.
        width: W, 0 for a linear head.
        doubt: whether the head also reads the base's doubt.
        predicts_gain: whether the layers predict g_k, the gain of each assistant over the base in nats. Then u_k
            is g_k, shifted for K > 1 so that logsumexp_k u_k = max_k g_k. So the defer prob exceeds sigmoid(price)
            exactly where the largest gain exceeds the price.
    """

    def __init__(
        self,
        hidden_size: int,
        num_assistants: int = 1,
        *,
        width: int = 0,
        doubt: bool = False,
        predicts_gain: bool = False,
    ) -> None:
        super().__init__()
        if hidden_size < 1 or num_assistants < 0 or width < 0:
            found = f"{hidden_size}, {num_assistants} and {width}"
            raise ConfigError(f"a head needs hidden_size >= 1, num_assistants >= 0 and width >= 0, got {found}")
        self.hidden_size, self.num_assistants, self.width, self.doubt = hidden_size, num_assistants, width, doubt
        self.predicts_gain = predicts_gain
        size = hidden_size + DOUBT * doubt
        self.weight = nn.Parameter(torch.zeros(num_assistants, size))  # (K, H) or (K, H + 3)
        self.bias = nn.Parameter(torch.zeros(num_assistants))  # (K,)
        if width:
            self.hidden_weight = nn.Parameter(torch.empty(width, size))  # (W, H) or (W, H + 3)
            nn.init.normal_(self.hidden_weight, std=size**-0.5, generator=torch.Generator().manual_seed(0))
            self.hidden_bias = nn.Parameter(torch.zeros(width))  # (W,)
            self.output_weight = nn.Parameter(torch.zeros(num_assistants, width))  # (K, W)

    @property
    def shape(self) -> dict[str, Any]:
        """The arguments that the shapes of the parameters depend on."""
        return {name: getattr(self, name) for name in ("hidden_size", "num_assistants", "width", "doubt")}

    def units(self, inputs: Tensor) -> Tensor:
        """The hidden layer, shape (..., W), of what the head reads, (..., H) or (..., H + 3)."""
        return F.gelu(F.linear(inputs, self.hidden_weight.float(), self.hidden_bias.float()))

    @torch.no_grad()
    def with_rows(self, rows: Sequence[int | None]) -> DeferralHead:
        """A head of these rows, counted from 0, in this order. None stands for a new row of zeros."""
        head = DeferralHead(**{**self.shape, "num_assistants": len(rows)}, predicts_gain=self.predicts_gain)
        by_assistant = {"weight", "bias", "output_weight"}
        for name, values in self.named_parameters():
            new = head.get_parameter(name)
            if name not in by_assistant:
                new.copy_(values)
                continue
            for at, row in enumerate(rows):
                new[at] = 0 if row is None else values[row]
        return head

    def forward(self, hidden: Tensor, doubt: Tensor | None = None) -> Tensor:
        """Map hidden states of shape (..., H) to defer logits u of shape (..., K), fp32.

        A head with `doubt` also reads what `doubt_of` gives, shape (..., 3), and raises a ConfigError without it.
        """
        if torch.is_autocast_enabled(hidden.device.type):
            with torch.autocast(hidden.device.type, enabled=False):
                return self(hidden, doubt)  # type: ignore[no-any-return]
        x = hidden.float()
        if self.doubt:
            if doubt is None:
                raise ConfigError("this head reads the base's doubt beside its hidden states; pass doubt_of(logits)")
            x = torch.cat([x, doubt.to(x)], dim=-1)
        u = F.linear(x, self.weight.float(), self.bias.float())
        if self.width:
            u = u + F.linear(self.units(x), self.output_weight.float())
        if self.predicts_gain and self.num_assistants > 1:
            u = u + u.amax(-1, keepdim=True) - u.logsumexp(-1, keepdim=True)
        return u

    def read(self, hidden: Tensor, logits: Tensor) -> Tensor:
        """The defer logits (..., K) for hidden states (..., H) and the base's logits there, (..., V)."""
        return cast(Tensor, self(hidden, doubt_of(logits) if self.doubt else None))


def doubt_of(logits: Tensor) -> Tensor:
    """The base's doubt: log p1, the entropy, and the margin log p1 - log p2 of its next token, in nats.

    p1 and p2 are the largest two probabilities under the raw logits (..., V), before any sampling parameter. The result
    is fp32, shape (..., 3).
    """
    logits = logits.detach().float()
    first, second = logits.topk(2).values.unbind(-1)
    probs = logits.softmax(-1)
    top = probs.amax(-1).log()
    mean = torch.linalg.vecdot(probs, logits.clamp(min=torch.finfo(torch.float32).min))  # 0 * -inf would be NaN
    return torch.stack([top, (first - top - mean).clamp(min=0), first - second], dim=-1)


def check_prices(head: DeferralHead, prices: Sequence[float]) -> None:
    """Raise a ConfigError unless the head predicts gains to compare these prices with, one for all or one for each."""
    if not head.predicts_gain:
        raise ConfigError(
            f"price is {', '.join(map(str, prices))}, but this head predicts no gains to compare it with; give a "
            "threshold, or train the head with the objective 'gain'"
        )
    if len(prices) not in (1, head.num_assistants):
        raise ConfigError(f"got {len(prices)} prices for {head.num_assistants} assistants; give one, or one for each")


def author_logprobs(defer_logits: Tensor) -> Tensor:
    """log P(Z = 0..K) = log_softmax([0, u_1..u_K]) in nats, fp32, shape (..., K + 1), from u of shape (..., K).

    Entry 0 is the base. With K = 1 this equals the paper's sigmoid.
    """
    return torch.log_softmax(F.pad(defer_logits.float(), (1, 0)), dim=-1)


def defer_probs(defer_logits: Tensor) -> Tensor:
    """1 - P(Z = 0), computed as sigmoid(logsumexp_k u_k) to avoid cancellation, from u of shape (..., K).

    The result is fp64, shape (...), because in fp32 every probability above 1 - 6e-8 would be 1, and a head that nearly
    always defers would not rank tokens.
    """
    u = defer_logits.float()  # below the precision of fp32, logits are noise
    logit = u[..., 0] if u.shape[-1] == 1 else torch.logsumexp(u, dim=-1)
    smaller = torch.sigmoid(-logit.abs()).double()
    return torch.where(logit > 0, 1 - smaller, smaller)
