"""Fit a head on stored hidden states until its loss no longer falls: L-BFGS, then Adam for a hidden layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from itertools import count, islice

import torch
from torch import Tensor
from torch.nn import functional as F

from collm.core.head import DeferralHead
from collm.core.objective import deferral_cost, token_nll

Examples = Sequence[Mapping[str, Tensor]]
"""Hidden states and scores of examples, as in `scores.stored_examples`."""
Rows = slice | Tensor
Loss = Callable[[Tensor, Rows], Tensor]
"""The mean loss over n of M tokens: from the layers' output for them, shape (n, K), and which they are."""
HELD_OUT = 0.2  # share of examples held out to choose the penalty and the epochs, and to measure the fit
PENALTIES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)  # L2 penalties to try on standardised inputs, strongest first
LEARNING_RATE, BATCH_SIZE, PATIENCE = 5e-4, 512, 3  # of a hidden layer: Adam's, tokens, epochs without progress


def fit_likelihood(head: DeferralHead, data: Examples, costs: Sequence[float], *, seed: int) -> float:
    """Minimise the marginal NLL plus deferral costs (`JointModule`) over a head, on stored hidden states.

    Returns the loss in nats on a fifth of the examples, held out by the seed, or on all if they are too few.
    """
    inputs, cut, values = gathered(head, data, seed)
    return fit_layers(head, inputs, cut, likelihood_loss(values, costs))[0]


def likelihood_loss(values: Mapping[str, Tensor], costs: Sequence[float]) -> Loss:
    """The loss of `fit_likelihood`; with fewer columns of u than assistants, that of the first of them alone."""

    def loss(u: Tensor, rows: Rows) -> Tensor:
        count = u.shape[-1]
        nll = token_nll(values["base_logprob"][rows], values["assistant_logprobs"][rows, :count], u).mean()
        return nll + deferral_cost(u, costs[:count]) / len(u) if any(costs) else nll

    return loss


def gathered(head: DeferralHead, data: Examples, seed: int) -> tuple[Tensor, int, dict[str, Tensor]]:
    """What a head reads of examples in random order, (M, H) or (M, H + 3); the number of tokens before those held out;
    and all other tensors of the examples. On the head's device, floats in fp32.
    """
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    examples = [data[index] for index in order]
    cut = sum(len(example["hidden"]) for example in examples[: round((1 - HELD_OUT) * len(order))])
    values = {name: one.to(head.weight.device) for name, one in concatenated(examples).items()}
    inputs = read_by(head, values)
    del values["hidden"], values["doubt"]
    return inputs, cut, values


def read_by(head: DeferralHead, values: Mapping[str, Tensor]) -> Tensor:
    """What a head reads of n tokens, shape (n, H) or (n, H + 3), on its device, fp32."""
    names = ("hidden", "doubt") if head.doubt else ("hidden",)
    return torch.cat([values[name].to(head.weight.device, torch.float32) for name in names], dim=-1)


def concatenated(examples: Examples) -> dict[str, Tensor]:
    """The tensors of all tokens, example by example."""
    return {name: torch.cat([example[name] for example in examples]) for name in examples[0]}


def fit_layers(head: DeferralHead, inputs: Tensor, cut: int, loss: Loss) -> tuple[float, float, Tensor]:
    """Set the layers of a head to those of least loss.

    The L2 penalty of the linear layer, and how long a hidden layer is trained, are those with the least loss on the
    tokens from `cut` on. Then all are used.

    Args:
        inputs: what the head reads, fp32, shape (M, H) or (M, H + 3). They are standardised in place.
        cut: number of tokens before those held out. If it leaves none on a side, none are held out.

    Returns:
        The held-out loss, the penalty, and the output of the layers on the held-out tokens, shape (n, K).
    """
    train, test = slice(cut), slice(cut, None)
    if not 0 < cut < len(inputs):
        train = test = slice(None)
    mean, scale = standardisation(inputs)
    inputs.sub_(mean).mul_(scale)
    fit = DeferralHead(inputs.shape[1], head.num_assistants).to(inputs.device)
    found = list[tuple[float, float, DeferralHead]]()
    for penalty in PENALTIES:
        fit_linear(fit, inputs, loss, train, penalty=penalty)
        found.append((loss(fit(inputs[test]), test).item(), penalty, deepcopy(fit)))
        if len(found) > 1 and found[-1][0] > found[-2][0]:
            break  # weaker penalties overfit more, and take longest
    least, penalty, best = min(found, key=lambda one: one[0])
    epochs = 0
    if head.width:
        least, epochs, best = _fit_units(_with_units(best, head.width), inputs, loss, (train, test), least)
    output = best(inputs[test]).detach()
    fit_linear(fit, inputs, loss, slice(None), penalty=penalty)
    if head.width:
        fit = _with_units(fit, head.width)
        list(islice(_epochs(fit, inputs, loss, slice(None)), epochs))
    with torch.no_grad():
        for layer in ("", "hidden_") if head.width else ("",):
            of_fit = fit.get_parameter(f"{layer}weight"), fit.get_parameter(f"{layer}bias")
            weight, bias = for_raw_inputs(*of_fit, mean, scale)
            head.get_parameter(f"{layer}weight").copy_(weight)
            head.get_parameter(f"{layer}bias").copy_(bias)
        if head.width:
            head.output_weight.copy_(fit.output_weight)
    return least, penalty, output


def standardisation(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of each feature, and the scale of `scale_of`."""
    variance, mean = torch.var_mean(inputs, dim=0, correction=0)
    return mean, scale_of(variance, mean)


def scale_of(variance: Tensor, mean: Tensor) -> Tensor:
    """What standardises features of this variance and mean: 1 / standard deviation, 0 for a constant feature."""
    return variance.rsqrt().masked_fill(variance.sqrt() <= 1e-6 * mean.abs(), 0.0)


def fit_linear(fit: DeferralHead, inputs: Tensor, loss: Loss, rows: slice, *, penalty: float) -> None:
    """Minimise the loss of these rows plus penalty / 2 |W|^2 over a linear head, from where it is."""
    part = inputs[rows]

    def penalised(weight: Tensor, bias: Tensor) -> Tensor:
        return loss(F.linear(part, weight, bias), rows) + penalty / 2 * weight.square().sum()

    with torch.no_grad():
        for parameter, value in zip((fit.weight, fit.bias), minimum(penalised, (fit.weight, fit.bias)), strict=True):
            parameter.copy_(value)


def minimum(loss: Callable[..., Tensor], start: Sequence[Tensor]) -> list[Tensor]:
    """The arguments that minimise a loss, by L-BFGS from a start."""
    found = [tensor.detach().clone().requires_grad_() for tensor in start]
    sizes = {"max_iter": 200, "history_size": 10}
    optimizer = torch.optim.LBFGS(found, tolerance_grad=1e-6, line_search_fn="strong_wolfe", **sizes)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(*found)
        value.backward()  # type: ignore[no-untyped-call]
        return value.detach()

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    return [tensor.detach() for tensor in found]


@torch.no_grad()
def _with_units(linear: DeferralHead, width: int) -> DeferralHead:
    """The same function, with a hidden layer to train."""
    fit = DeferralHead(linear.hidden_size, linear.num_assistants, width=width).to(linear.weight.device)
    fit.load_state_dict(linear.state_dict(), strict=False)
    return fit


def _fit_units(
    fit: DeferralHead, inputs: Tensor, loss: Loss, parts: tuple[slice, slice], least: float
) -> tuple[float, int, DeferralHead]:
    """Train until the held-out loss no longer falls. Returns the least, after how many epochs, and the head then."""
    best, epochs = deepcopy(fit), 0
    for epoch in _epochs(fit, inputs, loss, parts[0]):
        found = loss(fit(inputs[parts[1]]), parts[1]).item()
        if found < least:
            least, epochs, best = found, epoch, deepcopy(fit)
        elif epoch >= epochs + PATIENCE:
            break
    return least, epochs, best


def _epochs(fit: DeferralHead, inputs: Tensor, loss: Loss, rows: slice) -> Iterator[int]:
    """Train on these rows; the number of epochs after each."""
    optimizer = torch.optim.Adam(fit.parameters(), lr=LEARNING_RATE)
    numbers, generator = torch.arange(len(inputs))[rows], torch.Generator().manual_seed(0)
    size = max(1, min(BATCH_SIZE, len(numbers) // 16))  # an epoch has at least 16 steps
    for epoch in count(1):
        for part in torch.split(numbers[torch.randperm(len(numbers), generator=generator)], size):
            at = part.to(inputs.device)
            with torch.enable_grad():
                value = loss(fit(inputs[at]), at)
                value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
        yield epoch


def for_raw_inputs(weight: Tensor, bias: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """A layer of standardised inputs for the inputs: w (x - mean) scale + b = (w scale) x + (b - (w scale) mean)."""
    weight = weight.double() * scale.double()
    return weight, bias.double() - weight @ mean.double()
