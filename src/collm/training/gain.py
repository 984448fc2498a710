"""Fit a head to the assistants' gain over the base on stored hidden states: a linear one in closed form (ridge)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from collm.core.head import DeferralHead
from collm.core.objective import clipped_gains
from collm.errors import DataError
from collm.training.fitting import HELD_OUT, Examples, Rows, fit_layers, gathered, read_by, scale_of

PENALTIES = tuple(10.0**power for power in range(1, -6, -1))  # L2 penalties to try on standardised features
EXAMPLES_AT_ONCE = 32  # whose hidden states are in memory, in fp64
FOLDS = 5


@torch.no_grad()
def fit_gain(head: DeferralHead, data: Examples, *, clip: float, seed: int, new: int = 0) -> dict[str, float]:
    """Set the head to predict clip(log P_k - log P_0, -clip, clip) of the gold token, in nats, for each assistant k.

    Its output is then the expected gain of a deferral. It minimises the squared error over all tokens plus an L2
    penalty on standardised features. The penalty is the one with the least error on a fifth of the examples, held out
    by the seed; then all examples are used. Without a hidden layer, only H x H sums are kept, so any number of tokens
    fits in memory.

    Args:
        data: examples as in `scores.stored_examples`.
        new: set only so many rows, the last ones, for the assistants of the data. All else stays, so a hidden layer is
            an input.

    Returns:
        error_nats and spread_nats: root mean squared error of the predicted gain, and standard deviation of the gain
        itself (the error of always predicting its mean), on held-out examples, or on all if there are too few to hold
        any out. mean_nats and num_tokens: mean of the clipped gain over all tokens and assistants, and the number of
        tokens. penalty: the chosen L2 penalty.
    """
    if head.width and not new:
        return _fit_units(head, data, clip, seed)
    width, first = head.weight.shape[1], head.num_assistants - new if new else 0
    size = width + head.width
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    cut = round((1 - HELD_OUT) * len(order))
    sums = [_sums(head, data, part, clip) for part in (order[:cut], order[cut:]) if part]
    errors = [_squared_error(_ridge(sums[0], size, penalty), sums[-1]) for penalty in PENALTIES]
    penalty = PENALTIES[min(range(len(errors)), key=errors.__getitem__)]
    total = torch.stack(sums).sum(0)
    fit = _ridge(total, size, penalty)
    head.weight[first:], head.bias[first:] = fit[:width].T, fit[size]
    if head.width:
        head.output_weight[first:] = fit[width:size].T
    held_out, num_tokens = sums[-1] / sums[-1][size, size], total[size, size].item()
    variance = (held_out.diagonal() - held_out[size].square())[size + 1 :].mean().clamp(min=0)
    mean = (total[size, size + 1 :] / num_tokens).mean().item()
    return _report(min(errors), variance.sqrt().item(), mean, round(num_tokens), penalty)


def _fit_units(head: DeferralHead, data: Examples, clip: float, seed: int) -> dict[str, float]:
    inputs, cut, values = gathered(head, data, seed)
    gains = clipped_gains(values["base_logprob"], values["assistant_logprobs"], clip)

    def loss(predicted: Tensor, rows: Rows) -> Tensor:
        return (predicted - gains[rows]).square().mean()

    error, penalty, output = fit_layers(head, inputs, cut, loss)
    spread = gains[-len(output) :].std(0, correction=0).square().mean().sqrt().item()
    return _report(error, spread, gains.mean().item(), len(gains), penalty)


def _report(error: float, spread: float, mean: float, num_tokens: int, penalty: float) -> dict[str, float]:
    nats = {"error_nats": error**0.5, "spread_nats": spread, "mean_nats": mean}
    return {**nats, "num_tokens": num_tokens, "penalty": penalty}


@torch.no_grad()
def crossed_gains(
    head: DeferralHead, data: Examples, *, clip: float, seed: int, sizes: Sequence[int] = (FOLDS - 1,)
) -> list[Tensor]:
    """The gains that heads predict for examples that they were not fitted to, for each number of folds in `sizes`.

    The examples are divided at random into `FOLDS` folds. Each fold's gains are predicted by the fit of `fit_gain` to
    the next `size` folds. The penalty is the one with the least error over all folds. `head` is not changed.

    Args:
        data: examples with hidden (n, H), doubt (n, 3) if the head reads it, base_logprob (n,) and assistant_logprobs
            (n, K), at least one for each fold.

    Returns:
        For each size, gains in nats, fp64, shape (M, K), example by example.
    """
    if len(data) < FOLDS:
        raise DataError(f"{len(data)} examples are too few for cross-validation, expected at least {FOLDS}")
    size, generator = head.weight.shape[1], torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data), generator=generator).tolist()
    folds = [order[fold::FOLDS] for fold in range(FOLDS)]
    sums = [_sums(head, data, fold, clip) for fold in folds]
    found = []
    for number in sizes:
        rings = [[sums[(fold + step) % FOLDS] for step in range(1, number + 1)] for fold in range(FOLDS)]
        fits = [[_ridge(torch.stack(ring).sum(0), size, penalty) for ring in rings] for penalty in PENALTIES]
        fit = min(fits, key=lambda each: sum(map(_squared_error, each, sums)))
        gains = dict[int, Tensor]()
        for fold, each in zip(folds, fit, strict=True):
            gains |= {i: _inputs(head, data[i]).to(each) @ each[:size] + each[size] for i in fold}
        found.append(torch.cat([gains[i] for i in range(len(data))]))
    return found


def _sums(head: DeferralHead, data: Examples, indices: Sequence[int], clip: float) -> Tensor:
    """The sum of z z^T over the target tokens of these examples, with z = (inputs, 1, gains), fp64."""
    total = head.weight.new_zeros((), dtype=torch.float64)
    for start in range(0, len(indices), EXAMPLES_AT_ONCE):
        examples = [data[index] for index in indices[start : start + EXAMPLES_AT_ONCE]]
        names = ["base_logprob", "assistant_logprobs"]
        base, assistants = (torch.cat([one[name] for one in examples]).to(total) for name in names)
        inputs = torch.cat([_inputs(head, one) for one in examples]).to(total)
        z = torch.cat([inputs, torch.ones_like(base)[:, None], clipped_gains(base, assistants, clip)], dim=-1)
        total = total + z.T @ z
    return total


def _inputs(head: DeferralHead, example: Mapping[str, Tensor]) -> Tensor:
    """What the output of the head is linear in: what it reads of n tokens, and its hidden units, shape (n, I)."""
    inputs = read_by(head, example)
    return torch.cat([inputs, head.units(inputs)], dim=-1) if head.width else inputs


def _ridge(sums: Tensor, size: int, penalty: float) -> Tensor:
    """The weights and the intercept, (H + 1, K), that minimise mean |x W + b - y|^2 + penalty |scaled W|^2."""
    moments = sums / sums[size, size]
    mean, gains = moments[:size, size], moments[size, size + 1 :]
    covariance = moments[:size, :size] - mean.outer(mean)
    scale = scale_of(covariance.diagonal().clamp(min=0), mean)
    correlation = scale[:, None] * covariance * scale
    with_gains = scale[:, None] * (moments[:size, size + 1 :] - mean.outer(gains))
    weight = scale[:, None] * torch.linalg.solve(correlation + penalty * torch.eye(size).to(mean), with_gains)
    return torch.cat([weight, (gains - mean @ weight)[None]])


def _squared_error(fit: Tensor, sums: Tensor) -> float:
    """The mean of (x W + b - y)^2 over tokens and assistants."""
    residual = torch.cat([fit, -torch.eye(fit.shape[1]).to(fit)])  # z @ residual = x W + b - y
    total = (residual * (sums @ residual)).sum(0).mean().clamp(min=0)
    return (total / sums[len(fit) - 1, len(fit) - 1]).item()
