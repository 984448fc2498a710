"""The joint model as one torch module: base, deferral head and the loss between them."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from collm.core.head import DeferralHead
from collm.core.objective import marginal_logprobs
from collm.core.segments import SegmentLaw
from collm.errors import ConfigError, MismatchError, MissingExtra
from collm.models.language_model import LanguageModel
from collm.models.progress import quiet_if_small
from collm.training.config import CoLLMConfig
from collm.training.fused import marginal_nll_sum
from collm.training.targets import read_segments, read_targets


class JointModule(nn.Module):
    """Base and head, with the marginal likelihood of gold tokens as loss (arXiv 2403.03870).

    The loss is computed inside `forward`, where wrappers for several devices have their hooks; nothing else of the
    base's forward pass is used than its hidden states, so logits exist only at target positions.

    Args:
        base: a transformers causal LM, or a PEFT model around one.
        head: the deferral head.
        frozen: the base takes no gradient and never enters training mode.
        vocab_size: as in `LanguageModel`.
        law: of the base's segments, where models have different tokenizers.

    Raises:
        MismatchError: the head is for another hidden size.
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
    ) -> None:
        super().__init__()
        self._law = law
        self.base = base
        self.head = head
        self.frozen = frozen
        self._model = LanguageModel(base, name="base", vocab_size=vocab_size)
        if head.hidden_size != self._model.hidden_size:
            raise MismatchError(
                f"the head reads hidden states of size {head.hidden_size}, the base has {self._model.hidden_size}"
            )
        if frozen:
            base.requires_grad_(False)

    @property
    def _no_split_modules(self) -> list[str]:
        """The base's layers, by which FSDP cuts the model."""
        return list(getattr(self._model.inner, "_no_split_modules", None) or [])

    # Compiled is what it calls of the base: the number of targets, which all else depends on, differs by batch.
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
        """Loss of a batch; position t speaks of the token after position t.

        Args:
            target_mask: true at target positions, shape (B, T).
            assistant_logprobs: of the gold tokens at target positions, nats, shape (B, T, K).
            assistant_correct: plays no part in the loss.
            num_items_in_batch: target tokens to divide by; by default those of this batch.
            per_token: also return what the tokens' measures need; the loss then has no gradient in the base.
            **inputs: gold, the tokens that follow, shape (B, T), and what the base reads: input_ids and
                attention_mask, shape (B, T); with segments also scored and rows, as of `targets.Batch`. Or, of a frozen
                base, what it said: hidden, shape (B, T, H), base_logprob and base_correct, shape (B, T).

        Returns:
            loss: nats per target token. With per_token also base_logprob and base_correct, shape (B, T), and
            defer_logits, shape (B, T, K), all 0 off the targets.
        """
        assistant_logprobs = assistant_logprobs[target_mask]
        if "rows" in inputs:
            nll, views = self._segments(target_mask, assistant_logprobs, **inputs)
        elif torch.is_grad_enabled() and not self.frozen and not per_token:
            gold = inputs.pop("gold")[target_mask]
            hidden = self._hidden_states(**inputs)[target_mask]  # (N, H)
            nll = marginal_nll_sum(self._model, hidden, gold, assistant_logprobs, self._defer_logits(hidden))
            views = {}
        else:
            hidden, base_logprob, base_correct = self._read(target_mask, **inputs)
            defer_logits = self._defer_logits(hidden)  # (N, K)
            nll = -marginal_logprobs(base_logprob, assistant_logprobs, defer_logits).sum()
            views = {"base_logprob": base_logprob, "base_correct": base_correct, "defer_logits": defer_logits.float()}
        result = {"loss": nll / (target_mask.sum() if num_items_in_batch is None else num_items_in_batch)}
        if per_token:
            result |= {name: _spread(values, target_mask) for name, values in views.items()}
        return result

    def _segments(
        self,
        target_mask: Tensor,
        assistant_logprobs: Tensor,
        gold: Tensor,
        scored: Tensor,
        rows: Tensor,
        **inputs: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of segments, summed, and what their measures need."""
        assert self._law is not None
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            hidden = self._hidden_states(**inputs)
            read = scored | (rows >= 0)
            of_read = gold[read], rows[read], scored[read]
            base_logprob, base_correct, _ = read_segments(self._model, hidden[read], *of_read, self._law)
        defer_logits = self._defer_logits(hidden[target_mask])
        nll = -marginal_logprobs(base_logprob, assistant_logprobs, defer_logits).sum()
        views = {"base_logprob": base_logprob, "base_correct": base_correct, "defer_logits": defer_logits.float()}
        return nll, views

    def _hidden_states(self, input_ids: Tensor, **inputs: Tensor) -> Tensor:
        return self._model.hidden_states(input_ids, use_cache=False, **inputs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _defer_logits(self, hidden: Tensor) -> Tensor:
        return cast(Tensor, self.head(hidden))

    @torch.no_grad()
    def _read(self, target_mask: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states (N, H), and log-probability and argmax (N,) of the gold tokens at the targets."""
        if "hidden" in inputs:
            hidden, base_logprob, base_correct = (inputs[name] for name in ("hidden", "base_logprob", "base_correct"))
            return hidden[target_mask], base_logprob[target_mask], base_correct[target_mask]
        gold = inputs.pop("gold")[target_mask]
        hidden = self._hidden_states(**inputs)[target_mask]
        return hidden, *read_targets(self._model, hidden, gold)

    def train(self, mode: bool = True) -> JointModule:
        """A frozen base stays in evaluation mode: its dropout would make it another model than the one decoded."""
        super().train(mode)
        if self.frozen:
            self.base.eval()
        return self

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Passed to the base; called by Trainer."""
        cast(Any, self.base).activation_checkpointing_enable(**options)


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    """Values of the target positions (N, ...) at their places: (B, T, ...), 0 elsewhere."""
    spread = values.new_zeros(*mask.shape, *values.shape[1:])
    spread[mask] = values
    return spread


def with_adapter(base: nn.Module, config: CoLLMConfig) -> nn.Module:
    """Wrap the base with a fresh LoRA adapter.

    Raises:
        MissingExtra: peft is not installed.
        ConfigError: the adapter would sit on the output layer, or on no layer.
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
        with torch.random.fork_rng():  # the adapter's random start depends on the seed and on nothing before
            torch.manual_seed(config.seed)
            with quiet_if_small(base):
                wrapped = get_peft_model(base, settings)
    except ValueError as error:
        raise ConfigError(f"LoRA does not fit the base: {error}") from error
    if isinstance(wrapped.get_base_model().get_output_embeddings(), BaseTunerLayer):
        wrapped.unload()
        raise ConfigError(
            f"lora_target_modules {config.resolved('lora_target_modules')!r} includes the output layer, which models "
            "tie to their embedding and serving engines leave out of adapters; name layers below it"
        )
    return cast(nn.Module, wrapped)
