"""Decoding speed as ratios within one run, on models of real shape with random weights. Prints JSON.

    python -m benchmarks.decode --dtype float32 --prompt 32 512 --batch 1 4 16 --rate 0.1 0.3 0.5

The author of each token is fixed beforehand. A token is deferred with probability `rate`, either independently (run 1)
or in runs of 8 tokens on average.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.limit import PassTable, limit_seconds, pass_seconds, seconds
from benchmarks.pairs import SHAPES, collaborate, make_model, make_predictable, pattern, prompts_of, successors
from benchmarks.record import run_parts
from collm import CoLLM, SamplingParams
from collm.completions import Completions
from collm.core.policies import Policy, SingleAuthorPolicy
from collm.engine.request import Request

RUNS = (1, 8)
BASE_ALONE = SingleAuthorPolicy(0)


class Bench:
    """One pair of models in one dtype.

    Attributes:
        models: base and assistant, as transformers makes them.
        pair: the collaboration of both.
        alone: the assistant as base and assistant of a collaboration.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.dtype = getattr(torch, arguments.dtype)
        self.vocab_size = min(SHAPES[arguments.base][5], SHAPES[arguments.assistant][5])

    @cached_property
    def models(self) -> list[PreTrainedModel]:
        return [self.model(shape) for shape in (self.arguments.base, self.arguments.assistant)]

    @cached_property
    def pair(self) -> CoLLM:
        return collaborate(*self.models)

    @cached_property
    def alone(self) -> CoLLM:
        return collaborate(self.models[1], self.models[1])

    def model(self, shape: str) -> PreTrainedModel:
        return make_model(shape, self.vocab_size, self.dtype, self.arguments.device)

    # Parts

    def grid(self) -> list[dict[str, Any]]:
        """Compare the collaboration with its limit and with each model alone."""
        rows = []
        for prompt in self.arguments.prompt:
            for batch in self.arguments.batch:
                rows += self._cells(prompt, batch)
        return rows

    def _cells(self, prompt: int, batch: int) -> list[dict[str, Any]]:
        new = self.arguments.new
        prompts, params = prompts_of(batch, prompt, self.vocab_size), SamplingParams(max_tokens=new)
        for model in (self.pair, self.alone):  # warm-up: allocations and kernels
            model.generate(prompts, SamplingParams(max_tokens=4), policy=pattern(0.5, 1, 4, 0), max_batch=batch)
        ours = [
            seconds(lambda: model.generate(prompts, params, policy=BASE_ALONE, max_batch=batch, lookahead=0))  # noqa: B023
            for model in (self.pair, self.alone)
        ]
        theirs = [seconds(lambda: _generate(model, prompts, new)) for model in self.models]  # noqa: B023
        tables = [PassTable(model, batch, prompt, new) for model in self.models]
        rows = []
        for rate in self.arguments.rate:
            for run in RUNS:
                policies = [pattern(rate, run, new, seed) for seed in range(batch)]
                taken, out = self._timed(self.pair, prompts, params, policies, lookahead=0)
                row: dict[str, Any] = {
                    "prompt": prompt,
                    "batch": batch,
                    "rate": round(out.deferral_rate, 3),
                    "aimed_rate": rate,
                    "run": run,
                    "time_over_limit": taken / limit_seconds([c.authors for c in out], *tables),
                    "speed_vs_assistant_ours": ours[1] / taken,
                    "speed_vs_assistant_generate": theirs[1] / taken,
                    "speed_vs_base_ours": ours[0] / taken,
                    "base_ours_vs_generate": theirs[0] / ours[0],
                    "assistant_ours_vs_generate": theirs[1] / ours[1],
                    "tokens_per_second": batch * new / taken,
                    "assistant_passes": out.usage["assistant"].forward_passes,
                    "base_passes": out.usage["base"].forward_passes,
                }
                if batch == 1 or rate == 0.3:
                    drafting, _ = self._timed(self.pair, prompts, params, policies, lookahead=None)
                    row["lookahead_speedup"] = taken / drafting
                rows.append(_logged(row))
        if batch == 1 and prompt >= 512:
            rows[-1]["speed_vs_cache_free"] = self._cache_free(prompts[0], pattern(0.3, 1, new, 0))
        return rows

    def _timed(
        self,
        model: CoLLM,
        prompts: list[list[int]],
        params: SamplingParams,
        policies: list[Any],
        *,
        lookahead: int | None,
    ) -> tuple[float, Completions]:
        """Return the least time of several runs and the last output. A batch of several sequences is run once."""
        outs: list[Completions] = []

        def run() -> None:
            outs.append(model.generate(prompts, params, policy=policies, max_batch=len(prompts), lookahead=lookahead))

        return seconds(run, self.arguments.repeats if len(prompts) == 1 else 1), outs[-1]

    def _cache_free(self, prompt: list[int], policy: Policy) -> float:
        """Speed relative to a loop that reads the whole text again for every token. The loop is timed at every 16th
        token.
        """
        new = self.arguments.new
        deferred = policy.deferred  # type: ignore[attr-defined]
        every = 16

        @torch.inference_mode()
        def read(model: PreTrainedModel, length: int) -> float:
            text = torch.full((1, length), 5, device=model.device)
            return seconds(lambda: model(text, use_cache=False, logits_to_keep=1))

        share = sum(deferred) / new
        lengths = [len(prompt) + i for i in range(0, new, every)]
        slow = every * sum(read(self.models[0], n) + share * read(self.models[1], n) for n in lengths)
        params = SamplingParams(max_tokens=new)
        taken, _ = self._timed(self.pair, [prompt], params, [policy], lookahead=0)
        return slow / taken

    def lookahead(self) -> list[dict[str, Any]]:
        """Measure drafts with models whose argmaxes agree on a set share of the tokens, so that some guesses are
        accepted.
        """
        rows = []
        new = self.arguments.new
        prompts, params = prompts_of(1, 32, self.vocab_size), SamplingParams(max_tokens=new)
        for agreement in (0.0, 0.5, 0.8, 0.95):
            models = [self.model(shape) for shape in (self.arguments.base, self.arguments.assistant)]
            for seed, (model, follows) in enumerate(zip(models, successors(self.vocab_size, agreement), strict=True)):
                make_predictable(model, follows, seed)
            pair = collaborate(*models)
            pair.generate(prompts, SamplingParams(max_tokens=8), policy=pattern(0.5, 1, 8, 0))
            for rate in (0.3, 0.5):
                for run in RUNS:
                    policies = [pattern(rate, run, new, 1)]
                    plain, out = self._timed(pair, prompts, params, policies, lookahead=0)
                    drafting, drafted = self._timed(pair, prompts, params, policies, lookahead=None)
                    row = {
                        "agreement": agreement,
                        "rate": round(out.deferral_rate, 3),
                        "run": run,
                        "lookahead_speedup": plain / drafting,
                        "assistant_passes": out.usage["assistant"].forward_passes,
                        "assistant_passes_ahead": drafted.usage["assistant"].forward_passes,
                    }
                    if self.dtype == torch.float32:
                        assert [c.token_ids for c in out] == [c.token_ids for c in drafted]
                    rows.append(_logged(row))
        return rows

    def context(self) -> list[dict[str, Any]]:
        """Time per token as the context grows, relative to a bare pass at that length. The base writes every token."""
        rows = []
        for length in (512, 1024, 2048, 4096):
            (prompt,) = prompts_of(1, length, self.vocab_size)
            stream = self.pair.stream(prompt, SamplingParams(max_tokens=33), policy=BASE_ALONE, lookahead=0)
            next(stream)
            start = time.perf_counter()
            written = sum(1 for _ in stream)
            taken = (time.perf_counter() - start) / written
            bare = pass_seconds(self.models[0], 1, length, [1])[1]
            rows.append(_logged({"context": length, "ms_per_token": 1e3 * taken, "over_bare_pass": taken / bare}))
        return rows

    def cache(self) -> list[dict[str, Any]]:
        """KV cache memory of sequences with mixed lengths, relative to what their tokens need."""
        rows = []
        for batch in self.arguments.batch:
            prompts = [prompts_of(1, 16 + 37 * i, self.vocab_size)[0] for i in range(batch)]
            engine = self.pair.engine(batch, 0)
            for prompt, seed in zip(prompts, range(batch), strict=True):
                policy = pattern(0.3, 1, 64, seed)
                engine.add(Request(prompt, SamplingParams(max_tokens=64), policy))
            for _ in range(48):
                engine.step()
            held = sum(runner.cache_bytes for runner in self.pair.runners)
            needed = sum(one.bytes_per_position * sum(map(len, one._texts)) for one in self.pair.runners)
            engine.close()
            rows.append(
                _logged({"batch": batch, "longest_prompt": len(prompts[-1]), "held_over_needed": held / needed})
            )
        return rows

    def judge(self) -> list[dict[str, Any]]:
        """Rules that read the assistant at every token, with and without drafts, and judges."""
        from benchmarks.judges import judge_rows

        def models() -> list[PreTrainedModel]:
            return [self.model(shape) for shape in (self.arguments.base, self.arguments.assistant)]

        options = self.arguments
        rows = judge_rows(models, options.agreement, options.batch, 32, options.new, options.repeats)
        return [_logged(row) for row in rows]

    def llama(self) -> list[dict[str, Any]]:
        """The pair and its assistant in llama.cpp, beside bare loops."""
        from benchmarks.llama import llama_rows

        return [_logged(row) for row in llama_rows(self.arguments)]


def _logged(row: dict[str, Any]) -> dict[str, Any]:
    """Round a row and print it to stderr, because stdout is for the JSON."""
    rounded = {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}
    print(rounded, file=sys.stderr, flush=True)
    return rounded


def _generate(model: PreTrainedModel, prompts: list[list[int]], new: int) -> None:
    ids = torch.tensor(prompts, device=model.device)
    options = {"do_sample": False, "min_new_tokens": new, "max_new_tokens": new, "pad_token_id": 0}
    model.generate(ids, attention_mask=torch.ones_like(ids), **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=SHAPES, default="25m")
    parser.add_argument("--assistant", choices=SHAPES, default="150m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, nargs="+", default=[32, 512], help="prompt tokens")
    parser.add_argument("--new", type=int, default=256, help="new tokens")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rate", type=float, nargs="+", default=[0.1, 0.3, 0.5])
    parser.add_argument("--agreement", type=float, nargs="+", default=[0.0, 0.5, 0.8, 0.95], help="of part judge")
    parser.add_argument("--repeats", type=int, default=2, help="runs of a single sequence; the fastest counts")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=("grid", "lookahead", "context", "cache", "judge", "llama"),
        default=["grid", "lookahead", "context"],
    )
    parser.add_argument("--out", type=Path, help="write the JSON here instead of to stdout")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    bench = Bench(arguments)
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "grid": bench.grid,
        "lookahead": bench.lookahead,
        "context": bench.context,
        "cache": bench.cache,
        "judge": bench.judge,
        "llama": bench.llama,
    }
    run_parts("benchmarks.decode", arguments, parts)


if __name__ == "__main__":
    main()
