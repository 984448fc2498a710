"""The deferral head: one linear layer from the base's last hidden state to the defer logits."""

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
