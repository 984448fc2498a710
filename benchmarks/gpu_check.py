"""Checks on a GPU in under six minutes: exactness, start-up, speed as ratios within one run, and a profile of a step.

    python -m benchmarks.gpu_check --out benchmarks/results/gpu.json

The file is written after every part. Weights are random, and the author of each token is fixed beforehand, as in
`benchmarks.decode`. `exact` runs those tests of the test suite that take a device, so it needs their dependencies.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.decode import BASE_ALONE
from benchmarks.limit import seconds
from benchmarks.pairs import SHAPES, collaborate, make_model, pattern, prompts_of
from benchmarks.record import run_parts
from collm import CoLLM, SamplingParams
from collm.engine.runner import ModelRunner
from collm.models.language_model import LanguageModel

EXACT_TESTS = ("tests/engine/test_runner.py", "tests/engine/test_static_passes.py", "tests/engine/test_exactness.py")


class GpuCheck:
    """One pair of models on one device."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device = torch.device(arguments.device)
        self.dtype = getattr(torch, arguments.dtype)
        self.vocab_size = min(SHAPES[arguments.base][5], SHAPES[arguments.assistant][5])
        self._models: list[PreTrainedModel] = []
        self._pair: CoLLM | None = None
        self._bandwidth = 0.0

    @property
    def models(self) -> list[PreTrainedModel]:
        if not self._models:
            shapes = self.arguments.base, self.arguments.assistant
            self._models = [make_model(one, self.vocab_size, self.dtype, self.arguments.device) for one in shapes]
        return self._models

    @property
    def pair(self) -> CoLLM:
        if self._pair is None:
            self._pair = collaborate(*self.models)
        return self._pair

    # Parts

    def machine(self) -> dict[str, Any]:
        """The device's name and its memory bandwidth when copying."""
        cuda = self.device.type == "cuda"
        memory = torch.empty((2 << 30) if cuda else (64 << 20), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(memory)
        taken = seconds(lambda: target.copy_(memory), 10)
        self._bandwidth = 2 * memory.nbytes / taken
        name = torch.cuda.get_device_name(self.device) if cuda else "cpu"
        return _logged({"device": name, "copy_gb_per_s": self._bandwidth / 1e9})

    def exact(self) -> dict[str, Any]:
        """Run the test suite's tests on this device: architectures, policies, drafts, ragged batches, joins and
        cancellations.
        """
        command = [sys.executable, "-m", "pytest", *EXACT_TESTS, "-k", self.device.type, "-q", "--tb=line"]
        command += ["-p", "no:cacheprovider"]
        start = time.perf_counter()
        try:
            ran = subprocess.run(command, capture_output=True, text=True, timeout=self.arguments.exact_seconds)
            text, finished = ran.stdout, True
        except subprocess.TimeoutExpired as error:
            text, finished = (error.stdout or b"").decode(), False
        progress = re.findall(r"^([.FExsX]+)", text, flags=re.MULTILINE)
        counts = {name: sum(line.count(mark) for line in progress) for name, mark in (("passed", "."), ("failed", "F"))}
        failures = [line for line in text.splitlines() if line.startswith(("FAILED", "ERROR", "E  "))][:20]
        row = {**counts, "finished": finished, "seconds": time.perf_counter() - start, "failures": failures}
        return _logged(row | ({} if progress else {"output": text[-2000:]}))

    def start(self) -> dict[str, Any]:
        """Time from weights in memory to the first token, and the memory that this takes on the device."""
        _ = self.models
        prompt = prompts_of(1, self.arguments.prompt, self.vocab_size)
        before, start = _used(self.device), time.perf_counter()
        model = collaborate(*self.models)
        loaded = time.perf_counter() - start
        model.engine(max(self.arguments.batch))
        ready, captured = time.perf_counter() - start, _used(self.device)
        model.generate(prompt, SamplingParams(max_tokens=1), policy=BASE_ALONE, max_batch=1)
        first = time.perf_counter() - start
        self._pair = model
        held = sum(_cache_bytes(runner) for runner in model.runners)
        row = {"seconds_to_runners": loaded, "seconds_to_graphs": ready, "seconds_to_first_token": first}
        return _logged(row | {"graphs_gb": (captured - before - held) / 1e9, "cache_gb": held / 1e9})

    def rounding(self) -> dict[str, Any]:
        """Number of steps whose argmax differs between reading token by token and one pass without a cache."""
        counts = []
        for model in self.models:
            runner, (text,) = ModelRunner(LanguageModel(model, name="m")), prompts_of(1, 257, self.vocab_size)
            slot = runner.open()
            stepwise = torch.stack([runner.extend({slot: [token]}).logits[0].argmax() for token in text[:-1]])
            with torch.inference_mode():
                ids = torch.tensor([text[:-1]], device=self.device)
                whole = model(ids, use_cache=False).logits[0, :, : self.vocab_size].argmax(-1)
            counts.append(int((stepwise != whole).sum()))
        return _logged({"steps": 256, "differing_base": counts[0], "differing_assistant": counts[1]})

    def grid(self) -> list[dict[str, Any]]:
        """Compare the collaboration with the memory limit and with the assistant alone."""
        rows, arguments = [], self.arguments
        alone = collaborate(self.models[1], self.models[1])
        for batch in arguments.batch:
            new = arguments.new
            prompts, params = prompts_of(batch, arguments.prompt, self.vocab_size), SamplingParams(max_tokens=new)
            policies = [pattern(arguments.rate, 1, new, seed) for seed in range(batch)]

            def timed(model: CoLLM, policy: Any, lookahead: int | None) -> tuple[float, Any]:
                model.generate(prompts, SamplingParams(max_tokens=8), policy=BASE_ALONE, max_batch=batch)  # noqa: B023
                outs: list[Any] = []
                taken = seconds(
                    lambda: outs.append(
                        model.generate(prompts, params, policy=policy, max_batch=batch, lookahead=lookahead)  # noqa: B023
                    ),
                    2,
                )
                return taken, outs[-1]

            taken, out = timed(self.pair, policies, None)
            plain, _ = timed(self.pair, policies, 0)
            assistant, _ = timed(alone, BASE_ALONE, 0)
            base, _ = timed(self.pair, BASE_ALONE, 0)
            generated = seconds(lambda: _generate(self.models[1], prompts, new))  # noqa: B023
            row = {
                "batch": batch,
                "prompt": arguments.prompt,
                "rate": out.deferral_rate,
                "ms_per_step_of_batch": 1e3 * taken / new,
                "time_over_memory_limit": taken / self._limit(out, batch),
                "speed_without_lookahead": taken / plain,
                "speed_vs_assistant_ours": assistant / taken,
                "speed_vs_assistant_generate": generated / taken,
                "assistant_ours_vs_generate": generated / assistant,
                "base_ms_per_step": 1e3 * base / new,
                "assistant_ms_per_step": 1e3 * assistant / new,
                "base_passes": out.usage["base"].forward_passes,
                "assistant_passes": out.usage["assistant"].forward_passes,
                "cache_allocated_over_needed": sum(one.cache_bytes for one in self.pair.runners)
                / sum(one.bytes_per_position * batch * (arguments.prompt + new - 1) for one in self.pair.runners),
            }
            rows.append(_logged(row))
        return rows

    def compiled(self) -> dict[str, Any]:
        """Compare with the assistant alone under transformers' compiled static cache, its fastest way to decode."""
        new, (prompt,) = self.arguments.new, prompts_of(1, self.arguments.prompt, self.vocab_size)
        start = time.perf_counter()
        _generate(self.models[1], [prompt], new, cache_implementation="static")
        first = time.perf_counter() - start
        taken = seconds(lambda: _generate(self.models[1], [prompt], new, cache_implementation="static"), 2)
        params, policy = SamplingParams(max_tokens=new), pattern(self.arguments.rate, 1, new, 0)
        ours = seconds(lambda: self.pair.generate([prompt], params, policy=policy, max_batch=1), 3)
        alone = collaborate(self.models[1], self.models[1])
        alone.generate([prompt], SamplingParams(max_tokens=8), policy=BASE_ALONE, max_batch=1)
        single = seconds(lambda: alone.generate([prompt], params, policy=BASE_ALONE, max_batch=1, lookahead=0), 2)
        row = {"seconds_to_compile": first - taken, "generate_ms_per_token": 1e3 * taken / new}
        row |= {"speed_vs_assistant_compiled": taken / ours, "assistant_ours_vs_compiled": taken / single}
        return _logged(row)

    def profile(self) -> dict[str, Any]:
        """Profile decoding: the kernels that take the most time, and the total time including the host."""
        from torch.profiler import ProfilerActivity, profile

        new, (prompt,) = 32, prompts_of(1, self.arguments.prompt, self.vocab_size)
        policy, params = pattern(self.arguments.rate, 1, new, 0), SamplingParams(max_tokens=new)
        self.pair.generate([prompt], params, policy=policy, max_batch=1)
        cuda = self.device.type == "cuda"
        kinds = [ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]
        start = time.perf_counter()
        with profile(activities=kinds) as ran:
            self.pair.generate([prompt], params, policy=policy, max_batch=1)
        wall = time.perf_counter() - start
        metric = "self_device_time_total" if cuda else "self_cpu_time_total"
        events = sorted(ran.key_averages(), key=lambda event: -getattr(event, metric))
        total = sum(getattr(event, metric) for event in events)
        top = [
            {"kernel": event.key[:70], "calls": event.count, "ms": getattr(event, metric) / 1e3}
            for event in events[:14]
        ]
        count = sum(event.count for event in events)
        return _logged({"wall_ms": 1e3 * wall, "device_ms": total / 1e3, "kernels": count, "tokens": new, "top": top})

    def _limit(self, out: Any, batch: int) -> float:
        """Seconds to read from memory what the passes need: the weights once for each pass, and each row's keys and
        values.
        """
        length = self.arguments.prompt + self.arguments.new / 2
        moved = 0.0
        for runner in self.pair.runners:
            assert isinstance(runner, ModelRunner)
            usage = out.usage[runner.name]
            weights = runner.model.weights_per_token * self.dtype.itemsize
            moved += usage.forward_passes * (weights + batch * length * runner.bytes_per_position)
        return moved / (self._bandwidth or float("nan"))


def _cache_bytes(runner: Any) -> int:
    return sum(memory.nbytes for layer in runner._cache.memory.values() for memory in layer)


def _used(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def _generate(model: PreTrainedModel, prompts: list[list[int]], new: int, **options: Any) -> None:
    ids = torch.tensor(prompts, device=model.device)
    mask = torch.ones_like(ids)
    lengths = {"max_new_tokens": new, "min_new_tokens": new}
    with torch.inference_mode():
        model.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=0, **lengths, **options)


def _logged(row: dict[str, Any]) -> dict[str, Any]:
    """Round a row and print it to stderr as progress."""
    rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
    print(rounded, file=sys.stderr, flush=True)
    return rounded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=SHAPES, default="1b")
    parser.add_argument("--assistant", choices=SHAPES, default="8b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=96, help="tokens of each completion")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--rate", type=float, default=0.3)
    parser.add_argument("--exact-seconds", type=float, default=150, help="time limit of the tests")
    names = ["machine", "start", "grid", "compiled", "profile", "rounding", "exact"]
    parser.add_argument("--parts", nargs="+", choices=names, default=names)
    parser.add_argument("--out", type=Path, help="write the JSON here instead of to stdout")
    arguments = parser.parse_args()
    check = GpuCheck(arguments)
    parts: dict[str, Callable[[], Any]] = {name: getattr(check, name) for name in names}
    run_parts("benchmarks.gpu_check", arguments, parts)


if __name__ == "__main__":
    main()
