"""Drafts of the base for rules that read the assistant at every token, beside assisted generation of transformers.

A part of `benchmarks.decode`. The models agree on a set share of the tokens. All systems write the same number of
tokens in one run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.limit import seconds
from benchmarks.pairs import collaborate, make_predictable, pattern, prompts_of, successors
from collm import SamplingParams
from collm.core.combinations import MixturePolicy
from collm.core.judges import ExactJudge, Judge, JudgedPolicy, RegretJudge
from collm.core.policies import Policy, SingleAuthorPolicy, StepView, ThresholdPolicy, ThresholdRule

RATE = 0.3


@dataclass(frozen=True)
class PatternRule(ThresholdRule):
    """A threshold rule that defers where a pattern says so."""

    pattern: Policy

    def author(self, step: StepView) -> int:
        return self.pattern.author(step)


def judge_rows(
    models: Callable[[], list[PreTrainedModel]],
    agreements: Sequence[float],
    batches: Sequence[int],
    prompt: int,
    new: int,
    repeats: int,
) -> Iterator[dict[str, Any]]:
    """One row for each agreement and batch: tokens per second of each system, and passes of the assistant."""
    for agreement in agreements:
        pair = models()
        vocab_size = pair[0].config.vocab_size
        for seed, (model, follows) in enumerate(zip(pair, successors(vocab_size, agreement), strict=True)):
            make_predictable(model, follows, seed)
        for batch in batches:
            yield {
                "agreement": agreement,
                "batch": batch,
                **_systems(pair, prompts_of(batch, prompt, vocab_size), new, repeats),
            }


def _systems(pair: list[PreTrainedModel], prompts: list[list[int]], new: int, repeats: int) -> dict[str, Any]:
    model, batch, params = collaborate(*pair), len(prompts), SamplingParams(max_tokens=new)
    rules = [PatternRule(pattern(RATE, 1, new, seed)) for seed in range(batch)]

    def judged(judge: Judge) -> list[Policy]:
        return [JudgedPolicy(rule, judge) for rule in rules]

    systems: dict[str, tuple[Any, int | None]] = {
        "assistant": (SingleAuthorPolicy(1), 0),
        "assistant_drafted": (SingleAuthorPolicy(1), None),
        "exact": (JudgedPolicy(ThresholdPolicy(1.0), ExactJudge()), None),
        "mixture": (MixturePolicy(), 0),
        "mixture_drafted": (MixturePolicy(), None),
        "threshold": (list(rules), None),
        "threshold_regret": (judged(RegretJudge(2.0)), None),
        "threshold_exact": (judged(ExactJudge()), None),
    }
    row: dict[str, Any] = {}
    for name, (policy, lookahead) in systems.items():
        outs: list[Any] = []

        def run() -> None:
            outs.append(model.generate(prompts, params, policy=policy, max_batch=batch, lookahead=lookahead))  # noqa: B023

        run()  # what is measured in it, pass times and acceptance, is forgotten; allocations are not
        row[name] = batch * new / seconds(run, repeats if batch == 1 else 1)
        row[f"{name}_passes"] = outs[-1].usage["assistant"].forward_passes
    for name, options in _ASSISTED if batch == 1 else ():
        row[name] = new / seconds(partial(_assisted, pair, prompts[0], new, **options), repeats)
    row["exact_over_assistant"] = row["exact"] / row["assistant"]
    row["drafted_over_assistant"] = row["assistant_drafted"] / row["assistant"]
    row["mixture_drafted_over_plain"] = row["mixture_drafted"] / row["mixture"]
    row["regret_over_threshold"] = row["threshold_regret"] / row["threshold"]
    return row


_ASSISTED: tuple[tuple[str, dict[str, float]], ...] = (
    ("assisted_generation", {}),
    ("assisted_ensemble", {"assistant_ensemble_weight": 0.5}),
)


def _assisted(pair: list[PreTrainedModel], prompt: list[int], new: int, **options: float) -> None:
    ids = torch.tensor([prompt], device=pair[1].device)
    lengths = {"do_sample": False, "min_new_tokens": new, "max_new_tokens": new, "pad_token_id": 0}
    pair[1].generate(ids, attention_mask=torch.ones_like(ids), assistant_model=pair[0], **lengths, **options)
