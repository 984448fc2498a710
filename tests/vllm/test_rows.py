"""Inside vLLM: rows become author decisions by the law of the threshold, with nothing of ours but torch."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import collm
from collm.core.head import author_logprobs, defer_probs
from collm.core.policies import StepView, ThresholdPolicy
from collm.vllm.rows import decide
from tests.test_layering import imports_of

VOCAB, PADDING = 11, 3


def note(k: int) -> dict[str, object]:
    first = VOCAB + PADDING
    biases = [0.5 - i for i in range(k)]
    return {"defer_ids": [*range(first, first + k)], "scale": 0.25, "biases": biases, "vocab_size": VOCAB}


@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_row_is_forced_where_the_policy_defers_and_none_elsewhere(k: int) -> None:
    logits = 2 * torch.randn(60, VOCAB + PADDING + k + 1, generator=torch.Generator().manual_seed(k))
    thresholds = torch.tensor([-1.0, 0.0, 0.3, 0.6, 0.9, 1.0], dtype=torch.float64).repeat(10)
    u = logits[:, VOCAB + PADDING : -1] / 0.25 + torch.tensor(note(k)["biases"])
    decided = decide(logits.clone(), thresholds, note(k))
    authors = set()
    for row, threshold in enumerate(thresholds.tolist()):
        by_author = author_logprobs(u[row]).exp().tolist()
        view = StepView(0, 0, by_author, float(defer_probs(u[row])), 0.0, 0.0)
        author = ThresholdPolicy(threshold).author(view)
        left = decided[row].isfinite().nonzero().flatten().tolist()
        assert left == ([VOCAB + PADDING + author - 1] if author else list(range(VOCAB)))
        assert torch.equal(decided[row, left], logits[row, left])
        authors.add(author)
    assert authors == set(range(k + 1))


def test_without_a_threshold_nothing_is_deferred() -> None:
    logits = torch.full((1, VOCAB + PADDING + 2), 50.0)
    decided = decide(logits, torch.tensor([torch.inf], dtype=torch.float64), note(1))
    assert decided.isfinite().nonzero()[:, 1].tolist() == list(range(VOCAB))


@pytest.mark.parametrize(
    ("name", "brought"),
    [
        ("plugin", "torch"),  # which every vLLM server imports
        ("inline", "filelock huggingface_hub numpy packaging psutil safetensors tokenizers torch transformers yaml"),
    ],
)
def test_what_runs_inside_vllm_imports_only_what_vllm_brings(name: str, brought: str) -> None:
    source, left, foreign = Path(collm.__file__).parents[1], [f"collm.vllm.{name}"], set()
    seen = set()
    while left:
        if (module := left.pop()) in seen:
            continue
        seen.add(module)
        file = source.joinpath(*module.split("."))
        paths = [path for path in (file.with_suffix(".py"), file / "__init__.py") if path.exists()]
        if paths:
            imported = imports_of(paths[0], top_level_only=True)
            left += [one for one in imported if one.startswith("collm.")]
            foreign |= {one.split(".")[0] for one in imported if not one.startswith("collm")}
        else:
            left.append(module.rpartition(".")[0])
    assert foreign - set(sys.stdlib_module_names) <= {"vllm", *brought.split()}
