"""What a collaboration's authors say of given texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from collm.collaboration import CoLLM
from collm.training.examples import Example
from collm.training.measures import TokenViews
from collm.training.scoring import read_scores


@torch.inference_mode()
def gold_views(model: CoLLM, examples: Sequence[Example]) -> TokenViews:
    """Every target token of the examples, as base, head and assistants see it: one pass of each model.

    Raises:
        ConfigError: an example is longer than a model reads.
        ModelFailure: NaN logits, naming the model and the example.
        ToolFailure: a tool raised, hung or returned no text.
    """
    base, *assistants = model.members
    base_logprob, base_correct, hidden = read_scores(base, examples, hidden_states=True)
    of_assistants = [read_scores(assistant, examples) for assistant in assistants]
    logprobs, correct = (torch.stack(values, dim=-1) for values in zip(*of_assistants, strict=True))  # (M, K)
    defer_logits = cast(torch.Tensor, model.head(hidden.to(model.head.weight.device))).float().cpu()
    return TokenViews(base_logprob, base_correct, logprobs, correct, defer_logits)
