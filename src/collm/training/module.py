"""The joint model as one torch module: base, deferral head, and a loss that needs no (B, T, V) tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from collm.core.head import DeferralHead
from collm.core.objective import (
    WEAK_POSITIVE_WEIGHT,
    Objective,
    deferral_cost,
    label_nll,
    pseudo_labels,
    token_nll,
)
from collm.core.segments import SegmentLaw
from collm.errors import ConfigError, MismatchError, MissingExtra, UnsupportedModel
from collm.models.language_model import LanguageModel
from collm.models.loading import quiet_if_small
from collm.training.config import CoLLMConfig
from collm.training.examples import scatter
from collm.training.scoring import read_gold

MIN_ROWS = 64  # target positions per chunk, at least. Matrix products over fewer rows are inefficient.


class JointModule(nn.Module):
    """Base and head, with the marginal likelihood of gold tokens as loss (arXiv 2403.03870), or another objective.

    The likelihood alone is largest if every token is deferred at which the assistant is better, however small its gain
    is. A deferral cost c adds c (1 - P(Z = 0)) to the loss of each decision. For a single one by which the assistant
    gains g nats, the best defer prob is then 1 / c - 1 / (exp(g) - 1), clamped to [0, 1]: it is 0 up to
    g = log(1 + c), and 1 from g = -log(1 - c) if c < 1.

    The loss is computed inside `forward`, because wrappers for several devices hook into it. The base computes hidden
    states only, and logits exist only at target positions.

    Args:
        base: a transformers causal LM, or a PEFT model around one.
        frozen: whether the base stays in evaluation mode without gradients.
        vocab_size: as in `LanguageModel`.
        law: the base's tokens that begin a segment, if models have different tokenizers.
        deferral_costs: c, in nats per decision for each assistant; none by default.
        objective: as in `core.objective.token_nll`.
    """

    accepts_loss_kwargs = True  # tells Trainer to pass num_items_in_batch
    _keys_to_ignore_on_save = None

    def __init__(
        self,
        base: nn.Module,
        head: DeferralHead,
        *,
        frozen: bool = False,
        vocab_size: int | None = None,
        law: SegmentLaw | None = None,
        deferral_costs: Sequence[float] = (),
        objective: Objective = "marginal",
    ) -> None:
        super().__init__()
        self._law = law
        self._deferral_costs = tuple(deferral_costs)
        self._objective = objective
        self.base = base
        self.head = head
        self.frozen = frozen
        self.base_lm = LanguageModel(base, name="base", vocab_size=vocab_size)
        if head.hidden_size != (size := self.base_lm.hidden_size):
            raise MismatchError(f"the head expects hidden states of size {head.hidden_size}, the base has {size}")
        self._no_split_modules = getattr(self.base_lm.inner, "_no_split_modules", None) or []  # FSDP wraps these
        if frozen:
            base.requires_grad_(False)

    # Only the base is compiled, because the number of targets differs between batches.
    @torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call, untyped-decorator]
    def forward(
        self,
        target_mask: Tensor,
        assistant_logprobs: Tensor,
        num_items_in_batch: Tensor | int | None = None,
        *,
        per_token: bool = False,
        **inputs: Tensor,
    ) -> dict[str, Tensor]:
        """Compute the loss of a batch. Values at position t belong to the token that follows position t.

        Args:
            target_mask: true at target positions, shape (B, T).
            assistant_logprobs: log-probabilities of the gold tokens at target positions, nats, shape (B, T, K).
            num_items_in_batch: number of target tokens to divide by; by default those of this batch.
            per_token: also return the values that `TokenViews` needs; the loss then has no gradient in the base.
            **inputs: gold, the gold tokens, with the base's inputs, shape (B, T), and for segments scored and rows, as
                in `examples.shift`. The objective "weak" makes pseudo-labels of assistant_correct, whether the gold
                token is each assistant's argmax, bool, shape (B, T, K), and base_correct, the same of the base before
                training, shape (B, T).

        Returns:
            loss: nats per target token. With per_token also base_logprob and base_correct, shape (B, T), and
            defer_logits, shape (B, T, K), all 0 outside of targets.
        """
        tunes_base = torch.is_grad_enabled() and not self.frozen and not per_token
        others = ("gold", "scored", "rows", "base_correct", "assistant_correct")
        read = {name: values for name, values in inputs.items() if name not in others}
        with torch.set_grad_enabled(tunes_base):
            hidden = self.base_lm.hidden_states(**read, use_cache=False)
        batch = {"target_mask": target_mask, "assistant_logprobs": assistant_logprobs, "hidden": hidden, **inputs}
        total, views = self._loss(batch, tunes_base=tunes_base)
        result = {"loss": total / (target_mask.sum() if num_items_in_batch is None else num_items_in_batch)}
        if per_token:
            result |= {name: scatter(values, target_mask) for name, values in views.items()}
        return result

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _loss(self, batch: dict[str, Tensor], *, tunes_base: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the loss over the targets, and the values that `TokenViews` needs unless the base is tuned."""
        mask = batch["target_mask"]
        hidden, assistant_logprobs = batch["hidden"][mask], batch["assistant_logprobs"][mask]  # (N, H), (N, K)
        views, doubt = {}, None
        if tunes_base and self._law is None:
            if self.head.doubt:  # computes the logits a second time, as the loss needs the head's output before them
                with torch.no_grad():
                    doubt = read_gold(self.base_lm, batch["hidden"], batch, doubt=True)["doubt"]
            defer_logits = self.head(hidden, doubt)  # (N, K)
            of_tokens = (hidden, batch["gold"][mask], assistant_logprobs, defer_logits)
            nll = marginal_nll_sum(self.base_lm, *of_tokens, objective=self._objective)
        else:
            with torch.set_grad_enabled(tunes_base):
                scores = read_gold(self.base_lm, batch["hidden"], batch, self._law, doubt=self.head.doubt)
            defer_logits = self.head(hidden, scores.get("doubt"))
            views = {"base_logprob": scores["logprob"], "base_correct": scores["correct"], "defer_logits": defer_logits}
            nll = token_nll(views["base_logprob"], assistant_logprobs, defer_logits, self._objective).sum()
        if self._objective == "weak":
            labels = pseudo_labels(batch["base_correct"][mask], batch["assistant_correct"][mask], assistant_logprobs)
            nll = nll + label_nll(defer_logits, labels, WEAK_POSITIVE_WEIGHT).sum() / 3
        if any(self._deferral_costs):
            nll = nll + deferral_cost(defer_logits, self._deferral_costs)
        return nll, views

    def train(self, mode: bool = True) -> JointModule:
        """Set the training mode, but keep a frozen base in evaluation mode, without dropout, as in decoding."""
        super().train(mode)
        if self.frozen:
            self.base.eval()
        return self

    def activation_checkpointing_enable(self, **options: Any) -> None:  # called by Trainer
        cast(Any, self.base).activation_checkpointing_enable(**options)


def marginal_nll_sum(
    model: LanguageModel,
    hidden: Tensor,
    gold: Tensor,
    assistant_logprobs: Tensor,
    defer_logits: Tensor,
    *,
    objective: Objective = "marginal",
) -> Tensor:
    """Sum of the negative log marginal likelihood of N gold tokens, or of another objective (`token_nll`).

    The forward pass processes positions in chunks whose logits take no more memory than all hidden states (but at
    least `MIN_ROWS` positions). It also computes each chunk's gradient, through the output layer to the hidden states:
    d NLL / d logit_v = P(Z = base | x_<=t) (P_0(v) - [v = gold]), with "separate" P_0(v) - [v = gold]. Nothing is
    recomputed, and the backward pass only scales. Under autocast the matrix products use its dtype, and the likelihood
    fp32.

    Args:
        model: the model with the output layer, which must not be quantized.
        hidden: last hidden states at target positions, shape (N, H).
        gold, assistant_logprobs: gold tokens, shape (N,), and their log-probabilities, nats, shape (N, K).
        defer_logits: u, shape (N, K).

    Returns:
        A scalar in nats, fp32; differentiable once.
    """
    weight, bias = model.output_weight, model.output_bias
    if not weight.is_floating_point():
        raise UnsupportedModel(f"the output layer of {model.name} is {weight.dtype}; leave it unquantized for training")
    values = (hidden.to(weight.device), gold.to(weight.device), assistant_logprobs, defer_logits)
    return cast(Tensor, _MarginalNLL.apply(model, objective, weight, bias, *values))  # type: ignore[no-untyped-call]


class _MarginalNLL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, model: LanguageModel, objective: Objective, weight: Tensor, bias: Tensor | None, *values: Tensor
    ) -> Tensor:
        """The sum over chunks, with the gradients of output weight, output bias, hidden states and defer logits."""
        hidden, gold, assistant_logprobs, defer_logits = values
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        layer, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
        needs_weight, needs_bias, needs_hidden = ctx.needs_input_grad[2:5]
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
                chunk = (gold[part], assistant_logprobs[part], defer_logits[part])
                nll, raw_grad, defer_grad[part] = _likelihood(model, objective, raw, *chunk)
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
        return None, None, weight, bias, hidden, None, None, defer_logits


def _likelihood(
    model: LanguageModel,
    objective: Objective,
    raw: Tensor,
    gold: Tensor,
    assistant_logprobs: Tensor,
    defer_logits: Tensor,
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
        nll = token_nll(base, assistant_logprobs, defer, objective).sum()
    # base_grad is minus the posterior of the base, or a constant
    base_grad, defer_grad = torch.autograd.grad(nll, (base, defer), materialize_grads=True)
    grad = probs.mul_(-base_grad.unsqueeze(-1)).scatter_add_(-1, gold.unsqueeze(-1), base_grad.unsqueeze(-1))
    (raw_grad,) = torch.autograd.grad(logits, raw, grad.to(logits.dtype)) if logits is not raw else (grad,)
    return nll.detach(), raw_grad.to(raw.dtype), defer_grad


def with_adapter(base: nn.Module, config: CoLLMConfig) -> nn.Module:
    """Wrap the base with a new LoRA adapter."""
    try:
        from peft import LoraConfig, get_peft_model
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as error:
        raise MissingExtra("peft", "train") from error
    targets = config.resolved("lora_target_modules")
    options = {name: config.resolved(name) for name in ("lora_alpha", "lora_dropout")}
    settings = LoraConfig(task_type="CAUSAL_LM", r=config.resolved("lora_r"), target_modules=targets, **options)
    try:
        with torch.random.fork_rng(), quiet_if_small(base):
            torch.manual_seed(config.seed)  # the adapter's initial weights depend on the seed only
            wrapped = get_peft_model(base, settings)
    except ValueError as error:
        raise ConfigError(f"LoRA cannot be applied to the base: {error}") from error
    if isinstance(wrapped.get_base_model().get_output_embeddings(), BaseTunerLayer):
        wrapped.unload()
        reason = "which may be tied to the embedding and is not supported in adapters by serving engines"
        raise ConfigError(f"lora_target_modules {targets!r} includes the output layer, {reason}; name other layers")
    return cast(nn.Module, wrapped)
