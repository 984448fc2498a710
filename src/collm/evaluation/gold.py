"""The predictions of a collaboration's authors on given texts, and what they say about deferring there."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from collm.collaboration import CoLLM
from collm.core.head import defer_probs
from collm.core.objective import pseudo_labels
from collm.core.policies import check_share
from collm.evaluation.intervals import bootstrap_interval
from collm.models.members import Model, load_members
from collm.models.tools import ToolModel
from collm.tools.spec import ToolSpec
from collm.training.data import Row
from collm.training.examples import Example, Examples, encode
from collm.training.inspection import TokenViews
from collm.training.scores import Scores
from collm.training.scoring import read_scores, tool_likelihoods

BASE_ALONE, ASSISTANTS_ALONE = 1.0, -1.0


def gold_examples(model: CoLLM, rows: Sequence[Row], *, max_length: int | None = None) -> Examples:
    """Encode rows for each author, with at most `max_length` tokens, by default the models' context."""
    model.check_in_memory()
    if max_length is None:
        max_length = min((one.max_length for one in model.members if one.max_length is not None), default=sys.maxsize)
    return encode(rows, model.template, model.tokenizer, model.alignment, max_length=max_length)


Likelihoods = tuple[Tensor, Tensor, Tensor | None]
"""An author's log-probabilities of the gold tokens in nats, whether its argmax is the gold token, and whether it
abstains there, shape (M,); None if it never does.
"""


@torch.inference_mode()
def gold_views(model: CoLLM, examples: Examples, scores: Sequence[Scores] | None = None) -> TokenViews:
    """The predictions of base, head and assistants for every target token, under the law that decodes: where a tool
    abstains, it has the base's log-probability. With the assistants' `scores` on these examples, no other model than
    the base is loaded.
    """
    model.check_in_memory()
    base, *assistants = model.members if scores is None else _base_and_tools(model, scores)
    of_assistants = [likelihoods(one, examples.read_by(number)) for number, one in enumerate(assistants, start=1)]
    found = read_scores(cast(Model, base), examples, hidden_states=True)
    views = views_of((found["logprob"], found["correct"], None), *of_assistants)
    inputs = (found[name].to(model.head.weight.device) for name in ("hidden", "doubt"))
    return replace(views, defer_logits=cast(Tensor, model.head(*inputs)).cpu())


def _base_and_tools(model: CoLLM, scores: Sequence[Scores]) -> Iterator[Model | ToolModel | Scores]:
    """The base and, for each assistant, the tool or the stored scores of the model."""
    tools = [one for one in model.assistants if isinstance(one, ToolSpec)]
    loaded = iter(load_members([model.base, *tools], model.tokenizer, vocab_size=model.identity.vocab_size))
    yield next(loaded)
    for one, stored in zip(model.assistants, scores, strict=True):
        yield next(loaded) if isinstance(one, ToolSpec) else stored


def likelihoods(author: Model | ToolModel | Scores, examples: Sequence[Example] = ()) -> Likelihoods:
    """What an author gives the gold tokens of examples, or what its scores say of their own."""
    if isinstance(author, Scores):
        return author.logprobs, author.corrects, author.abstained
    found = tool_likelihoods(author, examples) if isinstance(author, ToolModel) else read_scores(author, examples)
    return found["logprob"], found["correct"], found.get("abstained")


def views_of(base: Likelihoods, *assistants: Likelihoods) -> TokenViews:
    """All authors, with defer logits of 0. Where a tool abstains, it has the base's log-probability."""
    logprobs, corrects, abstained = zip(*assistants, strict=True)
    never = torch.zeros_like(base[1])
    silent = torch.stack([never if one is None else one for one in abstained], -1)  # (M, K)
    theirs = torch.where(silent, base[0].unsqueeze(-1), torch.stack(logprobs, -1))
    return TokenViews(*base[:2], theirs, torch.stack(corrects, -1), torch.zeros_like(theirs), silent)


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


def confusion(views: TokenViews, threshold: float) -> Tensor:
    """The number of gold tokens by the author that should write them, and the author that does at this threshold.

    Who should is guessed as for a warm start (`core.objective.pseudo_labels`): the base if its argmax is the gold
    token, else the assistant with the most probability for it among those whose argmax it is.

    Returns:
        Counts, shape (K + 1, K + 1), the base first.
    """
    size = views.defer_logits.shape[-1] + 1
    wanted = pseudo_labels(views.base_correct, views.assistant_correct, views.assistant_logprobs)
    asks = deferred(views)[0] & (defer_probs(views.defer_logits) > threshold)
    writes = torch.where(asks, views.defer_logits.argmax(-1) + 1, 0)
    return torch.bincount(wanted * size + writes, minlength=size * size).view(size, size)


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
        defer_probs: the distinct ones, fp64, shape (G,), falling.
        thresholds: fp64, shape (G + 1,), falling: 1, half-way between each two neighbouring defer probs, -1.
        deferral_rates, accuracies, nlls: fp64, shape (G + 1,), as in `TeacherForcedPoint`.
        youden: Youden's J of "defer prob > threshold" for the pseudo-labels: sensitivity + specificity - 1, shape
            (G + 1,); NaN if all tokens have the same label (Youden, "Index for rating diagnostic tests", 1950).
        reachable: share of the gold tokens that are the argmax of any author: the accuracy of a perfect choice.
    """

    defer_probs: Tensor
    thresholds: Tensor
    deferral_rates: Tensor
    accuracies: Tensor
    nlls: Tensor
    youden: Tensor
    reachable: float
    num_tokens: int

    def __len__(self) -> int:
        return len(self.thresholds)

    def __getitem__(self, index: int) -> TeacherForcedPoint:
        columns = (self.thresholds, self.deferral_rates, self.accuracies, self.nlls)
        return TeacherForcedPoint(*(column[index].item() for column in columns))

    def at(self, threshold: float) -> TeacherForcedPoint:
        """The point at a threshold in [-1, 1]. At its own threshold the same authors write."""
        return self[int((self.defer_probs > threshold).sum())]

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


def half_way(lower: Tensor, higher: Tensor) -> Tensor:
    """Thresholds in the middle of two defer probs, or the lower one if no number lies between.

    There, rounding in another batch or engine changes no author.
    """
    middle = (lower + higher) / 2
    return torch.where(middle < higher, middle, lower)


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

    labels = pseudo_labels(views.base_correct, views.assistant_correct, views.assistant_logprobs)
    positive, negative = (labels != 0).double(), (labels == 0).double()
    nothing = torch.zeros_like(positive)
    rates = [means(nothing, one) / one.mean() for one in (positive, negative)]  # true and false positive rate
    right, between = views.base_correct | views.assistant_correct.any(-1), half_way(values[1:], values[:-1])
    return TeacherForcedCurve(
        defer_probs=values,
        thresholds=torch.cat([torch.tensor([BASE_ALONE]).double(), between, torch.tensor([ASSISTANTS_ALONE])]),
        deferral_rates=means(torch.zeros_like(by_assistant), by_assistant),
        accuracies=means(views.base_correct, correct),
        nlls=-means(views.base_logprob, logprob),
        youden=rates[0] - rates[1],
        reachable=right.double().mean().item(),
        num_tokens=len(order),
    )
