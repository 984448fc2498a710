"""What a collaboration's authors say of given texts."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from collm.collaboration import CoLLM
from collm.core.objective import defer_probs
from collm.models.members import load_members
from collm.tools.spec import ToolSpec
from collm.training.aligned import encode
from collm.training.data import Row
from collm.training.examples import Examples
from collm.training.measures import TokenViews
from collm.training.scores import Scores
from collm.training.scoring import read_scores

_SAME = 1e-5
"""Log-probabilities that differ by this share are one, rounded."""


def gold_examples(model: CoLLM, rows: Sequence[Row], *, max_length: int | None = None) -> Examples:
    """Rows as the collaboration's templates render them, for each of its authors.

    Args:
        max_length: most tokens of an example; None for what its models read.

    Raises:
        DataError: a row the template refuses, or no target token in any.
    """
    if max_length is None:
        max_length = min((one.max_length for one in model.members if one.max_length is not None), default=sys.maxsize)
    return encode(rows, model.template, model.tokenizer, model.alignment, max_length=max_length)


@torch.inference_mode()
def gold_views(model: CoLLM, examples: Examples, scores: Sequence[Scores] | None = None) -> TokenViews:
    """Every target token of the examples, as base, head and assistants see it: one pass of each model.

    Args:
        scores: of the assistants on these examples; with them the base alone is loaded and read.

    Raises:
        ConfigError: an example is longer than a model reads.
        ModelFailure: NaN logits, naming the model and the example.
        ToolFailure: a tool raised, hung or returned no text.
    """
    if scores is None:
        base, *assistants = model.members
        of_assistants = [read_scores(one, examples.read_by(number)) for number, one in enumerate(assistants, start=1)]
    else:
        [base] = load_members([model.base], model.tokenizer, vocab_size=model.identity.vocab_size)
        of_assistants = [[one.logprobs, one.corrects] for one in scores]
    base_logprob, base_correct, hidden = read_scores(base, examples, hidden_states=True)
    logprobs, correct = (torch.stack(values, dim=-1) for values in zip(*of_assistants, strict=True))  # (M, K)
    defer_logits = cast(Tensor, model.head(hidden.to(model.head.weight.device))).float().cpu()
    return TokenViews(base_logprob, base_correct, logprobs, correct, defer_logits)


@dataclass(frozen=True)
class Deferred:
    """What deferring would give at each gold token: that of argmax_k u_k, or of the base where it is a silent tool.

    Attributes:
        by_assistant: an assistant would write, bool, shape (M,).
        correct: the gold token, bool, shape (M,).
        logprob: of the gold token, nats, shape (M,).
    """

    by_assistant: Tensor
    correct: Tensor
    logprob: Tensor


def deferred(model: CoLLM, views: TokenViews) -> Deferred:
    """What each gold token becomes if the base defers there."""
    silent = torch.zeros_like(views.assistant_correct)  # (M, K)
    of_silence = torch.tensor(-math.log(model.identity.vocab_size))  # a tool's, of any token, as scores keep it
    for k, member in enumerate(model.assistants):
        if isinstance(member, ToolSpec):
            unknown = views.assistant_logprobs[:, k] / of_silence  # tokens of which it says nothing
            silent[:, k] = (unknown >= 1) & ((unknown - unknown.round()).abs() < _SAME)
    asked = views.defer_logits.argmax(-1, keepdim=True)
    falls_back, correct, logprob = (
        values.gather(-1, asked).squeeze(-1) for values in (silent, views.assistant_correct, views.assistant_logprobs)
    )
    return Deferred(
        ~falls_back,
        torch.where(falls_back, views.base_correct, correct),
        torch.where(falls_back, views.base_logprob, logprob),
    )


def greedy_writes(model: CoLLM, views: TokenViews, threshold: float) -> Tensor:
    """Whether greedy decoding at this threshold, having written the tokens before, writes each gold token.

    It does where the gold token is the argmax of the author that the threshold rule chooses there, or of the base where
    that author is a tool with no answer.

    Returns:
        bool, shape (M,).
    """
    asks = defer_probs(views.defer_logits).double() > threshold  # as decoding compares them, not rounded to fp32
    return torch.where(asks, deferred(model, views).correct, views.base_correct)
