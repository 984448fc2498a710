"""Base and assistant in one vLLM engine, compared with other ways to serve the same pair.

    python -m benchmarks.one_engine --vllm-python .venv-vllm/bin/python --out benchmarks/results/cpu-one-engine.json

Starts one set of servers after another, each with all threads, and generates the same completions on each. The sets are
the assistant alone in a plain vLLM, the same with vLLM's n-gram speculation, base and assistant in one engine at set
deferral rates, and a server for each of them. Weights are random, so tokens are sampled at temperature 1, and the
random policy sets the deferral rate. "forecast" computes the speed of a round from estimated step times on a GPU.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

from benchmarks.pairs import SHAPES, make_model, make_tokenizer, prompts_of
from benchmarks.record import run_parts
from collm import CoLLM, DeferralHead, ModelSpec, SamplingParams
from collm.core.policies import RandomPolicy
from collm.http.client import socket_transport
from collm.vllm import POLICY
from collm.vllm.launch import ServerProcess, check_python, launched
from collm.vllm.placement import Machine, placed, placed_in_one
from collm.vllm.servers import Servers

PARTS = ("forecast", "ways", "separate")
"""In the order in which they run."""
ALONE, NGRAM, ONE, TWO = "assistant alone", "n-gram speculation", "one engine", "a server each"
READ_BYTES_PER_S = 0.7 * 3.35e12
"""Memory bandwidth of an H100: 3.35 TB/s in its data sheet, of which decoding kernels reach about 70 %."""
_WAVES = 4
"""Least number of completions per place in the batch. The last ones run in a smaller batch, and must weigh little."""
OTHER_S = 0.5e-3
"""Time of a step besides reading weights: scheduling, sampling, kernel launches. An assumption."""
GPU_PAIRS = {  # weights of base and assistant in billions, bfloat16, on one GPU
    "1B + 8B": (1.24, 8.03),
    "1B + 30B": (1.24, 30.5),
    "3B + 8B": (3.21, 8.03),
    "0.5B + 7B": (0.49, 7.62),
}


class Bench:
    """A pair of models of real shapes with random weights, saved on disk."""

    def __init__(self, arguments: argparse.Namespace, root: Path) -> None:
        self.arguments = arguments
        self.root = root
        tokenizer = make_tokenizer(arguments.vocabulary)
        for name in ("base", "assistant"):
            model = make_model(getattr(arguments, name), arguments.vocabulary, torch.float32, "cpu")
            model.save_pretrained(root / name)
            tokenizer.save_pretrained(root / name)
        self.specs = [ModelSpec(str(root / name)) for name in ("base", "assistant")]
        self.head = DeferralHead(SHAPES[arguments.base][0])
        self.tokenizer = tokenizer
        CoLLM(self.specs[0], [self.specs[1]], self.head, tokenizer).save_pretrained(root / "artefact")
        self.python = check_python(arguments.vllm_python, one_engine=True)
        self.length = arguments.prompt + arguments.new + 32
        self._num_prompts = 0
        self._alone: dict[int, float] = {}

    def compare(self) -> list[dict[str, Any]]:
        """Tokens per second of each way in one vLLM server, at each batch size and rate."""
        found = []
        with self._launched(self._plain()) as server:
            found += [self._row(ALONE, server, batch) for batch in self.arguments.batch]
        with self._launched(self._plain(NGRAM)) as server:
            found += [self._row(NGRAM, server, batch) for batch in self.arguments.batch]
        with self._launched(self._in_one()) as server:
            found += [
                self._row(ONE, server, batch, rate) for rate in self.arguments.rate for batch in self.arguments.batch
            ]
        self._alone = {row["batch"]: row["tokens_per_second"] for row in found if row["way"] == ALONE}
        return self._compared(found)

    def separate(self) -> list[dict[str, Any]]:
        """Tokens per second with a server for each model, at each batch size and rate. Runs after `compare`."""
        return self._compared(self._two_servers())

    def _compared(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**row, "speed_vs_assistant": row["tokens_per_second"] / self._alone[row["batch"]]} for row in rows]

    def forecast(self) -> list[dict[str, Any]]:
        """Forecast speeds on a GPU. k passes of the base and one of the assistant give (1 - (1 - rate)^k) / rate
        tokens.
        """
        rows = []
        for pair, sizes in GPU_PAIRS.items():
            base_s, assistant_s = (2e9 * size / READ_BYTES_PER_S + OTHER_S for size in sizes)
            for rate in (0.05, 0.1, 0.2, 0.3):
                tokens = {k: (1 - (1 - rate) ** k) / rate for k in range(1, 33)}
                speeds = {k: count * assistant_s / (k * base_s + assistant_s) for k, count in tokens.items()}
                best = max(speeds, key=lambda k: speeds[k])
                rows.append(
                    {
                        "pair": pair,
                        "deferral_rate": rate,
                        "base_ms": 1e3 * base_s,
                        "assistant_ms": 1e3 * assistant_s,
                        "best_passes": best,
                        "forecast_vs_assistant": speeds[best],
                    }
                )
        return rows

    # Servers

    def _plain(self, speculation: str | None = None) -> ServerProcess:
        """Plan a vLLM server of the assistant alone, with the flags of one engine."""
        plan = self._in_one()
        flags = list(plan.flags)
        for name in ("--speculative-config", "--additional-config"):
            del flags[flags.index(name) : flags.index(name) + 2]
        if speculation is not None:
            ngram = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
            flags += ["--speculative-config", json.dumps(ngram)]
        return ServerProcess(plan.name, plan.model, flags, plan.environment)

    def _in_one(self) -> ServerProcess:
        options = {"max_batch": max(self.arguments.batch), "max_length": self.length}
        return placed_in_one(str(self.root / "artefact"), Machine.this(), **options)

    @contextmanager
    def _launched(self, plan: ServerProcess) -> Iterator[ServerProcess]:
        with launched([plan], self.python, self.root / "logs", wait_s=600) as (server,):
            yield server

    def _two_servers(self) -> list[dict[str, Any]]:
        model = CoLLM.from_pretrained(self.root / "artefact")
        model.export_vllm(self.root / "export")
        served = {"base": ModelSpec(str(self.root / "export")), "assistant": self.specs[1]}
        plans = placed(served, Machine.this(), max_batch=max(self.arguments.batch), max_length=self.length)
        rows = []
        with launched(plans, self.python, self.root / "logs", wait_s=600) as servers:
            urls = Servers([server.url for server in servers])
            model = CoLLM(self.specs[0], [self.specs[1]], self.head, self.tokenizer, servers=urls)
            for rate in self.arguments.rate:
                for batch in self.arguments.batch:
                    work = partial(self._generated, model, rate, batch)
                    rows.append(self._measured(TWO, batch, rate, work))
        return rows

    # Measurements

    def _row(self, way: str, server: ServerProcess, batch: int, rate: float | None = None) -> dict[str, Any]:
        more = {} if rate is None else {"vllm_xargs": {POLICY: f"random:rate={rate}"}}
        return self._measured(way, batch, rate, lambda count: asyncio.run(self._requests(server, count, batch, more)))

    def _measured(self, way: str, batch: int, rate: float | None, work: Callable[[int], int]) -> dict[str, Any]:
        work(batch)  # warm-up
        start = time.perf_counter()
        tokens = work(max(self.arguments.completions, _WAVES * batch))
        row = {"way": way, "batch": batch, "deferral_rate": rate}
        return _logged({**row, "tokens_per_second": tokens / (time.perf_counter() - start)})

    async def _requests(self, server: ServerProcess, count: int, batch: int, more: dict[str, Any]) -> int:
        """Generate `count` completions, `batch` at once. Returns their number of tokens."""
        room = asyncio.Semaphore(batch)
        async with httpx.AsyncClient(timeout=None, transport=socket_transport(server.url)) as client:

            async def one(prompt: list[int]) -> int:
                body = {"model": server.name, "prompt": prompt, "max_tokens": self.arguments.new, "temperature": 1}
                async with room:
                    reply = await client.post(f"{server.url}/completions", json={**body, "ignore_eos": True, **more})
                reply.raise_for_status()
                return int(reply.json()["usage"]["completion_tokens"])

            return sum(await asyncio.gather(*map(one, self._prompts(count))))

    def _generated(self, model: CoLLM, rate: float, batch: int, count: int) -> int:
        params = SamplingParams(self.arguments.new, temperature=1.0, ignore_eos=True)
        found = model.generate(self._prompts(count), params, policy=RandomPolicy(rate), max_batch=batch)
        return sum(len(one.token_ids) for one in found)

    def _prompts(self, count: int) -> Sequence[list[int]]:
        """Prompts that no server has read yet."""
        start, self._num_prompts = self._num_prompts, self._num_prompts + count
        prompts = prompts_of(count, self.arguments.prompt - 1, self.arguments.vocabulary)
        return [[10 + (start + i) % 5000, *prompt] for i, prompt in enumerate(prompts)]


def _logged(row: dict[str, Any]) -> dict[str, Any]:
    """Print a row to stderr, because stdout is for the JSON."""
    print(row, file=sys.stderr, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", required=True, help="interpreter with vLLM and collm")
    parser.add_argument("--base", choices=SHAPES, default="25m")
    parser.add_argument("--assistant", choices=SHAPES, default="150m")
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--prompt", type=int, default=32, help="prompt tokens")
    parser.add_argument("--new", type=int, default=96, help="new tokens")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--rate", type=float, nargs="+", default=[0.3, 0.1], help="deferral rates")
    parser.add_argument("--completions", type=int, default=12, help="least number in each measurement")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--out", type=Path, help="write the JSON here instead of to stdout")
    arguments = parser.parse_args()
    arguments.threads = os.cpu_count()  # each server uses all cores
    if "separate" in arguments.parts and "ways" not in arguments.parts:
        parser.error("--parts separate is compared with the assistant alone, which ways measures; give both")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    with ExitStack() as stack:
        bench = Bench(arguments, Path(stack.enter_context(tempfile.TemporaryDirectory())))
        run_parts(
            "benchmarks.one_engine",
            arguments,
            {"forecast": bench.forecast, "ways": bench.compare, "separate": bench.separate},
        )


if __name__ == "__main__":
    main()
