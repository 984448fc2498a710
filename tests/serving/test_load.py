"""Two hundred streams at once, some of which are left: each ends as it would alone, and nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import json
import random
from collections import Counter
from typing import Any

import httpx
import pytest
from transformers import PreTrainedTokenizerFast

from collm import SamplingParams
from tests.engine.test_engine import prompts_of
from tests.serving.conftest import CALIBRATION, make_pair

STREAMS = 200


def alive() -> Counter[str]:
    """How many objects there are of each of collm's classes."""
    gc.collect()
    kinds = [type(one) for one in gc.get_objects()]
    return Counter(kind.__qualname__ for kind in kinds if str(kind.__module__).startswith("collm."))


async def stream(
    client: httpx.AsyncClient, body: dict[str, Any], leave_after: int | None
) -> tuple[int, list[int], bool]:
    """Status, tokens, and whether the end was reached, of one stream that may be left after some chunks."""
    token_ids: list[int] = []
    async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as reply:
        chunks = 0
        async for line in reply.aiter_lines():
            if line == "data: [DONE]":
                return reply.status_code, token_ids, True
            if line.startswith("data: "):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event
                token_ids += event["choices"][0]["collm"]["token_ids"]
                chunks += 1
            if chunks == leave_after:
                break
        return reply.status_code, token_ids, False


@pytest.mark.soak
def test_two_hundred_streams_with_cancellations(serve_pair: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    rng = random.Random(0)
    prompts = prompts_of(1, STREAMS)
    lengths = [rng.randrange(1, 40) for _ in prompts]
    leaving = [rng.randrange(1, 4) if rng.random() < 0.3 else None for _ in prompts]
    pair = make_pair(tokenizer, calibration=CALIBRATION)
    expected = pair.generate(prompts, [SamplingParams(length) for length in lengths])

    async def all_of_them(url: str) -> list[Any]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
            bodies = [
                {"model": "pair", "prompt": prompt, "max_tokens": length}
                for prompt, length in zip(prompts, lengths, strict=True)
            ]
            return await asyncio.gather(*map(stream, [client] * STREAMS, bodies, leaving))

    with serve_pair(max_batch=16, keep_alive_s=1) as server:
        assert server.post("/v1/completions", model="pair", prompt=[5], max_tokens=2).status_code == 200
        server.until(server.idle)
        before = alive()
        found = asyncio.run(all_of_them(server.url))
        server.until(server.idle)
        # The model keeps the layout of its last pass, and the server idle connections for 1 s.
        assert server.post("/v1/completions", model="pair", prompt=[5], max_tokens=2).status_code == 200
        server.until(lambda: alive() <= before, seconds=10)
    left = 0
    for (status, token_ids, ended), completion, leave_after in zip(found, expected, leaving, strict=True):
        assert status == 200
        assert token_ids == completion.token_ids[: len(token_ids)]
        assert token_ids == completion.token_ids if ended else leave_after is not None
        left += not ended
    assert left > 20
