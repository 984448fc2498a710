"""Warm start: fit the deferral head to pseudo-labels on hidden states of the frozen base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from collm.core.head import DeferralHead
from collm.errors import ConfigError, DataError, MismatchError
from collm.models.language_model import LanguageModel
from collm.training.examples import Example
from collm.training.labels import Labels
from collm.training.measures import author_accuracy, deferral_auc
from collm.training.regression import fit_authors, weighted_nll
from collm.training.scores import HiddenStates
from collm.training.scoring import OnProgress
from collm.training.targets import batch_tokens_on, batches_by_length, pad, shift

PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4)
"""L2 penalties tried on standardised features, strongest first."""

HELD_OUT = 0.2
"""Share of the examples that choose the penalty and measure the fit."""


@dataclass(frozen=True)
class WarmStartReport:
    """What the fit reached on examples held out of it (on the same ones where they are too few to hold any out).

    Attributes:
        loss_nats: weighted negative log-likelihood of the pseudo-labels.
        accuracy: share of tokens whose most probable author is the label.
        auc: of the defer prob, for tokens that belong to an assistant.
        share: of positives among the tokens used.
        num_tokens: tokens used, held out or not.
        penalty: the L2 penalty chosen.
    """

    loss_nats: float
    accuracy: float
    auc: float
    share: float
    num_tokens: int
    penalty: float


def warm_start(
    base: LanguageModel,
    head: DeferralHead,
    examples: Sequence[Example],
    labels: Labels,
    *,
    max_tokens: int = 65536,
    positive_weight: float = 8.0,
    seed: int,
    hidden: HiddenStates | None = None,
    max_batch_tokens: int | None = None,
    progress: OnProgress | None = None,
) -> WarmStartReport:
    """Set the head to the weighted logistic regression of the pseudo-labels on the base's hidden states.

    The paper fits by a pass of AdamW with weight 8 on positives (arXiv 2403.03870); this is the same objective's
    optimum, by L-BFGS on standardised features, with the L2 penalty that predicts held-out examples best.

    Args:
        base: frozen; its weights are only read.
        head: overwritten.
        examples: what the labels speak of.
        max_tokens: most target tokens to use, from examples in random order.
        positive_weight: weight of tokens labelled with an assistant, against 1.
        seed: of that order.
        hidden: the base's hidden states, where they were kept; it is not run then.
        max_batch_tokens: as in `scoring.write_scores`.
        progress: called with target tokens read and to be read.

    Raises:
        DataError: no token belongs to an assistant, so there is nothing to fit.
        MismatchError: the head does not fit the base or the labels.
        ConfigError: labels of other examples, or an option out of range.
    """
    _check(base, head, examples, labels, max_tokens, positive_weight)
    chosen = _choose(labels, max_tokens, seed)
    targets = torch.cat([labels.of(index) for index in chosen])[:max_tokens].to(base.device)
    if not (targets != 0).any():
        raise DataError(f"the warm start finds no positive among the {len(targets)} tokens it reads; {labels.report()}")
    features = _features(base, examples, chosen, hidden, max_batch_tokens, progress)[:max_tokens]
    mean, scale = _standardise(features)
    cut = sum(len(labels.of(index)) for index in chosen[: round((1 - HELD_OUT) * len(chosen))])
    trial = _choose_penalty(features, targets, cut, head.num_assistants, positive_weight)
    weight, bias = fit_authors(
        features, targets, trial.fit, positive_weight=positive_weight, penalty=trial.report.penalty
    )
    _set_head(head, weight, bias, mean, scale)
    return trial.report


@dataclass(frozen=True)
class _Trial:
    fit: tuple[Tensor, Tensor]
    report: WarmStartReport


def _check(
    base: LanguageModel,
    head: DeferralHead,
    examples: Sequence[Example],
    labels: Labels,
    max_tokens: int,
    positive_weight: float,
) -> None:
    if max_tokens < 1 or not positive_weight > 0:
        raise ConfigError(
            f"a warm start needs max_tokens >= 1 and positive_weight > 0, came {max_tokens} and {positive_weight}"
        )
    if len(examples) != len(labels):
        raise ConfigError(f"{len(labels)} examples were labelled, {len(examples)} came; label the same examples")
    if (head.hidden_size, head.num_assistants) != (base.hidden_size, labels.num_assistants):
        raise MismatchError(
            f"the head is for hidden size {head.hidden_size} and {head.num_assistants} assistants; {base.name} has "
            f"{base.hidden_size}, the labels have {labels.num_assistants}"
        )


def _choose(labels: Labels, max_tokens: int, seed: int) -> list[int]:
    """Examples in random order, until they hold `max_tokens` target tokens."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen: list[int] = []
    total = 0
    for index in order:
        if total >= max_tokens:
            break
        chosen.append(index)
        total += len(labels.of(index))
    return chosen


def _features(
    base: LanguageModel,
    examples: Sequence[Example],
    chosen: Sequence[int],
    hidden: HiddenStates | None,
    max_batch_tokens: int | None,
    progress: OnProgress | None,
) -> Tensor:
    """What the head reads at the target positions of the chosen examples, in their order: fp32, shape (M, H)."""
    if hidden is None:
        return _read_features(base, examples, chosen, max_batch_tokens, progress)
    return torch.cat([hidden.of(index) for index in chosen]).to(base.device, torch.float32)


def _read_features(
    base: LanguageModel,
    examples: Sequence[Example],
    chosen: Sequence[int],
    max_batch_tokens: int | None,
    progress: OnProgress | None,
) -> Tensor:
    """Run the base for them, in batches by length."""
    shifted = [shift(examples[index]) for index in chosen]
    counts = [int(one.mask.sum()) for one in shifted]
    starts = torch.tensor([0, *counts]).cumsum(0).tolist()
    features = torch.empty(starts[-1], base.hidden_size, device=base.device)
    training = base.module.training
    base.module.eval()
    done = 0
    try:
        for places in batches_by_length(
            [len(one.input_ids) for one in shifted], max_batch_tokens or batch_tokens_on(base.device)
        ):
            batch = pad([shifted[place] for place in places]).to(base.input_device)
            with torch.no_grad():
                hidden = base.hidden_states(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
            for row, place in enumerate(places):
                features[starts[place] : starts[place + 1]] = hidden[row, batch.mask[row].to(hidden.device)]
                done += counts[place]
            if progress is not None:
                progress(done, len(features))
    finally:
        base.module.train(training)
    return features


def _standardise(features: Tensor) -> tuple[Tensor, Tensor]:
    """Standardise in place; the mean and the factor of each feature, 0 for one that never varies."""
    variance, mean = torch.var_mean(features, dim=0, correction=0)
    std = variance.sqrt()
    scale = torch.where(std > 1e-6 * mean.abs(), 1 / std, 0.0)
    features.sub_(mean).mul_(scale)
    return mean, scale


def _choose_penalty(features: Tensor, targets: Tensor, cut: int, num_assistants: int, positive_weight: float) -> _Trial:
    """Fit the tokens before `cut` with ever weaker penalties, as long as those after it are predicted better.

    Where one of the parts has no positive, both are the whole.
    """
    whole, before, after = slice(None), slice(None, cut), slice(cut, None)
    parts = (before, after) if all((targets[part] != 0).any() for part in (before, after)) else (whole, whole)
    fit = (features.new_zeros(num_assistants, features.shape[1]), features.new_zeros(num_assistants))
    best: _Trial | None = None
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
        if best is not None and report.loss_nats > best.report.loss_nats:
            break  # weaker penalties fit the noise further, and take longest
        best = _Trial(fit, report)
    assert best is not None
    return best


@torch.no_grad()
def _set_head(head: DeferralHead, weight: Tensor, bias: Tensor, mean: Tensor, scale: Tensor) -> None:
    """Fold the standardisation into the head: w (h - mean) scale + b = (w scale) h + (b - (w scale) mean)."""
    weight, bias, mean, scale = (tensor.cpu().double() for tensor in (weight, bias, mean, scale))
    head.weight.copy_(weight * scale)
    head.bias.copy_(bias - (weight * scale) @ mean)
