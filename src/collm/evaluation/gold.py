"""The predictions of a collaboration's authors on given texts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from collm.collaboration import CoLLM
from collm.core.objective import defer_probs
from collm.models.members import load_members
from collm.training.data import Row
from collm.training.examples import Examples, encode
from collm.training.measures import TokenViews
from collm.training.scores import Scores
from collm.training.scoring import read_scores


def gold_examples(model: CoLLM, rows: Sequence[Row], *, max_length: int | None = None) -> Examples:
    """Encode rows with the collaboration's templates, for each author.

    Args:
        max_length: maximum number of tokens of an example; None for the models' context.

    Raises:
        DataError: the template rejects a row, or no row has a target token.
        ConfigError: the models are on servers.
    """
    model.check_in_memory()
    if max_length is None:
        max_length = min((one.max_length for one in model.members if one.max_length is not None), default=sys.maxsize)
    return encode(rows, model.template, model.tokenizer, model.alignment, max_length=max_length)


@torch.inference_mode()
def gold_views(model: CoLLM, examples: Examples, scores: Sequence[Scores] | None = None) -> TokenViews:
    """The predictions of base, head and assistants for every target token, from one pass of each model.

    Args:
        scores: scores of the assistants on these examples. With them, only the base is loaded.

    Raises:
        ConfigError: an example is longer than a model's context, or the models are on servers.
        ModelFailure: NaN logits, naming the model and the example.
        ToolFailure: a tool raised, hung or returned no text.
    """
    model.check_in_memory()
    if scores is None:
        base, *assistants = model.members
        found = [read_scores(one, examples.read_by(number)) for number, one in enumerate(assistants, start=1)]
        of_assistants = [(one["logprob"], one["correct"], one.get("abstained")) for one in found]
    else:
        [base] = load_members([model.base], model.tokenizer, vocab_size=model.identity.vocab_size)
        of_assistants = [(one.logprobs, one.corrects, one.abstained) for one in scores]
    of_base = read_scores(base, examples, hidden_states=True)
    logprobs, correct, abstained = (
        torch.stack([torch.zeros_like(of_base["correct"]) if one is None else one for one in values], dim=-1)
        for values in zip(*of_assistants, strict=True)
    )  # (M, K)
    defer_logits = cast(Tensor, model.head(of_base["hidden"].to(model.head.weight.device))).float().cpu()
    return TokenViews(of_base["logprob"], of_base["correct"], logprobs, correct, defer_logits, abstained)


@dataclass(frozen=True)
class Deferred:
    """The result of deferring at each gold token to the assistant argmax_k u_k. If a tool abstains, the base writes.

    Attributes:
        by_assistant: whether an assistant writes, bool, shape (M,).
        correct: whether the author's argmax is the gold token, bool, shape (M,).
        logprob: the author's log-probability of the gold token, nats, shape (M,).
    """

    by_assistant: Tensor
    correct: Tensor
    logprob: Tensor


def deferred(views: TokenViews) -> Deferred:
    """The result of deferring at every gold token."""
    silent = views.assistant_abstained
    if silent is None:
        silent = torch.zeros_like(views.assistant_correct)  # (M, K)
    asked = views.defer_logits.argmax(-1, keepdim=True)
    falls_back, correct, logprob = (
        values.gather(-1, asked).squeeze(-1) for values in (silent, views.assistant_correct, views.assistant_logprobs)
    )
    return Deferred(
        ~falls_back,
        torch.where(falls_back, views.base_correct, correct),
        torch.where(falls_back, views.base_logprob, logprob),
    )


def greedy_writes(views: TokenViews, threshold: float) -> Tensor:
    """Whether greedy decoding at this threshold writes each gold token after the gold tokens before it.

    It does if the gold token is the argmax of the author that the threshold rule chooses. Where a tool abstains, the
    author is the base.

    Returns:
        bool, shape (M,).
    """
    asks = defer_probs(views.defer_logits) > threshold
    return torch.where(asks, deferred(views).correct, views.base_correct)
