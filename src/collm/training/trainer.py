"""Training: a transformers Trainer for base and head, which reads scores, and the fit of a head on hidden states."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, PreTrainedModel, ProgressCallback, Trainer, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from collm.core.head import DeferralHead
from collm.core.objective import Objective
from collm.errors import ConfigError, DataError, MismatchError, ModelFailure, WriteError
from collm.models.language_model import LanguageModel
from collm.models.members import spec_of
from collm.training.checkpoints import ORIGIN, STATE, check_origin, last_checkpoint, load_tuned, read_tuned, save_tuned
from collm.training.config import CoLLMConfig, check_fitted
from collm.training.examples import collate, collate_padding_free
from collm.training.fitting import concatenated, fit_likelihood
from collm.training.gain import fit_gain
from collm.training.inspection import LabelReport, TokenViews, label_tokens
from collm.training.module import JointModule, with_adapter
from collm.training.scores import Scores, TrainingSet, stored_examples
from collm.training.scoring import evaluating, progress_bar, progress_lines
from collm.training.warm_start import warm_start

logger = logging.getLogger(__name__)


class CoLLMTrainer(Trainer):  # type: ignore[misc]
    """Trains a base and its deferral head on the marginal likelihood (arXiv 2403.03870), or on another objective.

    After `train`, `base` and `head` are tuned. With method "lora", `base` is a `PeftModel`.

    Args:
        base, head: the causal LM and the deferral head to tune, in place.
        train_dataset: examples with the assistants' scores, and for a warm start the base's.
        eval_dataset: examples with scores for `evaluate`.
        vocab_size: the vocabulary size of the base's tokenizer.

    Attributes:
        label_report: shares of pseudo-labels; None without assistants or the base's scores.
        objective, deferral_costs: those of the options, or chosen by the scores (`CoLLMConfig.chosen`).
        warm_start_report: the result of the warm start; None before it.
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
        self._labels, variant = None, args.resolved("pseudo_label_variant")
        if train_dataset.base_scores is not None and train_dataset.assistant_scores:
            self._labels = label_tokens(train_dataset.base_scores, train_dataset.assistant_scores, variant)
        self.label_report = None if self._labels is None else self._labels[1]
        better = 0.0 if self.label_report is None else self.label_report.better
        self.objective, self.deferral_costs = args.chosen(head.num_assistants, better)
        self.warm_start_report: dict[str, float] | None = None
        self.origin = _origin(base, train_dataset, eval_dataset)
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
            deferral_costs=self.deferral_costs,
            objective=self.objective,
        )
        super().__init__(
            self.joint,
            args,
            data_collator=collate_padding_free if args.padding_free else collate,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=list(callbacks),
        )
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
        if is_deepspeed_zero3_enabled():  # the loss uses this weight outside of its layer
            import deepspeed

            deepspeed.zero.register_external_parameter(self.joint, self.joint.base_lm.output_weight)
        if args.padding_free:
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
        if not self.args.disable_tqdm and not sys.stderr.isatty() and self.pop_callback(ProgressCallback):
            self.add_callback(_ProgressLines())
        found = last_checkpoint(Path(self.args.output_dir))
        if not resume_from_checkpoint:
            if found is not None:
                raise ConfigError(f"{found} is from an earlier run; resume, delete it, or choose another output_dir")
            if self.label_report is not None:
                _report_choice(self.args, self.objective, self.deferral_costs, self.label_report)
            if self.args.warm_start and self.objective != "weak":
                self._warm_start()
            return super().train(None, **options)
        checkpoint = found if resume_from_checkpoint is True else Path(resume_from_checkpoint)
        if checkpoint is None:
            raise ConfigError(f"{self.args.output_dir} has no complete checkpoint to resume from; start anew")
        check_origin(checkpoint, self.origin)
        return super().train(str(checkpoint), **options)

    def _warm_start(self) -> None:
        assert self._labels is not None
        data, labels = self.train_dataset, self._labels
        logger.info("%s", self.label_report)
        base = self.joint.base_lm if data.base_scores.hidden is None else data.base_scores
        with progress_bar("warm start", enabled=not self.args.disable_tqdm) as progress:
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
        measures = views.measures(self.deferral_costs, self.objective)
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


def fit_head(
    head: DeferralHead, args: CoLLMConfig, data: TrainingSet, evaluation: TrainingSet | None = None
) -> dict[str, Any]:
    """Fit a head on the hidden states stored with the base's scores, alike in every process.

    The options are those of method "head". `head` is set in place, on the device of the options.

    Returns:
        The objective and the deferral costs; train_loss_nats, or for "gain" the report of `fit_gain`; and with an
        evaluation set what `CoLLMTrainer.evaluate` returns.

    Raises:
        ConfigError: an option has no effect here or changes the base, or the base's scores have no hidden states.
    """
    check_fitted(args)
    examples = stored_examples(data.base_scores, data.assistant_scores)
    _, report = label_tokens(cast(Scores, data.base_scores), data.assistant_scores)
    objective, costs = args.chosen(head.num_assistants, report.better)
    _report_choice(args, objective, costs, report)
    head.to(args.device).predicts_gain = objective == "gain"
    metrics: dict[str, Any] = {"objective": objective, "deferral_costs": costs}
    if objective == "gain":
        found = fit_gain(head, examples, clip=args.resolved("gain_clip"), seed=args.seed)
        metrics |= {f"gain_{name}": value for name, value in found.items()}
    else:
        logger.info("%s", report)
        metrics["train_loss_nats"] = fit_likelihood(head, examples, costs, seed=args.seed)
    if evaluation is not None:
        read = concatenated(stored_examples(evaluation.base_scores, evaluation.assistant_scores))
        with torch.no_grad():
            defer_logits = head(*(read.pop(name).to(args.device) for name in ("hidden", "doubt"))).cpu()
        measures = TokenViews(**read, defer_logits=defer_logits).measures(costs, objective)
        metrics |= {f"eval_{name}": value for name, value in measures.items()}
    return metrics


class _ProgressLines(TrainerCallback):  # type: ignore[misc]
    """Training steps and what is logged, as lines on stderr in place of the bar of a terminal."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._report = progress_lines("training", "steps")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self._report(state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        if state.is_world_process_zero:
            found = {name: f"{one:.4g}" if isinstance(one, float) else one for name, one in (logs or {}).items()}
            found.pop("total_flos", None)
            logger.info("step %d: %s", state.global_step, ", ".join(f"{name} {one}" for name, one in found.items()))


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


def _origin(base: PreTrainedModel, data: TrainingSet, evaluation: TrainingSet | None) -> dict[str, Any]:
    """Fingerprints of the rows and identities of the models."""
    spec, scores = spec_of(base), data.base_scores
    own = spec.identity() if spec is not None else {} if scores is None else scores.model
    return {
        "examples": data.fingerprint,
        "evaluation": None if evaluation is None else evaluation.fingerprint,
        "base": own.get("weights") or own.get("revision"),
        "assistants": [dict(one.model) for one in data.assistant_scores],
    }


def _report_choice(args: CoLLMConfig, objective: Objective, costs: list[float], report: LabelReport) -> None:
    if None in (args.objective, args.deferral_cost):
        listed = " ".join(f"{cost:g}" for cost in costs)
        reason = f"because an assistant is better at {report.better:.0%} of the tokens; what is not named is chosen"
        logger.info("objective %s, deferral cost %s, %s", objective, listed, reason)


def _check(base: PreTrainedModel, head: DeferralHead, args: CoLLMConfig, *sets: TrainingSet | None) -> None:
    train_dataset, eval_dataset = cast("tuple[TrainingSet, TrainingSet | None]", sets)
    if hasattr(base, "peft_config"):
        raise ConfigError("the base already has an adapter; pass the plain model, as method 'lora' adds a new one")
    for data in filter(None, sets):
        count = len(data.assistant_scores)
        if count != head.num_assistants:
            raise MismatchError(f"the head has {head.num_assistants} assistants, but the data has scores of {count}")
    if args.objective == "gain":
        raise ConfigError("objective 'gain' reads stored hidden states; use fit_head")
    longest = max(len(example.token_ids) for example in train_dataset.examples)
    if longest > args.max_length:
        raise DataError(f"an example has {longest} tokens, but max_length is {args.max_length}; encode with that value")
    if (args.warm_start or args.objective == "weak") and train_dataset.base_scores is None:
        raise ConfigError("pseudo-labels need the base's scores; pass base_scores, or set warm_start to False")
    if args.eval_strategy != "no" and eval_dataset is None:
        raise ConfigError(f"eval_strategy {args.eval_strategy} has no effect without an evaluation set; pass one")
    if args.n_gpu > 1:
        raise ConfigError(f"one process sees {args.n_gpu} GPUs; start one per GPU (torchrun), or make one GPU visible")
    if args.method == "full" and base.dtype != torch.float32:
        effect = f"in which most updates with learning rate {args.learning_rate:g} round to zero"
        advice = "load it with dtype float32 and set bf16 for speed"
        logger.warning(f"the base's weights are {base.dtype}, {effect}; {advice}")
