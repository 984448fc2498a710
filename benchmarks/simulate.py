"""Predictions of the cost model in `benchmarks.servers.cost` for collaborations across servers, as tables.

python -m benchmarks.simulate              the deferral rate from which the assistant alone is faster, for assumed times
python -m benchmarks.simulate FILE.json    the same for measured servers, and predicted and measured times

FILE.json holds "servers", "cores" and "cases". "servers" has, for "base" and "assistant", the argument of
`benchmarks.servers.cost.calibrated`. "cores" is needed if one machine runs both. "cases" is a list of

    {"name", "completions", "tokens", "deferrals", "runs", "concurrency", "wall_s", "requests"}

where tokens, deferrals, runs of deferrals and requests are sums over the completions. A case may have "prompt_tokens",
the prompt tokens of each completion. The default is 1, so that reading prompts costs nothing. It may also have
"method": "collaboration" (the default), "assistant alone", or "token by token", which needs "vocab_size".
"""

from __future__ import annotations

import json
import math
import random
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.servers.cost import Job, Server, alone, calibrated, collaboration, token_by_token
from benchmarks.servers.simulation import simulate
from benchmarks.servers.workload import Verdict, Workload, scattered, verdict
from benchmarks.table import PREDICTIONS, table
from collm.errors import ConfigError

AT_ONCE = (1, 4, 16, 64)
ASSUMED = {"assistant": "assistant's step", "request": "a request"} | {str(n): f"{n} at once" for n in AT_ONCE}
EVERY = {"name", "completions", "tokens", "concurrency", "wall_s", "requests"}
OPTIONAL = {"method", "prompt_tokens"}
METHODS: dict[str, set[str]] = {
    "collaboration": {"deferrals", "runs"},
    "assistant alone": set(),
    "token by token": {"deferrals", "runs", "vocab_size"},
}


def jobs(case: dict[str, Any], servers: list[Server]) -> list[Job]:
    """The completions of a case, with deferrals at random positions.

    Raises:
        ConfigError: a field is missing or unknown.
    """
    method, prompt = case.get("method", "collaboration"), case.get("prompt_tokens", 1)
    if method not in METHODS:
        raise ConfigError(f"method is {method!r}, expected one of {', '.join(map(repr, METHODS))}")
    needed = EVERY | METHODS[method]
    missing, unknown = sorted(needed - set(case)), sorted(set(case) - needed - OPTIONAL)
    if missing or unknown:
        what = f"lacks {missing[0]!r}" if missing else f"has the unknown field {unknown[0]!r}"
        raise ConfigError(f"a case of {method!r} {what}; expected {', '.join(sorted(needed))}")
    ends = [case["tokens"] * i // case["completions"] for i in range(case["completions"] + 1)]
    if method == "assistant alone":
        return [alone(1, end - start, prompt) for start, end in pairwise(ends)]
    authors = scattered(case["tokens"], case["deferrals"], case["runs"], random.Random(0))
    texts = [authors[start:end] for start, end in pairwise(ends)]
    if method == "collaboration":
        return [collaboration(text, prompt, servers) for text in texts]
    return [token_by_token(text, prompt, servers, case["vocab_size"]) for text in texts]


def predictions(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Predicted and measured times of each case of a file."""
    servers, cores = servers_of(content), content.get("cores", math.inf)
    return [_row(case, servers, cores) for case in content["cases"]]


def servers_of(content: dict[str, Any]) -> list[Server]:
    """The servers of base and assistant."""
    return [calibrated(content["servers"][name]) for name in ("base", "assistant")]


def _row(case: dict[str, Any], servers: list[Server], cores: float) -> dict[str, Any]:
    outcome = simulate(jobs(case, servers), servers, case["concurrency"], cores)
    return {
        "name": case["name"],
        "measured_s": float(case["wall_s"]),
        "predicted_s": outcome.seconds,
        "ratio": outcome.seconds / case["wall_s"],
        "requests": case["requests"],
        "predicted_requests": sum(outcome.requests),
        "base_busy": outcome.busy[0],
        "assistant_busy": outcome.busy[1],
    }


def verdicts(base: Server, assistant: Server, tokens: int, prompt: int, cores: float = math.inf) -> list[Verdict]:
    """The verdicts for 1, 4, 16 and 64 completions at once."""
    loads = [Workload(max(16, 2 * n), tokens, prompt, n, rate=0, cores=cores) for n in AT_ONCE]
    return [verdict(load, base, assistant) for load in loads]


def measured(path: Path) -> list[str]:
    """The lines of the page for a file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    one = content["cases"][0]
    tokens, prompt = one["tokens"] // one["completions"], one.get("prompt_tokens", 1)
    by_load = verdicts(*servers_of(content), tokens, prompt, content.get("cores", math.inf))
    return [*table(predictions(content), PREDICTIONS), "", *map(str, by_load)]


def assumed() -> list[str]:
    """A table for assumed times, in steps of the base. Each further token in a step, generated or read, adds 1 %."""
    rows = []
    for step in (2, 5, 10):
        for request in (0.5, 2.0):
            base, assistant = (Server(request, size, size / 100, size / 100) for size in (1.0, float(step)))
            by_load = verdicts(base, assistant, 64, 64)
            cells = {str(one.concurrency): "never" if one.rate is None else one.rate for one in by_load}
            rows.append({"assistant": step, "request": request, **cells})
    return table(rows, ASSUMED)


if __name__ == "__main__":
    print("\n".join(measured(Path(sys.argv[1])) if sys.argv[1:] else assumed()))
