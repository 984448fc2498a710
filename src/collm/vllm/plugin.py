"""The logits processor that turns rows of an exported base's output layer into author decisions, inside vLLM.

vLLM finds it through the entry point group `vllm.logits_processors` wherever collm is installed, also without what
collm itself needs: nothing but vLLM and torch is imported. Models without a note are left alone.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor as V1LogitsProcessor

from collm.vllm import NOTE, NOTE_FORMAT, THRESHOLD
from collm.vllm.rows import decide

try:  # model runner V2, vLLM's choice on recent GPUs
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as V2LogitsProcessor
except ImportError:
    _BASES: tuple[type, ...] = (V1LogitsProcessor,)
else:
    _BASES = (V1LogitsProcessor, V2LogitsProcessor)

if TYPE_CHECKING:
    from torch import Tensor

_PREFIX = "defer_"


class DeferLogitsProcessor(*_BASES):  # type: ignore[misc]
    """Forces the row of an assistant where the base defers to it, and rules the rows out everywhere else.

    The law is that of `ThresholdPolicy` (arXiv 2403.03870): with u_k = row k's logit / scale + b_k, the base defers
    where sigmoid(logsumexp_k u_k) exceeds the request's `vllm_xargs: {"defer_threshold": x}`, to argmax_k u_k. Without
    that value it never does. Both interfaces of vLLM are served: model runner V1 counts rows of the batch, V2 slots of
    requests. V2 runs on GPUs only and is untested.

    Raises:
        ValueError: the note beside the model is of another version.
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
        """Refuse a request whose values mean nothing; vLLM answers with status 400.

        Raises:
            ValueError: an unknown name, or no number from -1 to 1.
        """
        given = sampling_params.extra_args or {}
        unknown = sorted(name for name in given if name.startswith(_PREFIX) and name != THRESHOLD)
        if unknown:
            raise ValueError(f"vllm_xargs has {unknown[0]!r}, expected {THRESHOLD!r}")
        value = given.get(THRESHOLD, 0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not -1 <= value <= 1:
            raise ValueError(f"{THRESHOLD} is {value!r}, expected a number from -1 to 1")

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
        """Decide for each row.

        Args:
            logits: shape (R, V), before temperature and truncation; changed in place.
            ctx: of V2 only.
        """
        if self.note is None:
            return logits
        if ctx is None:
            thresholds = torch.full((len(logits),), math.inf, dtype=torch.float64)
            for row, threshold in self.rows.items():
                thresholds[row] = threshold
        else:
            thresholds = self.slots[ctx.expanded_idx_mapping.long()]
        return decide(logits, thresholds.to(logits.device), self.note)


def _threshold_of(params: Any) -> float | None:
    return (params.extra_args or {}).get(THRESHOLD)
