"""The parts of vLLM that one engine with base and assistant depends on. This file imports vLLM only when it checks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from importlib import import_module
from operator import attrgetter
from typing import Any

from collm.errors import ConfigError

_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"

REPLACED: Mapping[str, str] = {
    "vllm.sampling_params:SamplingParams._validate_spec_decode": "self speculative_config",
    f"{_SCHEDULER}.update_from_output": "self scheduler_output model_runner_output",
    f"{_RUNNER}._sample": "self logits spec_decode_metadata",
    f"{_RUNNER}.sample_tokens": "self grammar_output",
    f"{_RUNNER}._input_fits_in_drafter": "self common_attn_metadata",
}
"""Methods that are replaced, with all their parameters."""

CALLED: Mapping[str, str] = {
    "vllm.distributed:get_tp_group": "",
    "vllm.exceptions:VLLMValidationError": "",
    "vllm.v1.outputs:LogprobsTensors": "logprob_token_ids logprobs selected_token_ranks",
    "vllm.v1.outputs:SamplerOutput": "sampled_token_ids logprobs_tensors",
    "vllm.v1.sample.logits_processor:LogitsProcessors": "",
    "vllm.v1.sample.metadata:SamplingMetadata": "temperature all_greedy all_random top_p top_k generators "
    "max_num_logprobs no_penalties prompt_token_ids frequency_penalties presence_penalties repetition_penalties "
    "output_token_ids allowed_token_ids_mask bad_words_token_ids logitsprocs",
    "vllm.v1.sample.sampler:Sampler.forward": "self logits sampling_metadata",
    "vllm.v1.spec_decode.custom_class_proposer:create_custom_proposer": "vllm_config",
}
"""Functions and classes that are called, with the parameters that are passed. No other may be required."""

READ: Mapping[str, str] = {
    _RUNNER: "device discard_request_mask drafter input_batch requests sampler",
    _SCHEDULER: "grammar_compile_error_reqs",
    "vllm.v1.outputs:ModelRunnerOutput": "num_nans_in_logits prompt_logprobs_dict",
    "vllm.v1.spec_decode.metadata:SpecDecodeMetadata": "draft_token_ids num_draft_tokens",
    "vllm.v1.worker.gpu_input_batch:CachedRequestState": "num_tokens output_token_ids prompt_token_ids sampling_params",
    "vllm.v1.worker.gpu_input_batch:InputBatch": "generators num_reqs num_tokens_no_spec req_ids token_ids_cpu",
}
"""Classes, with the attributes of their objects that are read or changed."""


def check_hooks() -> None:
    """Raise a ConfigError that names the first part of vLLM that is missing or has other parameters."""
    found = next(_differences(), None)
    if found is not None:
        version = getattr(import_module("vllm"), "__version__", "of an unknown version")
        raise ConfigError(
            f"vLLM {version} {found}, as base and assistant in one engine require; use a release that does, "
            "or a server for each model"
        )


def replaces(owner: type) -> Callable[[Callable[..., Any]], None]:
    """A decorator for f(original, self, ...), which replaces the owner's method of its name, but only once."""

    def install(function: Callable[..., Any]) -> None:
        original = getattr(owner, function.__name__)

        @wraps(original)
        def method(*arguments: Any, **options: Any) -> Any:
            return function(original, *arguments, **options)

        if not hasattr(original, "is_replaced"):
            method.is_replaced = True  # type: ignore[attr-defined]
            setattr(owner, function.__name__, method)

    return install


def _differences() -> Iterator[str]:
    """How this vLLM differs from the tables, each in the form "does not have ..."."""
    for place in {**READ, **CALLED, **REPLACED}:
        module, _, path = place.partition(":")
        try:
            found = attrgetter(path)(import_module(module))
        except (ImportError, AttributeError):
            yield f"does not have {place}"
            continue
        if place in READ:
            set_here = inspect.unwrap(found.__init__).__code__.co_names
            known = {*dir(found), *getattr(found, "__annotations__", ()), *set_here}
            yield from (f"does not have {place}.{name}" for name in READ[place].split() if name not in known)
        elif expected := {**REPLACED, **CALLED}[place].split():
            parameters = inspect.signature(found).parameters
            optional = set() if place in REPLACED else {n for n, one in parameters.items() if one.default != one.empty}
            if parameters.keys() - optional - set(expected) or set(expected) - parameters.keys():
                yield f"does not have {place}({', '.join(expected)}), but parameters ({', '.join(parameters)})"
