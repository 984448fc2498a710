"""Cost of training and scoring as ratios within one run, on models of real shape with random weights. Prints JSON.

    python -m benchmarks.training --parts memory step padding scoring

memory: peak memory of the loss, forward and backward, in addition to what was held before. Compares computing all
    logits at once with computing them in chunks.
step: seconds of an optimiser step of CoLLMTrainer, compared with transformers' Trainer on the same base and batches.
    The two run in turn.
padding: seconds of an optimiser step without padding, compared with one with padding, for two ranges of lengths.
scoring: tokens per second of `write_scores`, compared with one example at a time in the model's own forward pass.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from benchmarks.limit import seconds
from benchmarks.pairs import SHAPES, make_model
from benchmarks.record import run_parts
from collm import CoLLMConfig, CoLLMTrainer, DeferralHead
from collm.core.objective import marginal_logprobs
from collm.models.language_model import LanguageModel
from collm.models.loading import ModelSpec
from collm.training.examples import Example, collate, fingerprint
from collm.training.module import marginal_nll_sum
from collm.training.scores import Scores, TrainingSet
from collm.training.scoring import write_scores

FORMS = ("plain", "chunks")


class OutputLayer:
    """The part of a `LanguageModel` that the loss reads."""

    name = "output layer"
    output_bias = None

    def __init__(self, vocab_size: int, hidden_size: int, device: str) -> None:
        self.output_weight = torch.empty(vocab_size, hidden_size, device=device).normal_(0, 0.02).requires_grad_()

    def shape_logits(self, raw: Tensor) -> Tensor:
        return raw


def plain_nll_sum(
    layer: OutputLayer, hidden: Tensor, gold: Tensor, assistant_logprobs: Tensor, defer_logits: Tensor
) -> Tensor:
    logprobs = torch.log_softmax(hidden @ layer.output_weight.T, dim=-1)
    base_logprob = logprobs.gather(-1, gold.unsqueeze(-1)).squeeze(-1)
    return -marginal_logprobs(base_logprob, assistant_logprobs, defer_logits).sum()


def loss_once(form: str, vocab_size: int, hidden_size: int, tokens: int, device: str) -> dict[str, float]:
    """Compute one loss and its gradients. Returns the increase of the peak memory in bytes, and the time in seconds."""
    layer = OutputLayer(vocab_size, hidden_size, device)
    hidden = torch.randn(tokens, hidden_size, device=device, requires_grad=True)
    gold = torch.randint(0, vocab_size, (tokens,), device=device)
    assistant, defer = -torch.rand(tokens, 1, device=device), torch.randn(tokens, 1, device=device, requires_grad=True)
    loss = plain_nll_sum if form == "plain" else marginal_nll_sum
    before = _peak_bytes(device)
    taken = seconds(lambda: loss(layer, hidden, gold, assistant, defer).backward())  # type: ignore[arg-type]
    return {"bytes": _peak_bytes(device) - before, "seconds": taken}


def _peak_bytes(device: str) -> int:
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure each form in a separate process, so that their peaks are separate."""
    rows = []
    for vocab_size in arguments.vocabularies:
        measured = {form: _in_separate_process(form, vocab_size, arguments) for form in FORMS}
        plain, chunks = measured["plain"], measured["chunks"]
        rows.append(
            {
                "vocabulary": vocab_size,
                "plain_mb": plain["bytes"] / 1e6,
                "chunks_mb": chunks["bytes"] / 1e6,
                "memory_ratio": plain["bytes"] / chunks["bytes"],
                "time_ratio": chunks["seconds"] / plain["seconds"],
            }
        )
    return rows


def _in_separate_process(form: str, vocab_size: int, arguments: argparse.Namespace) -> dict[str, float]:
    call = f"loss_once({form!r}, {vocab_size}, {arguments.width}, {arguments.loss_tokens}, {arguments.device!r})"
    code = f"import torch; torch.set_num_threads({arguments.threads}); from benchmarks.training import *; "
    done = subprocess.run(
        [sys.executable, "-c", f"{code}print(json.dumps({call}))"], capture_output=True, text=True, check=True
    )
    result: dict[str, float] = json.loads(done.stdout)
    return result


def make_examples(count: int, shortest: int, longest: int, vocab_size: int, target_share: float) -> list[Example]:
    """Examples with uniformly distributed lengths. The last `target_share` of each example are the targets."""
    rng = random.Random(0)
    examples = []
    for _ in range(count):
        length = rng.randint(shortest, longest)
        targets = max(1, round(target_share * length))
        ids = [rng.randrange(10, vocab_size) for _ in range(length)]
        examples.append(Example(ids, [place >= length - targets for place in range(length)]))
    return examples


def training_set(examples: Sequence[Example]) -> TrainingSet:
    counts = torch.tensor([0, *(example.num_targets for example in examples)]).cumsum(0)
    logprobs = -torch.rand(int(counts[-1]))
    return TrainingSet(examples, [Scores(logprobs, logprobs > -0.5, counts, fingerprint(examples))])


class StepTimes(TrainerCallback):  # type: ignore[misc]
    """Seconds of every step but the first, which includes one-time allocations."""

    def __init__(self) -> None:
        self.taken: list[float] = []
        self._begun = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._begun = seconds_now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > 1:
            self.taken.append(seconds_now() - self._begun)


def seconds_now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Plain(Trainer):  # type: ignore[misc]
    """Fine-tuning with transformers: the model's own loss on the same targets."""

    @staticmethod
    def batch(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Collate the same tokens. The model shifts labels itself, so the labels move back by one."""
        batch = collate(items)
        labels = batch["gold"].masked_fill(~batch["target_mask"], -100)
        return {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "labels": torch.cat([torch.full_like(labels[:, :1], -100), labels[:, :-1]], dim=1),
        }


def step(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare by share of targets, because the plain loss computes logits everywhere and ours only at targets."""
    rows = []
    for share in arguments.target_shares:
        data = training_set(make_examples(64, 64, arguments.length, SHAPES[arguments.base][5], share))
        taken: dict[str, list[float]] = {"ours": [], "plain": []}
        for _ in range(arguments.rounds):
            for kind in taken:
                taken[kind] += _steps(kind, data, arguments)
        ours, plain = (statistics.median(taken[kind]) for kind in ("ours", "plain"))
        rows.append({"target_share": share, "steps": len(taken["ours"]), "step_ratio": ours / plain})
    return rows


def padding(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare batches with and without padding.

    Without padding every token is real, but attention runs over the whole row. Which of them is faster depends on both.
    """
    rows = []
    for shortest in (arguments.length // 16, arguments.length // 2):
        data = training_set(make_examples(64, shortest, arguments.length, SHAPES[arguments.base][5], 1.0))
        taken: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(arguments.rounds):
            for free in taken:
                taken[free] += _steps("ours", data, arguments, padding_free=free)
        free, padded = (statistics.median(taken[kind]) for kind in (True, False))
        rows.append({"shortest": shortest, "longest": arguments.length, "padding_free_ratio": free / padded})
    return rows


def _steps(kind: str, data: TrainingSet, arguments: argparse.Namespace, **options: Any) -> list[float]:
    base = make_model(arguments.base, SHAPES[arguments.base][5], torch.float32, arguments.device)
    times = StepTimes()
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(sys.stderr):  # Trainer prints to stdout
        common: dict[str, Any] = {
            "output_dir": directory,
            "max_steps": arguments.steps,
            "learning_rate": 1e-5,
            "per_device_train_batch_size": arguments.batch,
            "bf16": arguments.dtype == "bfloat16",
            "use_cpu": arguments.device == "cpu",
            "save_strategy": "no",
            "disable_tqdm": True,
            "logging_strategy": "no",
            **options,
        }
        if kind == "plain":
            config = TrainingArguments(**common, report_to="none", remove_unused_columns=False)
            Plain(base, config, data_collator=Plain.batch, train_dataset=data, callbacks=[times]).train()
        else:
            head = DeferralHead(base.config.hidden_size).to(arguments.device)
            collm_config = CoLLMConfig(**common, warm_start=False, max_length=arguments.length)
            CoLLMTrainer(base, head, collm_config, data, callbacks=[times]).train()
    return times.taken


def scoring(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare with `model(ids).logits.log_softmax` for one example after another, the simplest way to score."""
    rows = []
    for shape in (arguments.base, arguments.assistant):
        for longest in arguments.score_lengths:
            examples = make_examples(arguments.score_examples, longest // 8, longest, SHAPES[shape][5], 0.7)
            module = make_model(shape, SHAPES[shape][5], getattr(torch, arguments.dtype), arguments.device)
            slow = seconds(lambda: _one_at_a_time(module, examples))  # noqa: B023
            fast = seconds(lambda: _write(module, examples))  # noqa: B023
            rows.append({"model": shape, "longest": longest, "examples": len(examples), "scoring_ratio": slow / fast})
    return rows


@torch.inference_mode()
def _one_at_a_time(module: Any, examples: Sequence[Example]) -> None:
    for example in examples:
        ids = torch.tensor([example.token_ids], device=module.device)
        logprobs = module(ids).logits[0, :-1].float().log_softmax(-1)
        logprobs.gather(-1, ids[0, 1:, None]).cpu()
        logprobs.argmax(-1).cpu()


def _write(module: Any, examples: Sequence[Example]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        write_scores(LanguageModel(module, name="model"), examples, Path(directory), spec=ModelSpec("model"))


PARTS: dict[str, Callable[[argparse.Namespace], list[dict[str, Any]]]] = {
    "memory": memory,
    "step": step,
    "padding": padding,
    "scoring": scoring,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--base", choices=SHAPES, default="25m")
    parser.add_argument("--assistant", choices=SHAPES, default="150m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32_000, 64_000, 128_256, 256_000])
    parser.add_argument("--loss-tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=512, help="hidden size in the memory benchmark")
    parser.add_argument("--target-shares", type=float, nargs="+", default=[1.0, 0.5])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="longest training example")
    parser.add_argument("--steps", type=int, default=8, help="optimiser steps of a round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--score-examples", type=int, default=256)
    parser.add_argument("--score-lengths", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--out", type=Path, help="write the JSON here instead of to stdout")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    run_parts("benchmarks.training", arguments, {name: partial(part, arguments) for name, part in PARTS.items()})


if __name__ == "__main__":
    main()
