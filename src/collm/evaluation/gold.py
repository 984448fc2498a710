"""The predictions of a collaboration's authors on given texts, and what they say about deferring there."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from collm.collaboration import CoLLM
from collm.core.head import defer_probs
from collm.core.policies import check_share
from collm.evaluation.intervals import bootstrap_interval
from collm.models.members import load_members
from collm.training.data import Row
from collm.training.examples import Examples, encode
from collm.training.inspection import TokenViews
from collm.training.scores import Scores
from collm.training.scoring import read_scores

BASE_ALONE, ASSISTANTS_ALONE = 1.0, -1.0


def gold_examples(model: CoLLM, rows: Sequence[Row], *, max_length: int | None = None) -> Examples:
    """Encode rows for each author, with at most `max_length` tokens, by default the models' context."""
    model.check_in_memory()
    if max_length is None:
        max_length = min((one.max_length for one in model.members if one.max_length is not None), default=sys.maxsize)
    return encode(rows, model.template, model.tokenizer, model.alignment, max_length=max_length)


@torch.inference_mode()
def gold_views(model: CoLLM, examples: Examples, scores: Sequence[Scores] | None = None) -> TokenViews:
    """The predictions of base, head and assistants for every target token. With the assistants' `scores` on these
    examples, only the base is loaded.
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


def deferred(views: TokenViews) -> tuple[Tensor, Tensor, Tensor]:
    """The result of deferring at each gold token to the assistant argmax_k u_k. If a tool abstains, the base writes.

    Returns:
        Whether an assistant writes, whether the author's argmax is the gold token, and the author's log-probability of
        the gold token in nats: bool, bool and float, shape (N,).
    """
    silent = views.assistant_abstained
    if silent is None:
        silent = torch.zeros_like(views.assistant_correct)  # (N, K)
    falls_back, correct, logprob = _of_best(views, silent, views.assistant_correct, views.assistant_logprobs)
    return (
        ~falls_back,
        torch.where(falls_back, views.base_correct, correct),
        torch.where(falls_back, views.base_logprob, logprob),
    )


def greedy_writes(views: TokenViews, threshold: float) -> Tensor:
    """Whether greedy decoding at this threshold writes each gold token after those before it, bool, shape (N,)."""
    _, correct, _ = deferred(views)
    return torch.where(defer_probs(views.defer_logits) > threshold, correct, views.base_correct)


def reliability(views: TokenViews, num_bins: int = 10) -> list[dict[str, float]]:
    """The tokens that exactly one of two authors predicts correctly, in bins of equal width by defer prob.

    The authors are the base and the assistant with the highest defer logit.

    Returns:
        For each bin with tokens: the mean defer prob, the share that the assistant predicts correctly with the ends of
        its 95 % interval (which treats tokens as independent), and the number of tokens.
    """
    (theirs,) = _of_best(views, views.assistant_correct)
    one_right = theirs != views.base_correct
    probs, right = defer_probs(views.defer_logits)[one_right], theirs[one_right]
    places = (probs * num_bins).long().clamp(max=num_bins - 1)
    bins = []
    for place in sorted(set(places.tolist())):
        inside = right[places == place].double().tolist()
        share, mean = bootstrap_interval(inside), probs[places == place].mean().item()
        ends = {"assistant_right": share.mean, "low": share.low, "high": share.high}
        bins.append({"defer_prob": mean, **ends, "tokens": len(inside)})
    return bins


def _of_best(views: TokenViews, *values: Tensor) -> list[Tensor]:
    """The values (N, K) of the assistant with the highest defer logit."""
    best = views.defer_logits.argmax(-1, keepdim=True)
    return [one.gather(-1, best).squeeze(-1) for one in values]


@dataclass(frozen=True)
class TeacherForcedPoint:
    """A threshold on given texts, where each token follows the gold tokens before it.

    The share of gold tokens that assistants would write, the share that are the argmax of their author, and their mean
    NLL under their authors in nats.
    """

    threshold: float
    deferral_rate: float
    accuracy: float
    nll: float


@dataclass(frozen=True)
class TeacherForcedCurve:
    """All thresholds with different choices of authors, from the base alone to the assistants alone.

    Attributes:
        thresholds: fp64, shape (G + 1,), falling: 1, each distinct defer prob but the highest, -1.
        deferral_rates, accuracies, nlls: fp64, shape (G + 1,), as in `TeacherForcedPoint`.
        reachable: share of the gold tokens that are the argmax of any author: the accuracy of a perfect choice.
    """

    thresholds: Tensor
    deferral_rates: Tensor
    accuracies: Tensor
    nlls: Tensor
    reachable: float
    num_tokens: int

    def __len__(self) -> int:
        return len(self.thresholds)

    def __getitem__(self, index: int) -> TeacherForcedPoint:
        columns = (self.thresholds, self.deferral_rates, self.accuracies, self.nlls)
        return TeacherForcedPoint(*(column[index].item() for column in columns))

    def best(self, budget: float = 1.0) -> TeacherForcedPoint:
        """The most accurate point within a deferral rate in [0, 1]. Ties go to the lower rate."""
        check_share("budget", budget)
        within = self.accuracies.where(self.deferral_rates <= budget, -torch.inf)
        return self[int((within == within.max()).int().argmax())]

    def at_rates(self, rates: Sequence[float]) -> list[TeacherForcedPoint]:
        """For each rate in [0, 1] the last point that does not exceed it."""
        for rate in rates:
            check_share("rate", rate)
        return [self[int((self.deferral_rates <= rate).nonzero().max())] for rate in rates]


def teacher_forced(views: TokenViews) -> TeacherForcedCurve:
    """The exact curve. Tokens are sorted by defer prob, and tokens with equal defer probs are deferred together."""
    by_assistant, correct, logprob = deferred(views)
    probs, order = defer_probs(views.defer_logits).sort(descending=True, stable=True)
    values, sizes = torch.unique_consecutive(probs, return_counts=True)
    ends = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)])  # (G + 1,): tokens deferred

    def means(base: Tensor, other: Tensor) -> Tensor:
        """Means over all tokens, with the other author's values for the first `ends` tokens."""
        nothing = torch.zeros(1, dtype=torch.float64)
        beyond = torch.cat([nothing, other[order].double().cumsum(0)])
        kept = torch.cat([base[order].double().flip(0).cumsum(0).flip(0), nothing])
        return (beyond + kept)[ends] / len(order)

    right = views.base_correct | views.assistant_correct.any(-1)
    return TeacherForcedCurve(
        thresholds=torch.cat([torch.tensor([BASE_ALONE]).double(), values[1:], torch.tensor([ASSISTANTS_ALONE])]),
        deferral_rates=means(torch.zeros_like(by_assistant), by_assistant),
        accuracies=means(views.base_correct, correct),
        nlls=-means(views.base_logprob, logprob),
        reachable=right.double().mean().item(),
        num_tokens=len(order),
    )
