"""Author decisions from the logits of an exported base. vLLM imports this file, so it needs only torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from collm.core.head import defer_probs

if TYPE_CHECKING:
    from torch import Tensor


def decide(logits: Tensor, thresholds: Tensor, note: dict[str, Any]) -> Tensor:
    """Force an assistant's row where the base defers, and rule out all rows beyond the vocabulary elsewhere.

    Args:
        logits: shape (R, V); modified in place and returned.
        thresholds: shape (R,), fp64.
        note: the content of collm_vllm.json.
    """
    defer_ids = torch.tensor(note["defer_ids"], device=logits.device)
    rows = logits[:, defer_ids]  # (R, K)
    u = rows.float() / note["scale"] + torch.tensor(note["biases"], device=logits.device)
    deferring = (defer_probs(u) > thresholds).unsqueeze(-1)
    chosen = u.argmax(-1, keepdim=True)
    logits[:, note["vocab_size"] :] = -math.inf
    logits.masked_fill_(deferring, -math.inf)
    kept = rows.gather(-1, chosen).masked_fill_(~deferring, -math.inf)
    return logits.scatter_(-1, defer_ids[chosen], kept)
