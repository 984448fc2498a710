"""Checks of untrusted adapters. Only plain LoRA is loaded, as others may name further models, files or modules."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from collm.errors import DAMAGED, LoadError
from collm.untrusted import read_text

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1 << 20
MAX_REPEATS = 4
"""Largest number of repetitions in a pattern of module names. Matching time is polynomial of this degree."""

_PATTERNS = {"alpha_pattern", "exclude_modules", "layers_pattern", "modules_to_save", "rank_pattern", "target_modules"}
_SETTINGS = {"bias", "ensure_weight_tying", "fan_in_fan_out", "init_lora_weights", "layers_to_transform", "lora_alpha"}
_SETTINGS |= {"lora_bias", "lora_dropout", "r", "target_parameters", "use_dora", "use_rslora"}
"""LoRA options that may have any value, as they only affect how its weights are used, as may the patterns."""

_UNREAD = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "runtime_config"}
"""Fields that have no effect if a base model and a directory are given."""

_INITS = re.compile(r"gaussian|orthogonal|olora|pissa(_niter_\d{1,2})?")


def check_adapter(directory: Path) -> None:
    """Check that an adapter is plain LoRA and does not allocate more memory than its weights take."""
    from peft import LoraConfig

    path = directory / CONFIG
    try:
        content = dict(json.loads(read_text(path, MAX_CONFIG_BYTES)).items())
    except DAMAGED as error:
        raise LoadError(f"{path} is damaged ({type(error).__name__}: {error!s:.200}); restore it") from error
    if content.get("peft_type") != "LORA":
        raise LoadError(f"{path}: peft_type is {content.get('peft_type')!r:.80}, expected 'LORA'")
    if content.get("task_type") not in (None, "CAUSAL_LM"):
        raise LoadError(f"{path}: task_type is {content['task_type']!r:.80}, expected 'CAUSAL_LM'")
    free = _PATTERNS | _SETTINGS | _UNREAD | {"peft_type", "task_type"}
    for option in fields(LoraConfig):
        default = option.default if option.default_factory is MISSING else option.default_factory()
        found = content.get(option.name, default)
        if option.name not in free and found != default:
            what = f"{option.name} is {found!r:.80}, expected the default {default!r}"
            raise LoadError(f"{path}: {what}; only plain LoRA is supported")
    init = content.get("init_lora_weights", True)
    if not isinstance(init, bool) and not (isinstance(init, str) and _INITS.fullmatch(init)):
        raise LoadError(f"{path}: init_lora_weights is {init!r:.80}; only plain LoRA is supported")
    for name in sorted(_PATTERNS):
        _check_patterns(path, name, content.get(name))
    _check_ranks(path, content)


def leaves_weights(directory: Path) -> bool:
    """Whether loading a checked adapter changes no weights of the model, so that other authors can share them."""
    content = json.loads(read_text(directory / CONFIG, MAX_CONFIG_BYTES))
    plain = content.get("bias", "none") == "none" and not content.get("target_parameters")
    return plain and content.get("init_lora_weights", True) in (True, False, "gaussian", "orthogonal")


def _check_patterns(path: Path, name: str, value: Any) -> None:
    """Check that each entry is a module name or a regular expression that is fast to match."""
    for text in value if isinstance(value, list | dict) else [] if value is None else [value]:
        if not isinstance(text, str) or not text:
            raise LoadError(f"{path}: {name} contains {text!r:.80}, expected module names")
        if re.search(r"\)[*+{]", text) or len(re.findall(r"[*+{]", text)) > MAX_REPEATS:
            advice = f"use at most {MAX_REPEATS} repetitions and do not repeat groups"
            raise LoadError(
                f"{path}: {name} contains the pattern {text!r:.80}, which may be too slow to match; {advice}"
            )


def _check_ranks(path: Path, content: Mapping[str, Any]) -> None:
    """Check the ranks against the weights, because PEFT allocates matrices before it reads the weights."""
    weights = path.with_name(WEIGHTS)
    try:
        with safe_open(weights, framework="pt") as file:
            largest = max((size for name in file.keys() for size in file.get_slice(name).get_shape()), default=0)  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise LoadError(f"{weights} is missing or damaged ({error!s:.200}); restore it or train again") from error
    patterns = content.get("rank_pattern") or {}
    if not isinstance(patterns, dict):
        raise LoadError(f"{path}: rank_pattern is {patterns!r:.80}, expected a mapping of module names to ranks")
    for rank in (content.get("r", 8), *patterns.values()):
        if type(rank) is not int or not 0 < rank <= largest:
            raise LoadError(f"{path}: a rank is {rank!r:.80}, but {WEIGHTS} has no matrix of this rank")
