"""Training options, based on transformers' TrainingArguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from typing import Any, cast, get_args, get_type_hints

import torch
from transformers import TrainingArguments

from collm.core.objective import Objective, PseudoLabelVariant
from collm.errors import ConfigError

MOSTLY_BETTER = 0.75
"""Share of tokens at which an assistant is better, above which `CoLLMConfig.chosen` keeps deferrals rare."""
_LEARNING_RATES = {"full": 2e-5, "lora": 1e-4, "head": 0.0}  # of the base, by method

_DEPENDENT: dict[str, tuple[str, object, object]] = {
    "lora_r": ("method", "lora", 64),
    "lora_alpha": ("method", "lora", 16),
    "lora_dropout": ("method", "lora", 0.1),
    "lora_target_modules": ("method", "lora", "all-linear"),
    "warm_start_tokens": ("warm_start", True, 65536),
    "positive_weight": ("warm_start", True, 8.0),
    "pseudo_label_variant": ("warm_start", True, "a"),
    "gain_clip": ("objective", "gain", 8.0),
}
"""Fields that require a value of another field -> that field, its value, and the default in that case."""

_OWN_METRICS = "evaluate computes its own metrics"
WITHOUT_EFFECT = {
    "label_smoothing_factor": "the objective is a likelihood over authors",
    "neftune_noise_alpha": "noise would make training differ from scoring",
    "use_liger_kernel": "the loss reads hidden states, not the model's own loss",
    "remove_unused_columns": "a training set has no unused columns",
    "label_names": "the targets are fixed",
    **dict.fromkeys(("include_for_metrics", "batch_eval_metrics", "prediction_loss_only"), _OWN_METRICS),
    "eval_accumulation_steps": "evaluate keeps no predictions",
    **dict.fromkeys(("bf16_full_eval", "fp16_full_eval"), "evaluate runs as training does"),
    "resume_from_checkpoint": "pass it to CoLLMTrainer.train",
}
"""Fields of TrainingArguments that would change nothing -> why."""

_STEPS = ("head_learning_rate", "num_train_epochs", "max_steps", "early_stopping_patience")
_WARM_START = ("warm_start_tokens", "positive_weight", "pseudo_label_variant")
WITHOUT_STEPS = dict.fromkeys(
    (*_STEPS, *_WARM_START), "a head on stored hidden states is fitted until its loss no longer falls, without labels"
)
"""The same for a head that is fitted on stored hidden states."""
_BY_OBJECTIVE = {
    "gain": WITHOUT_STEPS | {"deferral_cost": "objective 'gain' predicts gains, which a price is compared with"},
    "weak": dict.fromkeys(_WARM_START, "objective 'weak' has no warm start, and labels and weight of the authors"),
}
"""The same with some objectives."""


@dataclass
class CoLLMConfig(TrainingArguments):  # type: ignore[misc]
    """Options of a training run. The defaults of the learning rates and of LoRA are those of arXiv 2403.03870.

    Batch size and precision are transformers' (8 and float32; the paper has 128 and bfloat16). If they are not given,
    objective and deferral cost are chosen by the scores (`chosen`).

    All fields of `transformers.TrainingArguments` may be set too. Fields that depend on another field (LoRA's on
    `method`, the warm start's on `warm_start`) default to None, so that options without effect can be rejected.
    `resolved` returns their values.

    Attributes:
        output_dir: directory of the run: scores, checkpoints and the collaboration.
        method: "full" tunes base and head, "lora" an adapter and the head, "head" only the head.
        objective: "marginal" is the likelihood of base and head together. "separate" trains the base on its own
            likelihood, and only the head on the marginal. "gain", with method "head", predicts how many nats an
            assistant would gain, so that 'collm generate' takes a --price. "weak" trains base and head on gold tokens
            and pseudo-labels, the paper's baseline. "paper" is "marginal" without a deferral cost. By default
            "separate" if an assistant is better at more than 75 % of the tokens and the base is tuned, else "marginal".
        max_length: largest number of tokens per example.
        learning_rate: learning rate of the base: 2e-5 by default, 1e-4 for LoRA, not allowed for a frozen base.
        head_learning_rate: learning rate of the head, 0.1 / hidden size by default. One AdamW step then changes a
            defer logit by about 0.1 at any width (2.4e-5 at width 4096, 2e-3 at width 48).
        lora_r: rank of the adapter, 64 by default, as in the paper's QLoRA runs.
        lora_alpha: scale of the adapter, times its rank; 16 by default, as in the paper's QLoRA runs.
        lora_dropout: dropout of the adapter, 0.1 by default, as in the paper's QLoRA runs.
        lora_target_modules: names of modules, "all-linear" by default; never the output layer.
        deferral_cost: nats added to the loss per decision to defer a token, or a segment if tokenizers differ. With a
            cost, the head learns to defer where the assistant is much better, not wherever it is better. By default 1
            if an assistant is better at more than 75 % of the tokens, else 0. Several assistants may have a cost each,
            in their order.
        gain_clip: with objective "gain", largest gain or loss of one token in nats, 8 by default. Larger ones are
            clipped, so that they do not dominate the squared error. Clip near the prices that you will use if an
            assistant is far worse at most tokens.
        padding_free: concatenate the examples of a batch to one row instead of padding them. Each example attends to
            itself only, so the loss is the same. Requires SDPA or FlashAttention.
        early_stopping_patience: stop after this number of evaluations without improvement of the loss. Requires an
            eval_strategy and load_best_model_at_end.
        warm_start: fit the head to pseudo-labels before training.
        warm_start_tokens: largest number of target tokens for that fit, 65,536 by default.
        positive_weight: weight of tokens labelled with an assistant, 8 by default.
        pseudo_label_variant: "a" (default) or "b", see `core.objective.pseudo_labels`.

    Raises:
        ConfigError: an option is out of range or has no effect.
    """

    method: str = "full"
    objective: str | None = None
    max_length: int = 2048
    head_learning_rate: float | None = None
    lora_r: int | None = None
    lora_alpha: int | None = None
    lora_dropout: float | None = None
    lora_target_modules: list[str] | str | None = None
    deferral_cost: list[float] | float | None = None
    gain_clip: float | None = None
    padding_free: bool = False
    early_stopping_patience: int | None = None
    warm_start: bool = True
    warm_start_tokens: int | None = None
    positive_weight: float | None = None
    pseudo_label_variant: str | None = None

    learning_rate: float | None = None
    num_train_epochs: float = 2.0
    warmup_steps: float = 0.04
    logging_steps: float = 10
    save_steps: float = 0.1
    eval_steps: float | None = 0.1
    save_total_limit: int | None = 2
    report_to: str | list[str] | None = "none"
    remove_unused_columns: bool = False
    restore_callback_states_from_checkpoint: bool = True
    ddp_find_unused_parameters: bool | None = False
    ddp_timeout: int = 24 * 3600
    dataloader_pin_memory: bool = field(default_factory=torch.cuda.is_available)

    def __post_init__(self) -> None:
        if self.objective == "paper":
            if self.deferral_cost:
                raise ConfigError(
                    f"deferral_cost is {self.deferral_cost}, but objective 'paper' has none; leave it out"
                )
            self.objective, self.deferral_cost = "marginal", 0.0
        try:
            costs = [float(cost) for cost in _listed(self.deferral_cost)]
        except (TypeError, ValueError) as error:
            what = f"deferral_cost is {self.deferral_cost!r}"
            raise ConfigError(f"{what}, expected a number, or one for each assistant") from error
        if self.deferral_cost is not None:
            self.deferral_cost = costs[0] if len(costs) == 1 else costs  # a flag gives a list of one
        try:
            _check_ranges(self)
            _check_effects(self)
            if self.learning_rate is None:
                self.learning_rate = _LEARNING_RATES[self.method]
            super().__post_init__()
        except (ValueError, TypeError) as error:
            raise ConfigError(f"the training options are invalid: {error}") from error

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> CoLLMConfig:
        """Create a config from a mapping, such as a YAML file.

        Numbers may be strings, because YAML reads 2e-5 as a string.

        Raises:
            ConfigError: a key is unknown, or an option is out of range or has no effect.
        """
        known = {one.name for one in fields(cls) if one.init}
        for key in options:
            if key not in known:
                close = get_close_matches(key, known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else "; see CoLLMConfig for the options"
                raise ConfigError(f"there is no training option {key!r}{hint}")
        hints = get_type_hints(cls)
        return cls(**{key: _as_number(key, value, hints[key]) for key, value in options.items()})

    def resolved(self, name: str) -> Any:
        """The value of a dependent field, or its default."""
        value = getattr(self, name)
        return _DEPENDENT[name][2] if value is None else value

    def chosen(self, num_assistants: int, better: float) -> tuple[Objective, list[float]]:
        """Objective and deferral cost of each assistant. Those that are not given suit the scores.

        If an assistant is better nearly everywhere, the marginal likelihood alone would teach the base little and the
        head to defer nearly everywhere (docs/training.md).

        Args:
            better: share of the target tokens to which an assistant gives more probability than the base does.
        """
        mostly = better > MOSTLY_BETTER
        objective = self.objective or ("separate" if mostly and self.method != "head" else "marginal")
        costs = self.deferral_costs(num_assistants)
        if self.deferral_cost is None and mostly and objective in ("marginal", "separate"):
            costs = [1.0] * num_assistants
        return cast(Objective, objective), costs

    def deferral_costs(self, num_assistants: int) -> list[float]:
        """The given deferral cost of each assistant, or 0. A ConfigError if there are several, but not one for each."""
        costs = _listed(self.deferral_cost)
        if len(costs) in (1, num_assistants):
            return costs if len(costs) == num_assistants else costs * num_assistants
        raise ConfigError(
            f"deferral_cost is {costs}, expected one number, or one for each assistant ({num_assistants})"
        )


def _listed(costs: list[float] | float | None) -> list[float]:
    return costs if isinstance(costs, list) else [costs or 0.0]


def _check_ranges(config: CoLLMConfig) -> None:
    def check(name: str, is_valid: Callable[[Any], bool], expected: str) -> None:
        value = getattr(config, name)
        if value is not None and not is_valid(value):
            raise ConfigError(f"{name} is {value!r}, expected {expected}")

    variants, costs = get_args(PseudoLabelVariant), _listed(config.deferral_cost)
    valid_costs = bool(costs) and all(0 <= cost < math.inf for cost in costs)
    check("method", lambda value: value in _LEARNING_RATES, f"one of {', '.join(_LEARNING_RATES)}")
    objectives = (*get_args(Objective), "paper")
    check("objective", lambda value: value in objectives, f"one of {', '.join(objectives)}")
    check("max_length", lambda value: value >= 2, "at least 2")
    check("seed", lambda value: 0 <= value < 1 << 32, "0 to 2^32 - 1")
    check("deferral_cost", lambda _: valid_costs, "0 or a finite number above it")
    check("num_train_epochs", lambda value: value > 0, "a number above 0")
    check("lora_dropout", lambda value: 0 <= value < 1, "a number from 0 to below 1")
    check("pseudo_label_variant", lambda value: value in variants, f"one of {', '.join(variants)}")
    for name in ("head_learning_rate", "lora_alpha", "positive_weight", "gain_clip"):
        check(name, lambda value: value > 0, "a number above 0")
    counts = ("lora_r", "warm_start_tokens", "early_stopping_patience")
    for name in (*counts, "per_device_train_batch_size", "gradient_accumulation_steps"):
        check(name, lambda value: value >= 1, "at least 1")


def _check_effects(config: CoLLMConfig) -> None:
    for name, (switch, needed, _) in _DEPENDENT.items():
        if getattr(config, name) is not None and (now := getattr(config, switch)) != needed:
            advice = f"set {switch} to {needed!r} or leave {name} out"
            raise ConfigError(f"{name} has no effect with {switch}={now!r}; {advice}")
    if config.early_stopping_patience is not None and not config.load_best_model_at_end:
        raise ConfigError("early_stopping_patience without load_best_model_at_end would keep a worse model; set both")
    for name, advice in (("learning_rate", "set head_learning_rate"), ("activation_checkpointing", "leave it out")):
        if config.method == "head" and getattr(config, name):
            raise ConfigError(f"{name} has no effect with method 'head', which freezes the base; {advice}")
    if config.objective == "separate" and config.method == "head":
        raise ConfigError("objective 'separate' has no effect with method 'head', whose base learns nothing")
    if config.objective == "gain" and config.method != "head":
        raise ConfigError(
            f"objective 'gain' fits the head of a frozen base, got method {config.method!r}; set it to 'head'"
        )
    check_without(config, WITHOUT_EFFECT | _BY_OBJECTIVE.get(config.objective or "", {}))


def check_fitted(config: CoLLMConfig) -> None:
    """Raise a ConfigError if an option has no meaning for a head that is fitted on stored hidden states."""
    if config.method != "head":
        raise ConfigError(f"stored hidden states require a frozen base, but method {config.method!r} changes it")
    if config.objective == "weak":
        raise ConfigError("objective 'weak' trains in steps; leave out cache_hidden_states, or name another objective")
    check_without(config, WITHOUT_STEPS)


def check_without(config: CoLLMConfig, without: Mapping[str, str]) -> None:
    """Raise a ConfigError if an option is set that has no effect. `without` are such options, and why."""
    for one in fields(config):
        default = one.default if one.default_factory is MISSING else one.default_factory()
        if one.name in without and getattr(config, one.name) not in (default, []):
            raise ConfigError(f"{one.name} has no effect here: {without[one.name]}; leave it out")


def _as_number(name: str, value: Any, hint: Any) -> Any:
    accepted = set(get_args(hint) or (hint,))
    if not isinstance(value, str) or str in accepted or not accepted & {float, int}:
        return value
    try:
        return float(value) if float in accepted else int(value)
    except ValueError as error:
        raise ConfigError(f"{name} is {value!r}, expected a number") from error
