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
from collm.models.loading import quiet_if_small
from collm.training.config import CoLLMConfig
from collm.training.fused import marginal_nll_sum
from collm.training.targets import needs_logits, read_segments, read_targets, scatter


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
                (B, T), and for segments scored and rows, as in `targets.shift`. For a frozen base its outputs instead:
                hidden, shape (B, T, H), base_logprob and base_correct, shape (B, T).

        Returns:
            loss: nats per target token. With per_token also base_logprob and base_correct, shape (B, T), and
            defer_logits, shape (B, T, K), all 0 outside of targets.
        """
        batch = {"target_mask": target_mask, "assistant_logprobs": assistant_logprobs, **inputs}
        tunes_base = torch.is_grad_enabled() and not self.frozen and not per_token
        if "hidden" not in batch:
            read = {name: values for name, values in inputs.items() if name not in ("gold", "scored", "rows")}
            with torch.set_grad_enabled(tunes_base):
                batch["hidden"] = self._model.hidden_states(**read, use_cache=False)
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
        defer_logits = self.head(hidden)  # (N, K)
        views = {}
        if tunes_base and self._law is None:
            nll = marginal_nll_sum(self._model, hidden, batch["gold"][mask], assistant_logprobs, defer_logits)
        else:
            with torch.set_grad_enabled(tunes_base):
                base_logprob, base_correct = self._read_base(batch)
            nll = -marginal_logprobs(base_logprob, assistant_logprobs, defer_logits).sum()
            views = {"base_logprob": base_logprob, "base_correct": base_correct, "defer_logits": defer_logits.float()}
        if any(self._deferral_costs):
            nll = nll + deferral_cost(defer_logits, self._deferral_costs)
        return nll, views

    def _read_base(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The base's log-probabilities and correctness at the targets, shape (N,)."""
        mask, hidden = batch["target_mask"], batch["hidden"]
        if "base_logprob" in batch:
            return batch["base_logprob"][mask], batch["base_correct"][mask]
        if self._law is None:
            return read_targets(self._model, hidden[mask], batch["gold"][mask])
        at = needs_logits(batch)
        gold, rows, scored = (batch[name][at] for name in ("gold", "rows", "scored"))
        return read_segments(self._model, hidden[at], gold, rows, scored, self._law)[:2]

    def train(self, mode: bool = True) -> JointModule:
        """Set the training mode, but keep a frozen base in evaluation mode, without dropout, as in decoding."""
        super().train(mode)
        if self.frozen:
            self.base.eval()
        return self

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Enable activation checkpointing of the base. Trainer calls this."""
        cast(Any, self.base).activation_checkpointing_enable(**options)


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
