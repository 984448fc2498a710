"""Warm start: fit the deferral head to pseudo-labels, on hidden states of the frozen base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from collm.core.head import DeferralHead, author_logprobs
from collm.errors import ConfigError, DataError, MismatchError
from collm.models.language_model import LanguageModel
from collm.training.config import CoLLMConfig
from collm.training.examples import Example
from collm.training.inspection import LabelReport, head_measures
from collm.training.scoring import OnProgress, read_scores

PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4)  # L2 penalties to try on standardised features, strongest first
HELD_OUT = 0.2  # share of examples held out to choose the penalty and to measure the fit


@dataclass(frozen=True)
class WarmStartReport:
    """Quality of the fit on held-out examples, or on all examples if there are too few to hold any out.

    Attributes:
        loss_nats: weighted negative log-likelihood of the pseudo-labels.
        accuracy, auc: as in `head_measures`.
        share, num_tokens: share of positives among all used tokens, held out or not, and their number.
    """

    loss_nats: float
    accuracy: float
    auc: float
    share: float
    num_tokens: int
    penalty: float


def warm_start(
    base: LanguageModel | Sequence[Tensor],
    head: DeferralHead,
    examples: Sequence[Example],
    labels: tuple[Tensor, LabelReport],
    config: CoLLMConfig,
    progress: OnProgress = lambda done, total: None,
) -> WarmStartReport:
    """Set the head by a weighted logistic regression of the pseudo-labels on the base's hidden states.

    The paper uses one pass of AdamW (arXiv 2403.03870). This finds the optimum of the same objective with L-BFGS on
    standardised features, and chooses the L2 penalty on held-out examples.

    Args:
        base: the frozen base, which is not modified, or its hidden states at the targets of each example.
        labels: from `label_tokens`.
        config: its warm_start_tokens are used, of examples in the random order of its seed.
    """
    (values, report), counts = labels, torch.tensor([example.num_targets for example in examples])
    if counts.sum() != len(values):
        raise ConfigError(f"there are {len(values)} labels for {counts.sum()} targets; label the same examples")
    hidden_size = base.hidden_size if isinstance(base, LanguageModel) else head.hidden_size
    expected, found = (head.hidden_size, head.num_assistants), (hidden_size, len(report.shares))
    if expected != found:
        sizes = "hidden size {} and {} assistants".format
        raise MismatchError(f"the head has {sizes(*expected)}, but base and labels have {sizes(*found)}")
    max_tokens, positive_weight = map(config.resolved, ("warm_start_tokens", "positive_weight"))
    order = torch.randperm(len(counts), generator=torch.Generator().manual_seed(config.seed))
    counts, by_example = counts[order], torch.split(values, counts.tolist())
    indices = order[counts.cumsum(0) - counts < max_tokens].tolist()  # with less than max_tokens before them
    targets = torch.cat([by_example[index] for index in indices])[:max_tokens]
    if not (targets != 0).any():
        raise DataError(f"the warm start found no positive label among {len(targets)} tokens; {report}")
    if isinstance(base, LanguageModel):
        used = [examples[index] for index in indices]
        hidden = read_scores(base, used, hidden_states=True, logprobs=False, progress=progress)["hidden"]
    else:
        hidden = torch.cat([base[index] for index in indices])
    features, targets = hidden[:max_tokens].to(head.weight.device, torch.float32), targets.to(head.weight.device)
    variance, mean = torch.var_mean(features, dim=0, correction=0)
    scale = variance.rsqrt().masked_fill(variance.sqrt() <= 1e-6 * mean.abs(), 0.0)  # 0 for a constant feature
    features.sub_(mean).mul_(scale)
    cut = int(counts[: round((1 - HELD_OUT) * len(indices))].sum())
    fit, chosen = _choose_penalty(features, targets, cut, head.num_assistants, positive_weight)
    weight, bias, mean, scale = (tensor.cpu().double() for tensor in (*fit, mean, scale))
    with torch.no_grad():  # w (h - mean) scale + b = (w scale) h + (b - (w scale) mean)
        head.weight.copy_(weight * scale)
        head.bias.copy_(bias - (weight * scale) @ mean)
    return chosen


def _choose_penalty(
    features: Tensor, targets: Tensor, cut: int, num_assistants: int, positive_weight: float
) -> tuple[tuple[Tensor, Tensor], WarmStartReport]:
    """Fit the tokens before `cut` with decreasing penalties until the loss on those after it increases; then all."""
    train, test = slice(None, cut), slice(cut, None)
    if not all((targets[part] != 0).any() for part in (train, test)):  # a part without positives tells nothing
        train = test = slice(None)
    fit = (features.new_zeros(num_assistants, features.shape[1]), features.new_zeros(num_assistants))
    best = None
    for penalty in PENALTIES:
        fit = fit_authors(features[train], targets[train], fit, positive_weight=positive_weight, penalty=penalty)
        logits, labels = F.linear(features[test], *fit), targets[test]
        loss, share = weighted_nll(logits, labels, positive_weight).item(), (targets != 0).float().mean().item()
        report = WarmStartReport(loss, *head_measures(logits, labels), share, len(targets), penalty)
        if best is not None and report.loss_nats > best[1].loss_nats:
            break  # weaker penalties overfit more, and take longest
        best = fit, report
    assert best is not None
    fit, report = best
    return fit_authors(features, targets, fit, positive_weight=positive_weight, penalty=report.penalty), report


def weighted_nll(defer_logits: Tensor, labels: Tensor, positive_weight: float) -> Tensor:
    """sum_i c_i (-log P(Z = y_i)) / sum_i c_i in nats for u (M, K) and y (M,); c_i = positive_weight if y_i else 1."""
    weights = torch.where(labels != 0, positive_weight, 1.0)
    nll = F.nll_loss(author_logprobs(defer_logits), labels, reduction="none")
    return (weights * nll).sum() / weights.sum()


def fit_authors(
    features: Tensor, labels: Tensor, start: tuple[Tensor, Tensor], *, positive_weight: float, penalty: float
) -> tuple[Tensor, Tensor]:
    """Minimise weighted_nll(x W^T + b) + penalty / 2 |W|^2 for standardised x (M, H) from a start W (K, H), b (K,)."""
    weight, bias = (tensor.detach().clone().requires_grad_() for tensor in start)
    sizes = {"max_iter": 200, "history_size": 10}
    optimizer = torch.optim.LBFGS([weight, bias], tolerance_grad=1e-6, line_search_fn="strong_wolfe", **sizes)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = weighted_nll(F.linear(features, weight, bias), labels, positive_weight)
        loss = loss + penalty / 2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()
