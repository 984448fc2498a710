"""Options: defaults, what is refused, and a round trip through a mapping."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from collm.errors import ConfigError
from collm.training.config import CoLLMConfig
from tests.training.conftest import Make


def test_defaults_are_the_authors_where_they_state_one(config: Make) -> None:
    made = config()
    assert (made.learning_rate, made.warmup_steps, made.weight_decay, made.num_train_epochs) == (2e-5, 0.04, 0.0, 2.0)
    assert made.lr_scheduler_type == "linear"
    assert made.report_to == []
    assert config(method="lora").resolved("lora_r") == 64
    assert config(method="lora", lora_r=4).resolved("lora_r") == 4
    assert config(warm_start=True).resolved("positive_weight") == 8.0


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"lora_r": 8}, "lora_r has no effect with method='full'; set method to 'lora'"),
        ({"method": "head", "lora_target_modules": ["q_proj"]}, "lora_target_modules has no effect"),
        ({"positive_weight": 8.0}, "positive_weight has no effect with warm_start=False"),
        ({"warm_start_tokens": 9}, "warm_start_tokens has no effect"),
        ({"pseudo_label_variant": "b"}, "pseudo_label_variant has no effect"),
        ({"method": "head", "learning_rate": 1e-3}, "set head_learning_rate"),
        ({"method": "head", "activation_checkpointing": True}, "activation_checkpointing has no effect"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor has no effect"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha has no effect"),
        ({"remove_unused_columns": True}, "remove_unused_columns has no effect"),
        ({"seed": -5}, "seed is -5, expected 0 to 2"),
        ({"resume_from_checkpoint": "x"}, "pass it to CoLLMTrainer.train"),
        ({"method": "both"}, "method is 'both', expected one of full, lora, head"),
        ({"objective": "both"}, "objective is 'both', expected one of marginal, separate, weak, gain, paper"),
        ({"method": "head", "objective": "separate"}, "objective 'separate' has no effect with method 'head'"),
        ({"objective": "gain"}, "objective 'gain' fits the head of a frozen base, got method 'full'"),
        (
            {"method": "head", "objective": "gain", "deferral_cost": 1},
            "deferral_cost has no effect here: objective 'gain'",
        ),
        ({"method": "head", "objective": "gain", "num_train_epochs": 5}, "num_train_epochs has no effect here"),
        ({"method": "head", "objective": "gain", "gain_clip": 0.0}, "gain_clip is 0.0, expected a number above 0"),
        ({"gain_clip": 4.0}, "gain_clip has no effect with objective=None; set objective to 'gain'"),
        ({"objective": "paper", "deferral_cost": 1}, "deferral_cost is 1, but objective 'paper' has none"),
        ({"objective": "weak", "warm_start": True, "positive_weight": 2.0}, "objective 'weak' has no warm start"),
        ({"lr_scheduler_type": "sometimes"}, "training options are invalid"),
        ({"max_length": 1}, "max_length is 1"),
        ({"num_train_epochs": -1}, "num_train_epochs is -1, expected a number above 0"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0, expected at least 1"),
        ({"early_stopping_patience": 2}, "without load_best_model_at_end"),
        ({"early_stopping_patience": 0}, "early_stopping_patience is 0"),
        ({"head_learning_rate": 0.0}, "head_learning_rate is 0.0"),
        ({"deferral_cost": -0.1}, "deferral_cost is -0.1, expected 0 or a finite number above it"),
        ({"deferral_cost": float("nan")}, "deferral_cost is nan"),
        ({"deferral_cost": [0.0, -1.0]}, "deferral_cost is [0.0, -1.0], expected 0 or a finite number above it"),
        ({"deferral_cost": []}, "deferral_cost is [], expected"),
        ({"deferral_cost": ["much"]}, "deferral_cost is ['much'], expected a number, or one for each assistant"),
        ({"method": "lora", "lora_dropout": 1.0}, "lora_dropout is 1.0"),
        ({"method": "lora", "lora_r": 0}, "lora_r is 0"),
        ({"warm_start": True, "pseudo_label_variant": "c"}, "pseudo_label_variant is 'c', expected one of a, b"),
        ({"save_strategy": "sometimes"}, "training options are invalid"),
        ({"max_length": [9]}, "training options are invalid"),
    ],
)
def test_options_out_of_range_or_without_effect_are_refused(
    config: Make, options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**options)
    assert complaint in str(caught.value)


def test_unknown_keys_are_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(ConfigError, match="no training option 'lerning_rate'; did you mean 'learning_rate'"):
        CoLLMConfig.from_dict({"lerning_rate": 1.0})


def test_numbers_may_come_as_text(config: Make) -> None:
    """YAML reads 2e-5 as a string."""
    made = CoLLMConfig.from_dict({"learning_rate": "2e-5", "max_steps": "7", "lora_r": "4", "method": "lora"})
    assert (made.learning_rate, made.max_steps, made.lora_r) == (2e-5, 7, 4)
    with pytest.raises(ConfigError, match="learning_rate is 'fast', expected a number"):
        CoLLMConfig.from_dict({"learning_rate": "fast"})


@pytest.mark.parametrize("method", ["full", "lora", "head"])
def test_a_config_kept_as_a_mapping_can_be_read_again(config: Make, method: str) -> None:
    made = config(method=method, eval_strategy="steps", eval_steps=5)
    kept = {one.name: made.to_dict()[one.name] for one in fields(made) if one.init}
    assert CoLLMConfig.from_dict(kept).to_dict() == made.to_dict()


@pytest.mark.parametrize(
    ("options", "better", "expected"),
    [
        ({}, 0.7, ("marginal", [0.0, 0.0])),
        ({}, 0.8, ("separate", [1.0, 1.0])),
        ({"method": "head"}, 0.8, ("marginal", [1.0, 1.0])),
        ({"objective": "marginal"}, 0.8, ("marginal", [1.0, 1.0])),
        ({"deferral_cost": 0.5}, 0.8, ("separate", [0.5, 0.5])),
        ({"deferral_cost": 0.0}, 0.8, ("separate", [0.0, 0.0])),
        ({"objective": "weak"}, 0.8, ("weak", [0.0, 0.0])),
        ({"objective": "paper"}, 0.8, ("marginal", [0.0, 0.0])),
        ({"method": "head", "objective": "gain"}, 0.8, ("gain", [0.0, 0.0])),
    ],
)
def test_what_is_not_named_suits_the_scores(
    config: Make, options: dict[str, Any], better: float, expected: tuple[str, list[float]]
) -> None:
    assert config(**options).chosen(2, better) == expected


def test_a_deferral_cost_is_one_for_all_or_one_for_each(config: Make) -> None:
    assert config().deferral_costs(2) == [0.0, 0.0]
    assert config(deferral_cost=[1]).deferral_cost == config(deferral_cost=1).deferral_cost == 1.0
    assert config(deferral_cost=1).deferral_costs(2) == config(deferral_cost=[1]).deferral_costs(2) == [1.0, 1.0]
    assert config(deferral_cost=[0, 2.5]).deferral_costs(2) == [0.0, 2.5]
    with pytest.raises(
        ConfigError, match=r"deferral_cost is \[0.0, 1.0\], expected one number, or one for each assistant \(3\)"
    ):
        config(deferral_cost=[0, 1]).deferral_costs(3)
