"""Options from lm-evaluation-harness: model arguments and generation options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from collm.collaboration import CoLLM
from collm.core.params import SamplingParams
from collm.errors import ConfigError

_LOADING: dict[str, tuple[type, ...]] = {
    "pretrained": (str, int),
    "device": (str,),
    "dtype": (str,),
    "trust_code": (bool,),
}
_OPTIONS: dict[str, tuple[type, ...]] = {
    "threshold": (float, int),
    "budget": (float, int),
    "policy": (str,),
    "batch_size": (int, str),
    "max_length": (int,),
    "add_bos_token": (bool,),
}
_KINDS = _LOADING | _OPTIONS

UNCHOSEN_DEVICE = "cuda:0"
"""Default device of the harness's command line. It means the device of the artefact."""

MAX_GEN_TOKS = 256
"""Default maximum number of generated tokens, as for the harness's own models."""


def model_arguments(given: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of `CoLLM.from_pretrained` and those of `HarnessLM`, checked.

    Args:
        given: `--model_args`.
        options: model options of the harness; None if not given. `UNCHOSEN_DEVICE` counts as not given.

    Raises:
        ConfigError: an unknown or duplicate argument, a value of the wrong type, or no `pretrained`.
    """
    unchosen = {"device": UNCHOSEN_DEVICE}
    chosen = {name: value for name, value in options.items() if value is not None and value != unchosen.get(name)}
    twice = sorted(given.keys() & chosen.keys())
    if twice:
        raise ConfigError(f"{', '.join(twice)} is given in --model_args and as --{twice[0]}; give the option only")
    merged = {**given, **chosen}
    unknown = sorted(merged.keys() - _KINDS.keys())
    if unknown:
        raise ConfigError(f"unknown model argument {', '.join(unknown)}; expected {', '.join(_KINDS)}")
    for name, value in merged.items():
        if not isinstance(value, _KINDS[name]) or (isinstance(value, bool) and bool not in _KINDS[name]):
            kinds = " or ".join(kind.__name__ for kind in _KINDS[name])
            raise ConfigError(f"model argument {name} is {value!r}, expected {kinds}")
    if "pretrained" not in merged:
        raise ConfigError("there is no collaboration; add pretrained=DIR to --model_args")
    loading = {name: value for name, value in merged.items() if name in _LOADING and name != "pretrained"}
    loading["path"] = str(merged["pretrained"])
    return loading, {name: value for name, value in merged.items() if name in _OPTIONS}


def batch_size_of(value: int | str) -> int | None:
    """Number of texts at once; None for "auto".

    Raises:
        ConfigError: neither a positive number nor "auto".
    """
    if value == "auto":
        return None
    if not str(value).isdecimal() or int(value) < 1:
        raise ConfigError(f"batch size is {value!r}, expected a positive number of texts, or auto")
    return int(value)


def max_length_of(model: CoLLM, wanted: int | None) -> int:
    """Maximum number of tokens of a sequence, by default the shortest context of all models.

    Raises:
        ConfigError: the context of a model is shorter.
    """
    from lm_eval.models.utils import DEFAULT_MAX_LENGTH

    limits = [member.max_length for member in model.members if member.max_length is not None]
    if wanted is None:
        return min(limits, default=DEFAULT_MAX_LENGTH)
    if wanted < 1 or wanted > min(limits, default=wanted):
        raise ConfigError(
            f"max_length is {wanted}, expected from 1 to {min(limits, default='any')}, the models' context"
        )
    return wanted


def sampling_params(options: Mapping[str, Any]) -> SamplingParams:
    """Sampling parameters from generation options of the harness.

    `do_sample=False` means temperature 0, and empty texts of `until` end nothing, as for the harness's own models.

    Raises:
        ConfigError: an unsupported option, or a value out of range.
    """
    from lm_eval.models.utils import normalize_gen_kwargs

    asked: dict[str, Any] = dict(normalize_gen_kwargs(dict(options), MAX_GEN_TOKS))
    stop, max_new_tokens = filter(None, asked.pop("until")), asked.pop("max_gen_toks")
    sampled, temperature = asked.pop("do_sample"), float(asked.pop("temperature", 0.0))
    truncation = {name: asked.pop(name) for name in ("top_p", "top_k") if name in asked}
    if asked.pop("num_beams", 1) != 1 or asked:
        refused = ", ".join(f"{name}={options[name]!r}" for name in options if name in {*asked, "num_beams"})
        raise ConfigError(
            f"generation option {refused} has no effect here; expected until, max_gen_toks, do_sample, temperature, "
            "top_p and top_k"
        )
    if sampled and temperature == 0:
        raise ConfigError("do_sample=True has no effect at temperature 0; give a temperature above 0")
    return SamplingParams(max_new_tokens, temperature, stop=tuple(stop), **truncation)
