"""The way of one token through the code stays short."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from transformers import PreTrainedModel, PreTrainedTokenizerFast

import collm
from collm import CoLLM, SamplingParams
from collm.core.policies import ThresholdPolicy
from tests.engine.test_engine import random_head

MOST_CALLS, MOST_FILES = 30, 9
"""Calls of our functions in a step of one sequence, outside the model's forward pass, and the files of these."""


def test_one_token_takes_few_calls(
    tiny_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    model = CoLLM(tiny_model(0, eos_token_id=None), [tiny_model(1)], random_head(32, 1), tokenizer)
    engine = model.engine(max_batch=1, lookahead=0)
    engine.add(model.request([7, 8, 9], SamplingParams(max_tokens=16), ThresholdPolicy(1.0)))
    for _ in range(4):
        engine.step()
    calls: list[tuple[str, str]] = []
    forwards: list[FrameType] = []

    def profile(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "return" and forwards and frame is forwards[-1]:
            forwards.pop()
        ours = code.co_filename.startswith(str(Path(collm.__file__).parent)) and not code.co_name.startswith("<")
        if event == "call" and ours and not forwards:
            calls.append((code.co_filename, code.co_qualname))
            if code.co_name == "hidden_states":
                forwards.append(frame)

    sys.setprofile(profile)
    (output,) = engine.step()
    sys.setprofile(None)
    engine.close()
    assert output.step is not None
    assert len(calls) <= MOST_CALLS
    assert len({file for file, _ in calls}) <= MOST_FILES
