"""The marginal likelihood and its gradient through the output layer, computed in chunks without a (B, T, V) tensor."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from collm.core.objective import marginal_logprobs
from collm.errors import UnsupportedModel
from collm.models.language_model import LanguageModel

MIN_ROWS = 64
"""Smallest number of target positions per chunk. Matrix products over fewer rows are inefficient."""


def marginal_nll_sum(
    model: LanguageModel, hidden: Tensor, gold: Tensor, assistant_logprobs: Tensor, defer_logits: Tensor
) -> Tensor:
    """Sum of the negative log marginal likelihood of N gold tokens (`core.objective.marginal_logprobs`).

    The forward pass processes positions in chunks whose logits take no more memory than all hidden states (but at
    least `MIN_ROWS` positions). It also computes each chunk's gradient, through the output layer to the hidden states:
    d NLL / d logit_v = P(Z = base | x_<=t) (P_0(v) - [v = gold]). Nothing is recomputed, and the backward pass only
    scales. Under autocast the matrix products use its dtype, and the likelihood fp32.

    Args:
        model: the model with the output layer.
        hidden: last hidden states at target positions, shape (N, H).
        gold: gold tokens, shape (N,).
        assistant_logprobs: log-probabilities of the gold tokens, nats, shape (N, K).
        defer_logits: u, shape (N, K).

    Returns:
        A scalar in nats, fp32; differentiable once.

    Raises:
        UnsupportedModel: the output layer is quantized.
    """
    weight, bias = model.output_weight, model.output_bias
    if not weight.is_floating_point():
        raise UnsupportedModel(
            f"the output layer of {model.name} has weights of {weight.dtype}; leave it unquantized for training"
        )
    values = (hidden.to(weight.device), gold.to(weight.device), assistant_logprobs, defer_logits)
    return cast(Tensor, _MarginalNLL.apply(model, weight, bias, *values))  # type: ignore[no-untyped-call]


class _MarginalNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, model: LanguageModel, weight: Tensor, bias: Tensor | None, *values: Tensor) -> Tensor:
        """The sum over chunks, with the gradients of output weight, output bias, hidden states and defer logits."""
        hidden, gold, assistant_logprobs, defer_logits = values
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        layer, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
        needs_weight, needs_bias, needs_hidden = ctx.needs_input_grad[1:4]
        # sums over chunks need the precision of fp32
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        bias_grad = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needs_bias else None
        hidden_grad = torch.empty_like(hidden) if needs_hidden else None
        defer_grad = torch.empty_like(defer_logits)
        total = hidden.new_zeros((), dtype=torch.float32)
        rows = max(MIN_ROWS, hidden.numel() // weight.shape[0])
        with torch.autocast(kind, enabled=False):
            for start in range(0, len(hidden), rows):
                part = slice(start, start + rows)
                states = hidden[part].to(dtype)
                raw = F.linear(states, layer, offset)  # (n, V)
                nll, raw_grad, defer_grad[part] = _likelihood(
                    model, raw, gold[part], assistant_logprobs[part], defer_logits[part]
                )
                total += nll
                if hidden_grad is not None:
                    hidden_grad[part] = raw_grad @ layer
                if weight_grad is not None and dtype == torch.float32:
                    weight_grad.addmm_(raw_grad.T, states)  # without a temporary
                elif weight_grad is not None:
                    weight_grad += raw_grad.T @ states
                if bias_grad is not None:
                    bias_grad += raw_grad.sum(0, dtype=torch.float32)
        of_layer = (None if grad is None else grad.to(weight.dtype) for grad in (weight_grad, bias_grad))
        ctx.grads = [*of_layer, hidden_grad, defer_grad]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("the gradient of this loss was already computed; compute the loss again")
        weight, bias, hidden, defer_logits = (None if grad is None else grad.mul_(upstream) for grad in ctx.grads)
        ctx.grads = None
        return None, weight, bias, hidden, None, None, defer_logits


def _likelihood(
    model: LanguageModel, raw: Tensor, gold: Tensor, assistant_logprobs: Tensor, defer_logits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum over a chunk and its gradients with respect to the output layer's values and the defer logits."""
    with torch.enable_grad():
        raw.requires_grad_()
        logits = model.shape_logits(raw)
    probs = logits.detach().float()  # overwritten below, as it is a copy or nothing else reads it
    gold_logit = probs.gather(-1, gold.unsqueeze(-1))  # (n, 1)
    largest = probs.amax(-1, keepdim=True)
    norm = probs.sub_(largest).exp_().sum(-1, keepdim=True)
    probs.div_(norm)
    base_logprob = (gold_logit - largest - norm.log()).squeeze(-1)
    with torch.enable_grad():
        base, defer = base_logprob.requires_grad_(), defer_logits.detach().requires_grad_()
        nll = -marginal_logprobs(base, assistant_logprobs, defer).sum()
    base_grad, defer_grad = torch.autograd.grad(nll, (base, defer))  # base_grad: minus the posterior of the base
    grad = probs.mul_(-base_grad.unsqueeze(-1)).scatter_add_(-1, gold.unsqueeze(-1), base_grad.unsqueeze(-1))
    (raw_grad,) = torch.autograd.grad(logits, raw, grad.to(logits.dtype)) if logits is not raw else (grad,)
    return nll.detach(), raw_grad.to(raw.dtype), defer_grad
