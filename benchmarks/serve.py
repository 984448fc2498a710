"""`collm serve` under load: its speed compared with the same engine without HTTP, and many streams with disconnects.

    python -m benchmarks.serve --batch 16 --rounds 5

Models have real shapes and random weights. A token is deferred with probability 0.3. Clients run in a separate process.
`speed_vs_engine` is tokens per second over HTTP, relative to `CoLLM.generate` with the same requests. `time_vs_plain`
is the engine's time with penalties or a schema, relative to the time without, for equally many tokens. Prints JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.pairs import SHAPES, collaborate, make_byte_tokenizer, make_model, prompts_of
from benchmarks.record import run_parts
from collm import CoLLM, SamplingParams, StructuredOutputs
from collm.serving.run import APIServer
from collm.serving.settings import Settings

PARTS = ("throughput", "processors", "load", "bodies")
POLICY = "random:rate=0.3"
_ENDLESS: dict[str, Any] = {
    "type": "array",
    "minItems": 10_000,
    "items": {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "tags": {"type": "array", "items": {}}},
        "required": ["name", "age"],
    },
}
"""A schema that no answer satisfies within the measured number of tokens."""


@contextmanager
def serving(model: CoLLM, max_batch: int) -> Iterator[tuple[APIServer, Callable[[Callable[[], bool]], None]]]:
    """Run a server in a thread. Yields the server when it is ready, and a function that waits for a condition."""
    gc.freeze()  # as `collm serve` does
    server = APIServer({"pair": model}, Settings(max_batch=max_batch, time_limit_s=600), host="127.0.0.1", port=0)
    thread = threading.Thread(target=server.run)

    def until(holds: Callable[[], bool]) -> None:
        while not holds():
            thread.join(0.01)
            if not thread.is_alive():
                raise SystemExit("the server ended unexpectedly; see its log")

    thread.start()
    try:
        until(lambda: server.started and server.service.targets["pair"].worker.ready)
        yield server, until
    finally:
        server.should_exit = True
        thread.join()


def streams(server: APIServer, requests: list[dict[str, Any]]) -> dict[str, Any]:
    """Run streams in a client process and return its results."""
    host, port = server.servers[0].sockets[0].getsockname()
    command = [sys.executable, "-m", "benchmarks.streams", host, str(port)]
    done = subprocess.run(command, input=json.dumps(requests), capture_output=True, text=True, check=True)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


class Bench:
    """One pair of models."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.vocab_size = SHAPES[arguments.base][-1]
        shapes = (arguments.base, arguments.assistant)
        self.pair = collaborate(
            *(make_model(one, self.vocab_size, torch.float32, "cpu", packed=True) for one in shapes)
        )

    def throughput(self) -> list[dict[str, Any]]:
        """Compare as many streams as the batch holds with the engine alone, in turn."""
        rows = []
        for batch in self.arguments.batch:
            prompts = prompts_of(batch, self.arguments.prompt, self.vocab_size)
            params = [SamplingParams(self.arguments.new, seed=seed) for seed in range(batch)]
            bodies = [
                {"model": "pair", "prompt": prompt, "max_tokens": self.arguments.new, "seed": seed}
                for seed, prompt in enumerate(prompts)
            ]
            requests = [{"body": {**body, "collm": {"policy": POLICY}}, "leave_after": None} for body in bodies]
            alone, served = [], []
            for _ in range(self.arguments.repeats + 1):
                start = time.perf_counter()
                self.pair.generate(prompts, params, policy=POLICY, max_batch=batch)
                alone.append(time.perf_counter() - start)
                with serving(self.pair, batch) as (server, _):
                    result = streams(server, requests)
                assert all(one["tokens"] == self.arguments.new for one in result["streams"])
                served.append(result["seconds"])
            engine_s, served_s = min(alone[1:]), min(served[1:])  # without the first runs, which are warm-up
            row = {"batch": batch, "speed_vs_engine": engine_s / served_s, "engine_s": engine_s, "served_s": served_s}
            row |= {"tokens_per_second": batch * self.arguments.new / served_s}
            rows.append(_logged(row))
        return rows

    def processors(self) -> list[dict[str, Any]]:
        """Cost of penalties and of a JSON schema, in turn with plain requests on the same models."""
        shapes = (self.arguments.base, self.arguments.assistant)
        models = (make_model(one, self.vocab_size, torch.float32, "cpu", packed=True) for one in shapes)
        pair = collaborate(*models, tokenizer=make_byte_tokenizer(self.vocab_size))
        variants: dict[str, dict[str, Any]] = {
            "plain": {},
            "penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.5},
            "JSON schema": {"structured_outputs": StructuredOutputs(json=_ENDLESS)},
        }
        rows = []
        for batch in self.arguments.batch:
            prompts = prompts_of(batch, self.arguments.prompt, self.vocab_size)
            seconds: dict[str, list[float]] = {name: [] for name in variants}
            for _ in range(self.arguments.repeats + 1):
                for name, options in variants.items():
                    seeds = range(batch)
                    params = [
                        SamplingParams(self.arguments.new, 1.0, seed=n, ignore_eos=True, **options) for n in seeds
                    ]
                    start = time.perf_counter()
                    out = pair.generate(prompts, params, policy=POLICY, max_batch=batch)
                    seconds[name].append(time.perf_counter() - start)
                    assert all(len(one.token_ids) == self.arguments.new for one in out)
            best = {name: min(times[1:]) for name, times in seconds.items()}
            rows += [
                _logged(
                    {"batch": batch, "asked": name, "seconds": best[name], "time_vs_plain": best[name] / best["plain"]}
                )
                for name in variants
            ]
        return rows

    def load(self) -> list[dict[str, Any]]:
        """Run rounds of streams of mixed lengths. Three in ten clients disconnect early."""
        rows = []
        rng = random.Random(0)
        with serving(self.pair, self.arguments.batch[-1]) as (server, until):
            worker = server.service.targets["pair"].worker
            for number in range(self.arguments.rounds):
                result = streams(server, [self._request(rng) for _ in range(self.arguments.streams)])
                until(lambda: not (worker.outstanding or len(worker.running)))
                seen = result["streams"]
                row = {
                    "round": number + 1,
                    "finished": sum(one["ended"] for one in seen),
                    "left": sum(not one["ended"] and one["error"] is None for one in seen),
                    "errors": sum(one["error"] is not None or one["status"] != 200 for one in seen),
                    "open_slots": sum(getattr(runner, "open_slots") for runner in self.pair.runners),  # noqa: B009
                    "resident_mb": resident_mb(),
                    "tokens_per_second": sum(one["tokens"] for one in seen) / result["seconds"],
                }
                rows.append(_logged(row))
        return rows

    def bodies(self) -> list[dict[str, Any]]:
        """Send bodies of the largest size and of many shapes, one after another, and ask /health meanwhile."""
        with serving(self.pair, 1) as (server, _):
            host, port = server.servers[0].sockets[0].getsockname()
            command = [sys.executable, "-m", "benchmarks.bodies", host, str(port)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        return [_logged(row) for row in json.loads(done.stdout)]

    def _request(self, rng: random.Random) -> dict[str, Any]:
        (prompt,) = prompts_of(1, rng.randrange(4, 64), self.vocab_size)
        body = {"model": "pair", "prompt": prompt, "max_tokens": rng.randrange(4, 65), "seed": rng.randrange(1000)}
        leave_after = rng.randrange(1, 20) if rng.random() < 0.3 else None
        return {"body": {**body, "collm": {"policy": POLICY}}, "leave_after": leave_after}


def _logged(row: dict[str, Any]) -> dict[str, Any]:
    """Round a row and print it to stderr, because stdout is for the JSON."""
    rounded = {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}
    print(rounded, file=sys.stderr, flush=True)
    return rounded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=SHAPES, default="25m")
    parser.add_argument("--assistant", choices=SHAPES, default="150m")
    parser.add_argument(
        "--threads", type=int, default=1, help="threads of torch; the server and the clients need further threads"
    )
    parser.add_argument("--prompt", type=int, default=32, help="prompt tokens")
    parser.add_argument("--new", type=int, default=64, help="new tokens")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--repeats", type=int, default=3, help="measured runs; the fastest counts")
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, help="write the JSON here instead of to stdout")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    bench = Bench(arguments)
    run_parts("benchmarks.serve", arguments, {name: getattr(bench, name) for name in PARTS})


if __name__ == "__main__":
    main()
