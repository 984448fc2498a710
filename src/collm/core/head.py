"""The deferral head, one linear layer on the base's last hidden state, and the distribution of the author it gives."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from collm.errors import ConfigError


class DeferralHead(nn.Module):
    """Linear head that computes u_k = w_k . h + b_k for K assistants (arXiv 2403.03870, with a bias and K >= 1).

    Parameters and arithmetic stay in fp32, because defer probs are compared with a threshold and the head is cheap
    next to the base. A new head is all zeros, so every author is equally probable.

    Args:
        hidden_size: H, the width of the base's last hidden state, at least 1.
        num_assistants: K, at least 1.
    """

    def __init__(self, hidden_size: int, num_assistants: int = 1) -> None:
        super().__init__()
        if hidden_size < 1 or num_assistants < 1:
            raise ConfigError(
                f"a head needs hidden_size >= 1 and num_assistants >= 1, got {hidden_size} and {num_assistants}"
            )
        self.hidden_size, self.num_assistants = hidden_size, num_assistants
        self.weight = nn.Parameter(torch.zeros(num_assistants, hidden_size))  # (K, H)
        self.bias = nn.Parameter(torch.zeros(num_assistants))  # (K,)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden states of shape (..., H) to defer logits u of shape (..., K), fp32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.weight.float(), self.bias.float())


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
    logit = torch.logsumexp(defer_logits.float(), dim=-1)  # in fp32, below which logits are noise
    smaller = torch.sigmoid(-logit.abs()).double()
    return torch.where(logit > 0, 1 - smaller, smaller)
