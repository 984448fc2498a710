"""The decoding loop across servers: the base writes on until it wants to defer, an assistant writes one token."""

from __future__ import annotations

import asyncio
import math
import queue
import random
from collections import deque
from collections.abc import AsyncGenerator
from concurrent.futures import Future
from contextlib import aclosing
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from collm.core.objective import defer_probs
from collm.core.policies import Policy, SingleAuthorPolicy, ThresholdPolicy
from collm.core.types import BASE
from collm.decoding.draws import Draw
from collm.decoding.engine import Emitted
from collm.decoding.pacing import Odds
from collm.decoding.request import Request, check_prompt
from collm.decoding.sequence import Decision, Sequence
from collm.errors import CollmError, ConfigError, ModelFailure
from collm.models.runner import Assistant
from collm.vllm import THRESHOLD
from collm.vllm.endpoint import Written
from collm.vllm.fleet import Fleet

_PATIENCE_S = 0.02
"""A step waits no longer for news, so that requests can come and go between steps."""


class VllmEngine:
    """Decodes requests on servers; used as `decoding.engine.Engine` is.

    Of a request at most two calls are made for each deferral, and one more: the base is asked to go on until it
    defers, then the assistant for one token. The servers batch what runs at once.

    Args:
        fleet: the servers.
        tokenizer: of all models.
        eos_ids: tokens that end a sequence.
        max_batch: most sequences decoded at once; further ones wait.

    Raises:
        ConfigError: a limit out of range.
    """

    def __init__(
        self, fleet: Fleet, tokenizer: PreTrainedTokenizerBase, *, eos_ids: frozenset[int], max_batch: int = 16
    ) -> None:
        if max_batch < 1:
            raise ConfigError(f"max_batch is {max_batch}, expected at least 1")
        self.fleet = fleet
        self.tokenizer = tokenizer
        self.eos_ids = eos_ids
        self.max_batch = max_batch
        self._waiting: deque[Sequence] = deque()
        self._active: dict[int, Future[None]] = {}
        self._count = 0
        self._news: queue.SimpleQueue[Emitted] = queue.SimpleQueue()
        self._known: dict[tuple[Sequence, int], int] = {}  # tokens that a server has read or written of a sequence

    @property
    def has_work(self) -> bool:
        return bool(self._active or self._waiting)

    def add(self, request: Request) -> int:
        """Queue a request; its number tells its steps from others'.

        Raises:
            RequestError: the prompt is empty, holds unknown token ids or leaves no room in a model's context.
            ConfigError: a policy or a parameter that servers cannot follow.
        """
        check_prompt(self.fleet.authors, self.fleet.vocab_size, request.prompt_ids)
        _check_servable(request, len(self.fleet.authors))
        number, self._count = self._count, self._count + 1
        authors = cast("list[Assistant]", self.fleet.authors)  # a sequence without drafts asks for their limits only
        self._waiting.append(Sequence(number, request, authors, self.tokenizer, self.eos_ids, Odds()))
        return number

    def cancel(self, number: int) -> None:
        """Drop a request, running or waiting; its servers are told at once."""
        self._waiting = deque(sequence for sequence in self._waiting if sequence.number != number)
        running = self._active.pop(number, None)
        if running is not None:
            running.cancel()

    def close(self) -> None:
        """Drop all requests."""
        self._waiting.clear()
        for number in list(self._active):
            self.cancel(number)

    def step(self) -> list[Emitted]:
        """What has become certain since the last step, in order; waits a little for it."""
        while self._waiting and len(self._active) < self.max_batch:
            sequence = self._waiting.popleft()
            work = self._decode(sequence)
            self._active[sequence.number] = asyncio.run_coroutine_threadsafe(work, self.fleet.loop)
        news = []
        try:
            news.append(self._news.get(timeout=_PATIENCE_S))
            while True:
                news.append(self._news.get_nowait())
        except queue.Empty:
            pass
        news = [emitted for emitted in news if emitted.number in self._active]  # not of what was dropped
        for emitted in news:
            if emitted.completion is not None or emitted.failure is not None:
                self._active.pop(emitted.number, None)
        return news

    # In the fleet's thread

    async def _decode(self, sequence: Sequence) -> None:
        try:
            while sequence.finish_reason is None:
                if isinstance(sequence.request.policy, SingleAuthorPolicy) and sequence.request.policy.writer != BASE:
                    await self._assistant_writes(sequence, sequence.request.policy.writer)
                else:
                    deferral = await self._base_writes(sequence)
                    if deferral is not None:
                        await self._ask(sequence, *deferral)
        except CollmError as error:
            self._news.put(Emitted(sequence.number, failure=error))
        except Exception as error:
            failure = ModelFailure(f"decoding across servers broke down: {type(error).__name__}: {error}")
            failure.__cause__ = error
            self._news.put(Emitted(sequence.number, failure=failure))
        finally:
            for author in range(len(self.fleet.authors)):
                self._known.pop((sequence, author), None)

    async def _base_writes(self, sequence: Sequence, most: int | None = None) -> tuple[int, float] | None:
        """Let the base write on, to the end, or at most so many tokens without deferring, or until it defers: the
        assistant and the defer prob then."""
        policy = sequence.request.policy
        threshold = policy.threshold if isinstance(policy, ThresholdPolicy) and most is None else 1.0
        body = {
            **self._body(sequence, BASE, most),
            "logprob_token_ids": [*self.fleet.defer_ids, self.fleet.zero_id],
            "vllm_xargs": {THRESHOLD: threshold},
        }
        async with aclosing(self._stream(sequence, BASE, body)) as stream:
            async for written in stream:
                defer_prob, logprob = self._of_row(written)
                if written.token_id in self.fleet.defer_ids:
                    return self.fleet.defer_ids.index(written.token_id) + 1, defer_prob
                self._settle(sequence, Decision(BASE, defer_prob, None, Draw(written.token_id, logprob)))
                if sequence.finish_reason is not None:
                    return None
        return None

    async def _assistant_writes(self, sequence: Sequence, author: int) -> None:
        """Let an assistant write everything; the base is not asked, so its defer prob is given as 1."""
        async with aclosing(self._stream(sequence, author, self._body(sequence, author))) as stream:
            async for written in stream:
                self._settle(sequence, Decision(author, 1.0, None, Draw(written.token_id, written.logprob)))
                if sequence.finish_reason is not None:
                    return

    async def _ask(self, sequence: Sequence, author: int, defer_prob: float) -> None:
        """Let an assistant write the next token; where it cannot be asked, perhaps the base."""
        endpoint = self.fleet.authors[author]
        body = self._body(sequence, author, 1)
        try:
            endpoint.usage.tokens_read += self._unread(sequence, author)
            written = await endpoint.one(self.fleet.client, body)
        except ModelFailure:
            endpoint.usage.failed += 1
            if self.fleet.servers.on_failure == "fail":
                raise
            await self._stand_in(sequence, author, defer_prob)
            return
        self._settle(sequence, Decision(author, defer_prob, None, Draw(written.token_id, written.logprob)))

    async def _stand_in(self, sequence: Sequence, author: int, defer_prob: float) -> None:
        """The base writes a token that it would have left to an assistant."""
        body = {
            **self._body(sequence, BASE, 1),
            "logprob_token_ids": [*self.fleet.defer_ids, self.fleet.zero_id],
            "vllm_xargs": {THRESHOLD: 1.0},
        }
        base = self.fleet.authors[BASE]
        base.usage.tokens_read += self._unread(sequence, BASE)
        written = await base.one(self.fleet.client, body)
        drawn = Draw(written.token_id, self._of_row(written)[1])
        self._settle(sequence, Decision(author, defer_prob, None, drawn, abstained=True, stood_in=True))

    async def _stream(self, sequence: Sequence, author: int, body: dict[str, Any]) -> AsyncGenerator[Written, None]:
        endpoint = self.fleet.authors[author]
        endpoint.usage.tokens_read += self._unread(sequence, author)
        async with aclosing(endpoint.stream(self.fleet.client, body)) as pieces:
            async for piece in pieces:
                for written in piece:
                    yield written

    def _body(self, sequence: Sequence, author: int, most: int | None = None) -> dict[str, Any]:
        params = sequence.request.params
        body: dict[str, Any] = {
            "prompt": list(sequence.token_ids),
            "max_tokens": sequence.draft_limit + 1 if most is None else most,
            "temperature": params.temperature,
            "repetition_penalty": 1.0,  # whatever the model's generation config says
            "logprobs": 0,
            "stop_token_ids": [*(self.fleet.defer_ids if author == BASE else ()), *sorted(self.eos_ids)],
        }
        if params.temperature > 0:
            body |= {"top_p": params.top_p, "top_k": params.top_k}
        if params.seed is not None:  # each call draws on its own
            body["seed"] = random.Random(f"{params.seed} {len(sequence.steps)} {author}").getrandbits(31)
        return body

    def _of_row(self, written: Written) -> tuple[float, float]:
        """Defer prob, and the token's log-probability among tokens alone.

        The server's log-probabilities share one normaliser, Z' = Z + sum_k exp r_k + 1, the last for the row of zeros:
        r_k = lp_k - lp_0, and log P(x) = lp_x - log(1 - exp lp_0 - sum_k exp lp_k).
        """
        try:
            rows = [written.about[token] for token in self.fleet.defer_ids]
            zero = written.about[self.fleet.zero_id]
        except KeyError as error:
            raise ModelFailure(
                f"the base's server says nothing of token {error}, which tells how likely it defers; it must support "
                "logprob_token_ids, as vLLM does"
            ) from error
        u = torch.tensor([row - zero + bias for row, bias in zip(rows, self.fleet.biases, strict=True)])
        others = math.exp(zero) + sum(map(math.exp, rows))
        return float(defer_probs(u)), written.logprob - math.log1p(-min(others, 1 - 1e-12))

    def _settle(self, sequence: Sequence, decision: Decision) -> None:
        """Send out what has become certain."""
        sequence.decisions.append(decision)
        for step in sequence.settle():
            self.fleet.authors[step.author].usage.tokens_written += 1
            completion = sequence.completion() if sequence.finish_reason is not None else None
            self._news.put(Emitted(sequence.number, step, completion))

    def _unread(self, sequence: Sequence, author: int) -> int:
        """Tokens that are new to a server which kept what it read and wrote."""
        known = self._known.get((sequence, author), 0)
        self._known[sequence, author] = len(sequence.token_ids)
        return len(sequence.token_ids) - known


def _check_servable(request: Request, num_authors: int) -> None:
    """Refuse what would need more of a server than it offers."""
    policy: Policy = request.policy
    if not isinstance(policy, ThresholdPolicy | SingleAuthorPolicy):
        raise ConfigError(
            f"{policy} cannot be followed across servers; use a threshold or a budget, or one author alone"
        )
    if isinstance(policy, SingleAuthorPolicy) and not 0 <= policy.writer < num_authors:
        raise ConfigError(f"{policy} asks for author {policy.writer}, expected 0 to {num_authors - 1}")
    if request.params.top_logprobs:
        raise ConfigError(f"top_logprobs={request.params.top_logprobs} is not available across servers; leave it out")
