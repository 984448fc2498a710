"""Warm start: fit the deferral head to pseudo-labels, on hidden states of the frozen base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from collm.core.head import DeferralHead
from collm.core.objective import author_logprobs
from collm.errors import ConfigError, DataError, MismatchError
from collm.models.language_model import LanguageModel
from collm.training.examples import Example
from collm.training.labels import Labels
from collm.training.measures import author_accuracy, deferral_auc
from collm.training.scores import HiddenStates
from collm.training.scoring import OnProgress
from collm.training.targets import batch_tokens_on, batches_by_length, collate, shift

PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4)
"""L2 penalties to try on standardised features, strongest first."""

HELD_OUT = 0.2
"""Share of examples held out to choose the penalty and to measure the fit."""


@dataclass(frozen=True)
class WarmStartReport:
    """Quality of the fit on held-out examples, or on all examples if there are too few to hold any out.

    Attributes:
        loss_nats: weighted negative log-likelihood of the pseudo-labels.
        accuracy: share of tokens whose most probable author equals the label.
        auc: AUC of the defer prob as a classifier of tokens labelled with an assistant.
        share: share of positives among all used tokens.
        num_tokens: number of used tokens, held out or not.
        penalty: the chosen L2 penalty.
    """

    loss_nats: float
    accuracy: float
    auc: float
    share: float
    num_tokens: int
    penalty: float


def warm_start(
    base: LanguageModel | HiddenStates,
    head: DeferralHead,
    examples: Sequence[Example],
    labels: Labels,
    *,
    max_tokens: int = 65536,
    positive_weight: float = 8.0,
    seed: int,
    progress: OnProgress | None = None,
) -> WarmStartReport:
    """Set the head by a weighted logistic regression of the pseudo-labels on the base's hidden states.

    The paper uses one pass of AdamW with weight 8 on positives (arXiv 2403.03870). This finds the optimum of the same
    objective with L-BFGS on standardised features, and chooses the L2 penalty on held-out examples.

    Args:
        base: the frozen base, which is not modified, or its stored hidden states.
        head: the head to overwrite.
        examples: the labelled examples.
        max_tokens: largest number of target tokens to use, from examples in random order.
        positive_weight: weight of tokens labelled with an assistant; others have weight 1.
        seed: seed of the random order.
        progress: called with the number of target tokens read and the total.

    Raises:
        DataError: no token is labelled with an assistant.
        MismatchError: the head does not match the base or the labels.
        ConfigError: the labels are of other examples, or an option is out of range.
    """
    _check(base, head, examples, labels, max_tokens, positive_weight)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    counts = labels.offsets.diff()[order]
    indices = order[counts.cumsum(0) - counts < max_tokens].tolist()  # with less than max_tokens before them
    targets = torch.cat([labels.of(index) for index in indices])[:max_tokens]
    if not (targets != 0).any():
        raise DataError(f"the warm start found no positive label among {len(targets)} tokens; {labels.report()}")
    if isinstance(base, HiddenStates):
        features = torch.cat([base.of(index) for index in indices]).to(head.weight.device, torch.float32)
    else:
        features = _read_features(base, examples, indices, progress)
    features, targets = features[:max_tokens], targets.to(features.device)
    mean, scale = _standardise(features)
    cut = sum(len(labels.of(index)) for index in indices[: round((1 - HELD_OUT) * len(indices))])
    fit, report = _choose_penalty(features, targets, cut, head.num_assistants, positive_weight)
    fit = fit_authors(features, targets, fit, positive_weight=positive_weight, penalty=report.penalty)
    _set_head(head, *fit, mean, scale)
    return report


def _check(
    base: LanguageModel | HiddenStates,
    head: DeferralHead,
    examples: Sequence[Example],
    labels: Labels,
    max_tokens: int,
    positive_weight: float,
) -> None:
    if max_tokens < 1 or not positive_weight > 0:
        raise ConfigError(
            f"a warm start needs max_tokens >= 1 and positive_weight > 0, got {max_tokens} and {positive_weight}"
        )
    if len(examples) != len(labels):
        raise ConfigError(f"the labels are for {len(labels)} examples, got {len(examples)}; label the same examples")
    hidden_size = head.hidden_size if isinstance(base, HiddenStates) else base.hidden_size
    if (head.hidden_size, head.num_assistants) != (hidden_size, labels.num_assistants):
        raise MismatchError(
            f"the head has hidden size {head.hidden_size} and {head.num_assistants} assistants, but the base has "
            f"hidden size {hidden_size} and the labels have {labels.num_assistants} assistants"
        )


def _read_features(
    base: LanguageModel, examples: Sequence[Example], indices: Sequence[int], progress: OnProgress | None
) -> Tensor:
    """Hidden states at the target positions of the chosen examples, in order: fp32, shape (M, H)."""
    lengths = [len(examples[index].token_ids) for index in indices]
    starts = torch.tensor([0, *(examples[index].num_targets for index in indices)]).cumsum(0).tolist()
    features = torch.empty(starts[-1], base.hidden_size, device=base.device)
    training = base.module.training
    base.module.eval()
    done = 0
    try:
        for places in batches_by_length(lengths, batch_tokens_on(base.device)):
            batch = collate([shift(examples[indices[place]]) for place in places])
            read = {name: batch[name].to(base.input_device) for name in ("input_ids", "attention_mask")}
            with torch.no_grad():
                hidden = base.hidden_states(**read, use_cache=False)
            for states, mask, place in zip(hidden, batch["target_mask"].to(hidden.device), places, strict=True):
                features[starts[place] : starts[place + 1]] = states[mask]
            done += int(batch["target_mask"].sum())
            if progress is not None:
                progress(done, len(features))
    finally:
        base.module.train(training)
    return features


def _standardise(features: Tensor) -> tuple[Tensor, Tensor]:
    """Standardise in place. Returns each feature's mean and scale, which is 0 for a constant feature."""
    variance, mean = torch.var_mean(features, dim=0, correction=0)
    std = variance.sqrt()
    scale = torch.where(std > 1e-6 * mean.abs(), 1 / std, 0.0)
    features.sub_(mean).mul_(scale)
    return mean, scale


def _choose_penalty(
    features: Tensor, targets: Tensor, cut: int, num_assistants: int, positive_weight: float
) -> tuple[tuple[Tensor, Tensor], WarmStartReport]:
    """Fit the tokens before `cut` with decreasing penalties until the loss on the tokens after it increases.

    If one of the parts has no positive label, all tokens are used for both.
    """
    whole, before, after = slice(None), slice(None, cut), slice(cut, None)
    parts = (before, after) if all((targets[part] != 0).any() for part in (before, after)) else (whole, whole)
    fit = (features.new_zeros(num_assistants, features.shape[1]), features.new_zeros(num_assistants))
    best: tuple[tuple[Tensor, Tensor], WarmStartReport] | None = None
    for penalty in PENALTIES:
        fit = fit_authors(features[parts[0]], targets[parts[0]], fit, positive_weight=positive_weight, penalty=penalty)
        logits, labels = F.linear(features[parts[1]], *fit), targets[parts[1]]
        report = WarmStartReport(
            loss_nats=weighted_nll(logits, labels, positive_weight).item(),
            accuracy=author_accuracy(logits, labels),
            auc=deferral_auc(logits, labels),
            share=(targets != 0).float().mean().item(),
            num_tokens=len(targets),
            penalty=penalty,
        )
        if best is not None and report.loss_nats > best[1].loss_nats:
            break  # weaker penalties overfit more, and take longest
        best = fit, report
    assert best is not None
    return best


@torch.no_grad()
def _set_head(head: DeferralHead, weight: Tensor, bias: Tensor, mean: Tensor, scale: Tensor) -> None:
    """Fold the standardisation into the head: w (h - mean) scale + b = (w scale) h + (b - (w scale) mean)."""
    weight, bias, mean, scale = (tensor.cpu().double() for tensor in (weight, bias, mean, scale))
    head.weight.copy_(weight * scale)
    head.bias.copy_(bias - (weight * scale) @ mean)


def weighted_nll(defer_logits: Tensor, labels: Tensor, positive_weight: float) -> Tensor:
    """sum_i c_i (-log P(Z = y_i)) / sum_i c_i, with c_i = positive_weight where y_i != 0, else 1.

    Args:
        defer_logits: u, shape (M, K).
        labels: author numbers y in 0..K, shape (M,).

    Returns:
        A scalar in nats.
    """
    weights = torch.where(labels != 0, positive_weight, 1.0)
    nll = F.nll_loss(author_logprobs(defer_logits), labels, reduction="none")
    return (weights * nll).sum() / weights.sum()


def fit_authors(
    features: Tensor, labels: Tensor, start: tuple[Tensor, Tensor], *, positive_weight: float, penalty: float
) -> tuple[Tensor, Tensor]:
    """Minimise weighted_nll(x W^T + b) + penalty / 2 |W|^2 by L-BFGS. The bias is not penalised.

    Args:
        features: x, standardised, fp32, shape (M, H).
        labels: author numbers in 0..K, shape (M,).
        start: initial weight (K, H) and bias (K,).

    Returns:
        Weight and bias.
    """
    weight, bias = (tensor.detach().clone().requires_grad_() for tensor in start)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=200,
        history_size=10,
        tolerance_grad=1e-6,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = weighted_nll(F.linear(features, weight, bias), labels, positive_weight)
        loss = loss + penalty / 2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()
