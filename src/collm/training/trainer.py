"""A transformers Trainer for the joint model, which reads scores instead of running the assistants."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, PreTrainedModel, Trainer, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from collm.core.head import DeferralHead
from collm.errors import ConfigError, DataError, MismatchError, ModelFailure, WriteError
from collm.models.language_model import LanguageModel
from collm.models.members import spec_of
from collm.training.checkpoints import ORIGIN, STATE, check_origin, last_checkpoint, load_tuned, read_tuned, save_tuned
from collm.training.config import CoLLMConfig
from collm.training.examples import collate, collate_padding_free
from collm.training.inspection import LabelReport, TokenViews, label_tokens
from collm.training.module import JointModule, with_adapter
from collm.training.scores import TrainingSet
from collm.training.scoring import evaluating, progress_bar
from collm.training.warm_start import WarmStartReport, warm_start

logger = logging.getLogger(__name__)


class CoLLMTrainer(Trainer):  # type: ignore[misc]
    """Trains a base and its deferral head on the marginal likelihood (arXiv 2403.03870).

    After `train`, `base` and `head` are tuned. With method "lora", `base` is a `PeftModel`.

    Args:
        base, head: the causal LM and the deferral head to tune, in place.
        train_dataset: examples with the assistants' scores, and for a warm start the base's.
        eval_dataset: examples with scores for `evaluate`.
        vocab_size: the vocabulary size of the base's tokenizer.

    Attributes:
        label_report, warm_start_report: results of the warm start; None before it.
        origin: fingerprints of the rows and identities of the models, which checkpoints record.

    Raises:
        ConfigError: the options do not match the data or the base.
        MismatchError: base, head and scores do not match.
        MissingExtra: method "lora" without peft installed.
    """

    optimizer: Any
    data_collator: Any
    control: Any

    def __init__(
        self,
        base: PreTrainedModel,
        head: DeferralHead,
        args: CoLLMConfig,
        train_dataset: TrainingSet,
        eval_dataset: TrainingSet | None = None,
        *,
        vocab_size: int | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        _check(base, head, args, train_dataset, eval_dataset)
        self.label_report: LabelReport | None = None
        self.warm_start_report: WarmStartReport | None = None
        spec, callbacks = spec_of(base), [*callbacks]
        self.origin: dict[str, Any] = {
            "examples": train_dataset.fingerprint,
            "evaluation": None if eval_dataset is None else eval_dataset.fingerprint,
            "base": None if spec is None else spec.identity()["weights"] or spec.identity()["revision"],
            "assistants": [dict(scores.model) for scores in train_dataset.assistant_scores],
        }
        if (patience := args.early_stopping_patience) is not None:
            callbacks.append(EarlyStoppingCallback(early_stopping_patience=patience))
        if args.method == "full":
            base.requires_grad_(True)
        self.head = head
        self.base = with_adapter(base, args) if args.method == "lora" else base
        self.joint = JointModule(
            self.base,
            head,
            frozen=args.method == "head",
            vocab_size=vocab_size,
            law=train_dataset.examples[0].law,
            deferral_costs=args.deferral_costs(head.num_assistants),
        )
        super().__init__(
            self.joint,
            args,
            data_collator=collate_padding_free if args.padding_free else collate,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
        )
        if is_deepspeed_zero3_enabled():  # the loss uses this weight outside of its layer
            import deepspeed

            deepspeed.zero.register_external_parameter(self.joint, self.joint.base_lm.output_weight)
        if args.padding_free and not train_dataset.from_hidden_states:
            with self.accelerator.autocast():
                _check_padding_free(self.joint.base_lm)

    def gathered(self) -> tuple[nn.Module, DeferralHead]:
        """Gather base and head from all devices. Every process must call it."""
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            return self.base, self.head
        place = Path(self.args.output_dir) / "gathered"
        self.save_model(str(place))
        self.accelerator.wait_for_everyone()
        return read_tuned(place, self.joint, self.args.method)

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, **options: Any) -> Any:
        """Warm-start the head if configured, then train.

        Args:
            resume_from_checkpoint: a checkpoint, or True for the last complete one in the output directory. The run
                continues as if it had not been interrupted.

        Raises:
            ConfigError: there is no checkpoint to resume from, it was trained on other rows or models, or the output
                directory has checkpoints of another run.
            ArtefactError: the checkpoint is incomplete or damaged.
            ModelFailure: the loss is not finite.
        """
        found = last_checkpoint(Path(self.args.output_dir))
        if not resume_from_checkpoint:
            if found is not None:
                raise ConfigError(f"{found} is from an earlier run; resume, delete it, or choose another output_dir")
            if self.args.warm_start:
                self._warm_start()
            return super().train(None, **options)
        checkpoint = found if resume_from_checkpoint is True else Path(resume_from_checkpoint)
        if checkpoint is None:
            raise ConfigError(f"{self.args.output_dir} has no complete checkpoint to resume from; start anew")
        check_origin(checkpoint, self.origin)
        return super().train(str(checkpoint), **options)

    def _warm_start(self) -> None:
        data, variant = self.train_dataset, self.args.resolved("pseudo_label_variant")
        labels = _, self.label_report = label_tokens(data.base_scores, data.assistant_scores, variant)
        logger.info("%s", self.label_report)
        base = data.base_scores.hidden or self.joint.base_lm
        with progress_bar("Warm start", enabled=not self.args.disable_tqdm) as progress:
            self.warm_start_report = warm_start(base, self.head, data.examples, labels, self.args, progress=progress)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Compute the loss with Trainer, which passes the number of target tokens of the effective batch."""
        result = super().compute_loss(model, inputs, *args, **kwargs)
        loss = result[0] if isinstance(result, tuple) else result
        if not torch.isfinite(loss):
            advice = "check the base's weights and dtype, or lower the learning rates"
            raise ModelFailure(f"the loss is {loss.item()} at step {self.state.global_step + 1}; {advice}")
        return result

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor | None:
        """Number of target tokens of an optimiser step, over all its batches and processes."""
        if not batch_samples:
            return None
        number = torch.stack([batch["target_mask"].sum() for batch in batch_samples]).sum().to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            number = self.accelerator.gather(number).sum()
        return number

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """Create parameter groups for the base with and without weight decay, and for the head."""
        if self.optimizer is None:
            model = self.model if model is None else model
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            decayed = set(self.get_decay_parameter_names(model))
            decays = self.args.weight_decay, 0.0, 0.0
            groups: list[dict[str, Any]] = [{"params": [], "weight_decay": decay} for decay in decays]
            of_decayed, of_others, of_head = groups
            of_head["lr"] = self.args.head_learning_rate or 0.1 / self.head.hidden_size
            for name, parameter in model.named_parameters():
                # wrappers put names of their own before these
                part = next(part for part in name.split(".") if part in ("base", "head"))
                group = of_head if part == "head" else of_decayed if name in decayed else of_others
                if parameter.requires_grad:
                    group["params"].append(parameter)
            self.optimizer = kind([group for group in groups if group["params"]], **options)
        return self.optimizer

    def evaluate(
        self,
        eval_dataset: TrainingSet | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Compute the means of `TokenViews.measures` over all target tokens of a set: `eval_loss`, .."""
        if eval_dataset is None and self.eval_dataset is None:
            raise ConfigError("there is no evaluation set; pass eval_dataset")
        model = self.accelerator.unwrap_model(self.model) if self.model_wrapped is self.model else self.model_wrapped
        collator, self.data_collator = self.data_collator, collate  # each row an example, to count them over processes
        try:
            batches = self.get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = collator
        with evaluating(model):
            parts = [self._views(model, batch) for batch in batches]
        views = TokenViews(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})
        measures = views.measures(self.args.deferral_costs(self.head.num_assistants))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in measures.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _views(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The fields of `TokenViews` for one batch of every process, on the CPU."""
        inputs = self._prepare_inputs(batch)
        with torch.no_grad(), self.accelerator.autocast():
            out = model(**inputs, num_items_in_batch=1, per_token=True)
        del out["loss"]
        out |= {name: inputs[name] for name in ("assistant_logprobs", "assistant_correct", "target_mask")}
        flags = [name for name, values in out.items() if values.dtype == torch.bool]
        out |= {name: out[name].to(torch.uint8) for name in flags}  # padding would convert bool to int64
        padded = self.accelerator.pad_across_processes(out, dim=1)
        gathered = self.accelerator.gather_for_metrics(padded)  # drops rows that only fill up the last batch
        gathered |= {name: gathered[name].bool() for name in flags}
        mask = gathered.pop("target_mask")
        return {name: values[mask].cpu() for name, values in gathered.items()}

    def _get_train_sampler(self, train_dataset: TrainingSet | None = None) -> Any:
        return super()._get_train_sampler(_lengths_of(train_dataset or self.train_dataset))

    def _get_eval_sampler(self, eval_dataset: TrainingSet) -> Any:
        return super()._get_eval_sampler(_lengths_of(eval_dataset))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        (checkpoint / STATE).unlink(missing_ok=True)  # marks a checkpoint as complete
        try:
            if self.args.should_save:
                checkpoint.mkdir(parents=True, exist_ok=True)
                (checkpoint / ORIGIN).write_text(json.dumps(self.origin, indent=2) + "\n", encoding="utf-8")
            super()._save_checkpoint(model, trial)
        except (OSError, SafetensorError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            advice = "free some space and resume from the checkpoint before"
            raise WriteError(f"could not write {checkpoint}: {error}; {advice}") from error

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.args.should_save:
            save_tuned(Path(output_dir or self.args.output_dir), self.joint, self.args.method, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_tuned(Path(resume_from_checkpoint), self.joint, self.args.method)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


@torch.no_grad()
def _check_padding_free(base: LanguageModel) -> None:
    """Check that sequences concatenated to one row do not attend to each other, as some attention silently does."""
    items = [{"input_ids": torch.arange(length) % base.vocab_size} for length in (7, 5)]
    row = {name: values.to(base.input_device) for name, values in collate_padding_free(items).items()}
    with evaluating(base.module):
        together = base.hidden_states(**row, use_cache=False)[0, 7:]
        alone = base.hidden_states(row["input_ids"][:, 7:], use_cache=False)[0]
    if not torch.allclose(together, alone, rtol=0.05, atol=0.05 * alone.abs().max().item()):
        what = f"{type(base.inner).__name__} and attention {base.config._attn_implementation!r}"
        reason = "because sequences in one row attend to each other"
        advice = "use sdpa or flash_attention_2, or leave padding_free out"
        raise ConfigError(f"padding_free does not work with {what}, {reason}; {advice}")


def _lengths_of(data: TrainingSet) -> list[dict[str, range]]:
    """What samplers read of examples. Those from hidden states have no tokens, but form the same batches."""
    return [{"input_ids": range(len(example.token_ids))} for example in data.examples]


def _check(base: PreTrainedModel, head: DeferralHead, args: CoLLMConfig, *sets: TrainingSet | None) -> None:
    train_dataset, eval_dataset = cast("tuple[TrainingSet, TrainingSet | None]", sets)
    if hasattr(base, "peft_config"):
        raise ConfigError("the base already has an adapter; pass the plain model, as method 'lora' adds a new one")
    for data in filter(None, sets):
        count = len(data.assistant_scores)
        if count != head.num_assistants:
            raise MismatchError(f"the head has {head.num_assistants} assistants, but the data has scores of {count}")
        if data.from_hidden_states and args.method != "head":
            raise ConfigError(f"stored hidden states require a frozen base, but method {args.method!r} changes it")
    longest = max(len(example.token_ids) for example in train_dataset.examples)
    if longest > args.max_length:
        raise DataError(f"an example has {longest} tokens, but max_length is {args.max_length}; encode with that value")
    if args.warm_start and train_dataset.base_scores is None:
        raise ConfigError("a warm start needs the base's scores; pass base_scores, or set warm_start to False")
    if args.eval_strategy != "no" and eval_dataset is None:
        raise ConfigError(f"eval_strategy {args.eval_strategy} has no effect without an evaluation set; pass one")
    if args.n_gpu > 1:
        raise ConfigError(f"one process sees {args.n_gpu} GPUs; start one per GPU (torchrun), or make one GPU visible")
    if args.method == "full" and base.dtype != torch.float32:
        effect = f"in which most updates with learning rate {args.learning_rate:g} round to zero"
        advice = "load it with dtype float32 and set bf16 for speed"
        logger.warning(f"the base's weights are {base.dtype}, {effect}; {advice}")
