"""Decoding across vLLM servers, compared with other ways to run the same pair.

    python -m benchmarks.vllm --vllm-python .venv-vllm/bin/python --out benchmarks/results/cpu-vllm.json

Starts a server for each of two models of real shapes with random weights. Measures these methods in one run, on the
same servers: `collm` across them; one request for each token with the log-probabilities of the whole vocabulary, as the
method's authors run it; the assistant alone and the base alone, with one request each; and the same pair in this
process. Tokens are sampled at temperature 1, because random models repeat themselves otherwise. The threshold is set so
that about three of ten tokens are deferred.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

from benchmarks.pairs import SHAPES, make_model, make_tokenizer, prompts_of
from benchmarks.record import run_parts
from collm import CoLLM, DeferralHead, ModelSpec, SamplingParams
from collm.core.head import defer_probs
from collm.core.policies import Policy, SingleAuthorPolicy, ThresholdPolicy
from collm.http.client import socket_transport
from collm.vllm import ROW_SCALE
from collm.vllm.export import Note
from collm.vllm.launch import ServerProcess, check_python, launched
from collm.vllm.placement import Machine, placed
from collm.vllm.servers import Servers

PER_TOKEN = "token by token"


class Bench:
    """A pair of models behind servers, and the same pair in memory."""

    def __init__(self, arguments: argparse.Namespace, stack: ExitStack) -> None:
        self.arguments = arguments
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        vocab_size = arguments.vocabulary
        tokenizer = make_tokenizer(vocab_size)
        for name in ("base", "assistant"):
            make_model(getattr(arguments, name), vocab_size, torch.float32, "cpu").save_pretrained(root / name)
            tokenizer.save_pretrained(root / name)
        head = DeferralHead(SHAPES[arguments.base][0])
        torch.nn.init.normal_(head.weight, std=0.2)
        specs = [ModelSpec(str(root / name)) for name in ("base", "assistant")]
        self.local = CoLLM(specs[0], [specs[1]], head, tokenizer)
        self.local.export_vllm(root / "export")
        self.note = Note.read(root / "export")
        flags = {name: ["--max-logprobs", "-1"] for name in ("base", "assistant")}
        models = {"base": ModelSpec(str(root / "export")), "assistant": specs[1]}
        plans = placed(models, Machine.this(), max_batch=max(arguments.batch), max_length=1024, flags=flags)
        self.servers = stack.enter_context(
            launched(plans, check_python(arguments.vllm_python), root / "logs", wait_s=600)
        )
        self.remote = CoLLM(specs[0], [specs[1]], head, tokenizer, servers=Servers([one.url for one in self.servers]))
        self._num_prompts = 0
        self.threshold = self._threshold()

    def _threshold(self) -> float:
        """The threshold at which three of ten tokens of the base's own text are deferred."""
        out = self.remote.generate(self._prompts(8), self._params(), threshold=1.0)
        probs = sorted(prob for one in out for prob in one.defer_probs)
        return probs[int(0.7 * len(probs))]

    def _params(self) -> SamplingParams:
        return SamplingParams(self.arguments.new, temperature=1.0)

    def _prompts(self, count: int) -> list[list[int]]:
        """Prompts that no server has read yet."""
        start, self._num_prompts = self._num_prompts, self._num_prompts + count
        prompts = prompts_of(count, self.arguments.prompt - 1, self.arguments.vocabulary)
        return [[10 + start + i, *prompt] for i, prompt in enumerate(prompts)]

    def compare(self) -> list[dict[str, Any]]:
        """Compare all methods at each batch size. Speeds are ratios of tokens per second."""
        rows = []
        for batch in self.arguments.batch:
            found = [self._measured(method, batch) for method in self._methods(batch)]
            speed = {case["name"]: case["tokens"] / case["wall_s"] for case in found}
            ours, slow = found[0], found[-1]
            rows.append(
                _logged(
                    {
                        "batch": batch,
                        "deferral_rate": ours["deferrals"] / ours["tokens"],
                        "requests_per_token": ours["requests"] / ours["tokens"],
                        "deferral_rate_per_token": slow["deferrals"] / slow["tokens"],
                        "tokens_per_second": speed["collm"],
                        "speed_vs_per_token": speed["collm"] / speed[PER_TOKEN],
                        "speed_vs_assistant": speed["collm"] / speed["assistant alone"],
                        "speed_vs_base": speed["collm"] / speed["base alone"],
                        "speed_vs_memory": speed["collm"] / speed["in memory"],
                    }
                )
            )
        return rows

    def _methods(self, batch: int) -> list[Callable[[int], dict[str, Any]]]:
        """Functions that decode `count` completions, `batch` at once. Ours comes first, that of the method's authors
        last.
        """
        threshold = ThresholdPolicy(self.threshold)
        return [
            lambda count: self._generated("collm", self.remote, batch, count, threshold),
            lambda count: self._generated("in memory", self.local, batch, count, threshold),
            lambda count: self._generated("assistant alone", self.remote, batch, count, SingleAuthorPolicy(1)),
            lambda count: self._generated("base alone", self.remote, batch, count, SingleAuthorPolicy(0)),
            lambda count: asyncio.run(self._per_token(batch, count, self.arguments.new_per_token)),
        ]

    def _measured(self, method: Callable[[int], dict[str, Any]], batch: int) -> dict[str, Any]:
        method(batch)  # warm-up
        return method(self.arguments.completions)

    def _generated(self, name: str, model: CoLLM, batch: int, count: int, policy: Policy) -> dict[str, Any]:
        prompts = self._prompts(count)
        start = time.perf_counter()
        out = model.generate(prompts, self._params(), policy=policy, max_batch=batch)
        wall_s = time.perf_counter() - start
        authors = [one.authors for one in out]
        return {
            "name": name,
            "tokens": sum(map(len, authors)),
            "deferrals": sum(map(sum, authors)),
            "wall_s": wall_s,
            "requests": sum(used.calls for used in out.usage.values()),
        }

    async def _per_token(self, batch: int, count: int, new: int) -> dict[str, Any]:
        room = asyncio.Semaphore(batch)
        limits = httpx.Limits(max_connections=None)
        mounts = {one.url.removesuffix("/v1"): socket_transport(one.url, limits=limits) for one in self.servers}
        async with httpx.AsyncClient(timeout=None, mounts=mounts) as client:

            async def one(prompt: list[int]) -> list[int]:
                async with room:
                    return await self._token_by_token(client, prompt, new)

            prompts = self._prompts(count)
            start = time.perf_counter()
            authors = await asyncio.gather(*map(one, prompts))
            wall_s = time.perf_counter() - start
        deferrals = sum(map(sum, authors))
        return {
            "name": PER_TOKEN,
            "tokens": count * new,
            "deferrals": deferrals,
            "wall_s": wall_s,
            "requests": count * new + deferrals,
        }

    async def _token_by_token(self, client: httpx.AsyncClient, prompt: list[int], new: int) -> list[int]:
        """Ask the base for every token, and the assistant where the base defers. Returns the author of each token."""
        text, authors = list(prompt), []
        base, assistant = self.servers
        defer_id, zero_id, bias = self.note.defer_ids[0], self.note.zero_id, self.note.biases[0]
        for _ in range(new):
            body = {"prompt": text, "max_tokens": 1, "temperature": 1, "return_tokens_as_token_ids": True}
            logprobs_by_token = await _logprobs(client, base, {**body, "logprobs": zero_id + 1})
            u = torch.tensor([(logprobs_by_token.pop(defer_id) - logprobs_by_token.pop(zero_id)) / ROW_SCALE + bias])
            authors.append(int(float(defer_probs(u)) > self.threshold))
            if authors[-1]:
                logprobs_by_token = await _logprobs(client, assistant, {**body, "logprobs": self.note.vocab_size})
            tokens, logprobs = zip(*logprobs_by_token.items(), strict=True)
            text.append(tokens[int(torch.multinomial(torch.tensor(logprobs).exp(), 1))])
        return authors


async def _logprobs(client: httpx.AsyncClient, server: ServerProcess, body: dict[str, Any]) -> dict[int, float]:
    answer = await _post(client, server, body)
    (top,) = answer["choices"][0]["logprobs"]["top_logprobs"]
    return {int(token.removeprefix("token_id:")): value for token, value in top.items()}


async def _post(client: httpx.AsyncClient, server: ServerProcess, body: dict[str, Any]) -> Any:
    reply = await client.post(f"{server.url}/completions", json={"model": server.name, **body})
    reply.raise_for_status()
    return reply.json()


def _logged(row: dict[str, Any]) -> dict[str, Any]:
    """Print a row to stderr, because stdout is for the JSON."""
    print(row, file=sys.stderr, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", required=True, help="interpreter with vLLM and the plug-in")
    parser.add_argument("--base", choices=SHAPES, default="25m")
    parser.add_argument("--assistant", choices=SHAPES, default="150m")
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch for the pair in this process")
    parser.add_argument("--prompt", type=int, default=64, help="prompt tokens")
    parser.add_argument("--new", type=int, default=64, help="new tokens")
    parser.add_argument("--new-per-token", type=int, default=16, help="new tokens of the token-by-token method")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--completions", type=int, default=16, help="completions of each method at each batch size")
    parser.add_argument("--out", type=Path, help="write the JSON here instead of to stdout")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    with ExitStack() as stack:
        bench = Bench(arguments, stack)
        run_parts("benchmarks.vllm", arguments, {"comparison": bench.compare})


if __name__ == "__main__":
    main()
