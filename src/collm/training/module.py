"""The joint model as one torch module: base, deferral head and loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from collm.core.head import DeferralHead
from collm.core.objective import deferral_cost, marginal_logprobs
from collm.core.segments import SegmentLaw
from collm.errors import ConfigError, MismatchError, MissingExtra
from collm.models.language_model import LanguageModel
from collm.models.progress import quiet_if_small
from collm.training.config import CoLLMConfig
from collm.training.fused import marginal_nll_sum
from collm.training.targets import read_segments, read_targets


class JointModule(nn.Module):
    """Base and head, with the marginal likelihood of gold tokens as loss (arXiv 2403.03870).

    The likelihood alone is largest if every token is deferred at which the assistant is better, however small its gain
    is. A deferral cost c adds c (1 - P(Z = 0)) to the loss of each token. For a single token at which the assistant
    gains g nats, the best defer prob is then 1 / c - 1 / (exp(g) - 1), clamped to [0, 1]: it is 0 up to
    g = log(1 + c), and 1 from g = -log(1 - c) if c < 1.

    The loss is computed inside `forward`, because wrappers for several devices hook into it. The base computes hidden
    states only, and logits exist only at target positions.

    Args:
        base: a transformers causal LM, or a PEFT model around one.
        head: the deferral head.
        frozen: whether the base stays in evaluation mode without gradients.
        vocab_size: as in `LanguageModel`.
        law: the base's tokens that begin a segment, if models have different tokenizers.
        deferral_costs: c, in nats per token of each assistant; none by default.

    Raises:
        MismatchError: the head has another hidden size than the base.
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
    ) -> None:
        super().__init__()
        self._law = law
        self._deferral_costs = tuple(deferral_costs)
        self.base = base
        self.head = head
        self.frozen = frozen
        self._model = LanguageModel(base, name="base", vocab_size=vocab_size)
        if head.hidden_size != self._model.hidden_size:
            raise MismatchError(
                f"the head expects hidden states of size {head.hidden_size}, the base has {self._model.hidden_size}"
            )
        if frozen:
            base.requires_grad_(False)

    @property
    def _no_split_modules(self) -> list[str]:
        """The base's layer classes, which FSDP wraps."""
        return list(getattr(self._model.inner, "_no_split_modules", None) or [])

    # Only the base is compiled, because the number of targets differs between batches.
    @torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call, untyped-decorator]
    def forward(
        self,
        target_mask: Tensor,
        assistant_logprobs: Tensor,
        assistant_correct: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        *,
        per_token: bool = False,
        **inputs: Tensor,
    ) -> dict[str, Tensor]:
        """Compute the loss of a batch. Values at position t belong to the token that follows position t.

        Args:
            target_mask: true at target positions, shape (B, T).
            assistant_logprobs: log-probabilities of the gold tokens at target positions, nats, shape (B, T, K).
            assistant_correct: ignored.
            num_items_in_batch: number of target tokens to divide by; by default those of this batch.
            per_token: also return the values that `TokenViews` needs; the loss then has no gradient in the base.
            **inputs: gold, the gold tokens, shape (B, T), with the base's inputs: input_ids and attention_mask, shape
                (B, T), and for segments scored and rows, as in `targets.Batch`. For a frozen base its outputs instead:
                hidden, shape (B, T, H), base_logprob and base_correct, shape (B, T).

        Returns:
            loss: nats per target token. With per_token also base_logprob and base_correct, shape (B, T), and
            defer_logits, shape (B, T, K), all 0 outside of targets.
        """
        assistant_logprobs = assistant_logprobs[target_mask]
        if "rows" in inputs:
            nll, defer_logits, views = self._segments(target_mask, assistant_logprobs, **inputs)
        elif torch.is_grad_enabled() and not self.frozen and not per_token:
            gold = inputs.pop("gold")[target_mask]
            hidden = self._hidden_states(**inputs)[target_mask]  # (N, H)
            defer_logits = self._defer_logits(hidden)  # (N, K)
            nll = marginal_nll_sum(self._model, hidden, gold, assistant_logprobs, defer_logits)
            views = {}
        else:
            hidden, base_logprob, base_correct = self._read(target_mask, **inputs)
            defer_logits = self._defer_logits(hidden)  # (N, K)
            nll = self._nll(base_logprob, assistant_logprobs, defer_logits)
            views = {"base_logprob": base_logprob, "base_correct": base_correct, "defer_logits": defer_logits.float()}
        total = self._with_cost(nll, defer_logits)
        result = {"loss": total / (target_mask.sum() if num_items_in_batch is None else num_items_in_batch)}
        if per_token:
            result |= {name: _scatter(values, target_mask) for name, values in views.items()}
        return result

    @torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call, untyped-decorator]
    def _segments(
        self,
        target_mask: Tensor,
        assistant_logprobs: Tensor,
        gold: Tensor,
        scored: Tensor,
        rows: Tensor,
        **inputs: Tensor,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The summed NLL of segments, the defer logits (N, K), and the values that `TokenViews` needs."""
        assert self._law is not None
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            hidden = self._hidden_states(**inputs)
            read = scored | (rows >= 0)
            inputs_read = gold[read], rows[read], scored[read]
            base_logprob, base_correct, _ = read_segments(self._model, hidden[read], *inputs_read, self._law)
        defer_logits = self._defer_logits(hidden[target_mask])
        nll = self._nll(base_logprob, assistant_logprobs, defer_logits)
        views = {"base_logprob": base_logprob, "base_correct": base_correct, "defer_logits": defer_logits.float()}
        return nll, defer_logits, views

    def _hidden_states(self, input_ids: Tensor, **inputs: Tensor) -> Tensor:
        return self._model.hidden_states(input_ids, use_cache=False, **inputs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _defer_logits(self, hidden: Tensor) -> Tensor:
        return cast(Tensor, self.head(hidden))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _nll(self, base_logprob: Tensor, assistant_logprobs: Tensor, defer_logits: Tensor) -> Tensor:
        return -marginal_logprobs(base_logprob, assistant_logprobs, defer_logits).sum()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _with_cost(self, nll: Tensor, defer_logits: Tensor) -> Tensor:
        return nll + deferral_cost(defer_logits, self._deferral_costs) if any(self._deferral_costs) else nll

    @torch.no_grad()
    @torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call, untyped-decorator]
    def _read(self, target_mask: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states (N, H) at the targets, with log-probabilities and correctness (N,) of the gold tokens."""
        if "hidden" in inputs:
            hidden, base_logprob, base_correct = (inputs[name] for name in ("hidden", "base_logprob", "base_correct"))
            return hidden[target_mask], base_logprob[target_mask], base_correct[target_mask]
        gold = inputs.pop("gold")[target_mask]
        hidden = self._hidden_states(**inputs)[target_mask]
        return hidden, *read_targets(self._model, hidden, gold)

    def train(self, mode: bool = True) -> JointModule:
        """Set the training mode, but keep a frozen base in evaluation mode, without dropout, as in decoding."""
        super().train(mode)
        if self.frozen:
            self.base.eval()
        return self

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Enable activation checkpointing of the base. Trainer calls this."""
        cast(Any, self.base).activation_checkpointing_enable(**options)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _scatter(values: Tensor, mask: Tensor) -> Tensor:
    """Scatter values of target positions (N, ...) to (B, T, ...), with 0 elsewhere."""
    scattered = values.new_zeros(*mask.shape, *values.shape[1:])
    scattered[mask] = values
    return scattered


def with_adapter(base: nn.Module, config: CoLLMConfig) -> nn.Module:
    """Wrap the base with a new LoRA adapter.

    Raises:
        MissingExtra: peft is not installed.
        ConfigError: the adapter would modify the output layer, or no layer.
    """
    try:
        from peft import LoraConfig, get_peft_model
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as error:
        raise MissingExtra("peft", "train") from error
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.resolved("lora_r"),
        lora_alpha=config.resolved("lora_alpha"),
        lora_dropout=config.resolved("lora_dropout"),
        target_modules=config.resolved("lora_target_modules"),
    )
    try:
        with torch.random.fork_rng():  # the adapter's initial weights depend on the seed only
            torch.manual_seed(config.seed)
            with quiet_if_small(base):
                wrapped = get_peft_model(base, settings)
    except ValueError as error:
        raise ConfigError(f"LoRA cannot be applied to the base: {error}") from error
    if isinstance(wrapped.get_base_model().get_output_embeddings(), BaseTunerLayer):
        wrapped.unload()
        raise ConfigError(
            f"lora_target_modules {config.resolved('lora_target_modules')!r} includes the output layer, which may be "
            "tied to the embedding and is not supported in adapters by serving engines; name other layers"
        )
    return cast(nn.Module, wrapped)
