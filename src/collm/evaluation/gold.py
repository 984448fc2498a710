"""What a collaboration's authors say of given texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from collm.collaboration import CoLLM
from collm.core.objective import defer_probs
from collm.models.tools import ToolModel
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
    defer_logits = cast(Tensor, model.head(hidden.to(model.head.weight.device))).float().cpu()
    return TokenViews(base_logprob, base_correct, logprobs, correct, defer_logits)


def greedy_writes(model: CoLLM, views: TokenViews, threshold: float) -> Tensor:
    """Whether greedy decoding at this threshold, having written the tokens before, writes each gold token.

    It does where the gold token is the argmax of the author that the threshold rule chooses there, or of the base where
    that author is a tool with no answer.

    Returns:
        bool, shape (M,).
    """
    correct = views.assistant_correct.clone()  # (M, K)
    for k, member in enumerate(model.members[1:]):
        if isinstance(member, ToolModel):
            silent = views.assistant_logprobs[:, k] == torch.tensor(member.logprobs[-1])
            correct[:, k] = torch.where(silent, views.base_correct, correct[:, k])
    chosen = correct.gather(-1, views.defer_logits.argmax(-1, keepdim=True)).squeeze(-1)
    deferred = defer_probs(views.defer_logits).double() > threshold  # as decoding compares them, not rounded to fp32
    return torch.where(deferred, chosen, views.base_correct)
