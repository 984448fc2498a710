"""Plug-ins that vLLM finds through the entry points of an installed collm.

`DeferLogitsProcessor` (group `vllm.logits_processors`) turns rows of an exported base's output layer into author
decisions. Models without a note are unaffected. `register` (group `vllm.general_plugins`) prepares the processes of an
engine that holds a collaboration (`inline`). Other engines are unaffected. This file imports only vLLM, torch and parts
of collm that need nothing else.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor as V1LogitsProcessor

from collm.errors import ConfigError
from collm.vllm import FAILED, NOTE, NOTE_FORMAT, OF_ONE_ENGINE, PROPOSER, THRESHOLD, read_threshold
from collm.vllm.hooks import check_hooks, replaces
from collm.vllm.rows import decide

try:  # model runner V2, vLLM's choice on recent GPUs
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as V2LogitsProcessor
except ImportError:
    _BASES: tuple[type, ...] = (V1LogitsProcessor,)
else:
    _BASES = (V1LogitsProcessor, V2LogitsProcessor)

if TYPE_CHECKING:
    from torch import Tensor

_LOG = logging.getLogger(__name__)


class DeferLogitsProcessor(*_BASES):  # type: ignore[misc]
    """Forces an assistant's row where the base defers to it, and rules out the rows everywhere else.

    The rule is that of `ThresholdPolicy` (arXiv 2403.03870). With u_k = (logit of row k) / scale + b_k, the base defers
    to argmax_k u_k where sigmoid(logsumexp_k u_k) exceeds the request's `vllm_xargs: {"defer_threshold": x}`. Without
    this value it never defers. Both interfaces of vLLM are supported: model runner V1 numbers rows of the batch, V2
    numbers slots of requests. V2 runs on GPUs only and is untested.
    """

    def __init__(self, vllm_config: Any, *rest: Any) -> None:
        config = vllm_config.model_config
        path = Path(config.model) / NOTE
        self.note = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        if self.note is not None and self.note["format"] != NOTE_FORMAT:
            raise ValueError(f"{path} has format {self.note['format']!r}, this version reads {NOTE_FORMAT}")
        self.rows: dict[int, float] = {}  # V1: row of the batch -> threshold
        if len(rest) == 1:  # V2: slot -> threshold
            (states,) = rest
            self.slots = torch.full((states.max_num_reqs,), math.inf, dtype=torch.float64, device=states.device)

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse a request with invalid values by a ValueError. vLLM answers it with status 400."""
        read_threshold(sampling_params.extra_args or {})

    # Model runner V1

    def is_argmax_invariant(self) -> bool:
        return self.note is None

    def update_state(self, batch_update: Any) -> None:
        from vllm.v1.sample.logits_processor.builtin import process_dict_updates

        process_dict_updates(self.rows, batch_update, lambda params, prompt, output: _threshold_of(params))

    # Model runner V2

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        threshold = _threshold_of(sampling_params)
        self.slots[req_idx] = math.inf if threshold is None else threshold
        return self.note is not None

    # Both

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """Decide for each row of logits (R, V), before temperature and truncation; in place. Only V2 gives `ctx`."""
        if self.note is None:
            return logits
        if ctx is None:
            thresholds = torch.full((len(logits),), math.inf, dtype=torch.float64)
            for row, threshold in self.rows.items():
                thresholds[row] = threshold
        else:
            thresholds = self.slots[ctx.expanded_idx_mapping.long()]
        return decide(logits, thresholds.to(logits.device), self.note)


def register() -> None:
    """Patch vLLM: check the requests to one engine, and let the scheduler end requests that fail in a worker.

    If vLLM lacks what one engine depends on, nothing is patched, and only one engine refuses to start.
    """
    try:
        check_hooks()
    except ConfigError as error:
        _LOG.info("%s", error)
        return
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.sched.scheduler import Scheduler

    @replaces(SamplingParams)
    def _validate_spec_decode(original: Any, self: Any, speculative_config: Any) -> None:
        original(self, speculative_config)
        try:
            _check_supported(self, speculative_config is not None and speculative_config.model == PROPOSER)
        except ConfigError as error:
            raise VLLMValidationError(str(error)) from None

    @replaces(Scheduler)
    def update_from_output(original: Any, self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        nans = model_runner_output.num_nans_in_logits or {}
        failed = [name for name, count in nans.items() if count == FAILED]
        self.grammar_compile_error_reqs.update(failed)  # vLLM ends these requests with an error in this step
        for name in failed:
            model_runner_output.prompt_logprobs_dict.pop(name, None)  # no answer will report them
        return original(self, scheduler_output, model_runner_output)


def _check_supported(params: Any, is_one_engine: bool) -> None:
    """Raise a ConfigError for a request that this engine does not support."""
    xargs = params.extra_args or {}
    if not is_one_engine:
        unsupported = [name for name in OF_ONE_ENGINE if name in xargs]
        if unsupported:
            why = "which only an engine with base and assistant supports; leave it out"
            raise ConfigError(f"vllm_xargs has {unsupported[0]!r}, {why}")
        return
    from collm.vllm.drafting import policy_of

    for name in ("structured_outputs", "thinking_token_budget", "trace_decode_token_ids"):
        if getattr(params, name):
            raise ConfigError(f"{name} is not available in an engine with base and assistant; leave it out")
    policy_of(xargs)


def _threshold_of(params: Any) -> float | None:
    return (params.extra_args or {}).get(THRESHOLD)
