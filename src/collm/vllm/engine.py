"""Decoding across servers: the base writes until it defers, then an assistant writes one token."""

from __future__ import annotations

import math
import queue
import random
from collections import deque
from collections.abc import AsyncGenerator
from collections.abc import Sequence as ListOf
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast

import torch
from transformers import PreTrainedTokenizerBase

from collm.core.objective import defer_probs
from collm.core.params import SamplingParams
from collm.core.policies import Policy, SingleAuthorPolicy, ThresholdPolicy, ThresholdRule
from collm.core.types import BASE
from collm.engine.engine import RequestOutput
from collm.engine.request import Request, check_params, check_prompt
from collm.engine.sequence import Decision, Draw, Sequence
from collm.errors import CollmError, ConfigError, ModelFailure
from collm.models.assistant import Assistant
from collm.vllm import ROW_SCALE, THRESHOLD
from collm.vllm.answers import GeneratedToken
from collm.vllm.circuit_breaker import CircuitBreaker
from collm.vllm.connections import AuthorConnections, Connections
from collm.vllm.endpoint import Unreachable

C = TypeVar("C", bound=Connections)
_STEP_WAIT_S = 0.02
"""Longest wait of a step for outputs. Requests can be added and cancelled between steps."""
_CLOSED = "the connections to the servers were closed during decoding; load the collaboration again"
_LEAST_TEMPERATURE = 0.01
"""vLLM raises lower temperatures to this one."""
_LOCAL_ONLY = (
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "min_tokens",
    "structured_outputs",
    "logprobs",
    "prompt_logprobs",
)
"""Parameters that change or need logits. A text takes many calls, and a server counts only the tokens of one call."""


@dataclass(eq=False)
class Run:
    """A sequence that is decoded on servers.

    Attributes:
        sequence: the sequence.
        known: author -> number of the sequence's tokens that its server has read or written.
        refused: author -> counts calls for this sequence that failed although the server answers.
    """

    sequence: Sequence
    known: dict[int, int] = field(default_factory=dict)
    refused: dict[int, CircuitBreaker] = field(default_factory=dict)

    def read(self, author: int) -> int:
        """Mark all tokens as read by the author and return how many were new to it."""
        new = len(self.sequence.token_ids) - self.known.get(author, 0)
        self.known[author] = len(self.sequence.token_ids)
        return new


class ServerEngine(Generic[C]):
    """Decodes requests on servers, which batch concurrent requests. It has the interface of `engine.engine.Engine`.

    Args:
        connections: connections to the servers.
        tokenizer: the tokenizer of all models.
        eos_ids: tokens that end a sequence.
        max_batch: largest number of sequences decoded at once; further requests wait.

    Raises:
        ConfigError: `max_batch` is out of range.
    """

    def __init__(
        self, connections: C, tokenizer: PreTrainedTokenizerBase, *, eos_ids: frozenset[int], max_batch: int = 16
    ) -> None:
        if max_batch < 1:
            raise ConfigError(f"max_batch is {max_batch}, expected at least 1")
        self.connections = connections
        self.tokenizer = tokenizer
        self.eos_ids = eos_ids
        self.max_batch = max_batch
        self._waiting: deque[Sequence] = deque()
        self._active: dict[int, Future[None]] = {}
        self._count = 0
        self._outputs: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()

    @property
    def has_work(self) -> bool:
        return bool(self._active or self._waiting)

    def add(self, request: Request) -> int:
        """Queue a request and return its number.

        Raises:
            RequestError: the prompt is empty, holds unknown token ids or leaves no room in a model's context.
            ConfigError: the servers do not support the policy or a parameter.
        """
        check_prompt(self.connections.authors, self.connections.vocab_size, request.prompt_ids)
        check_params(request.params, self.connections.vocab_size)
        self.check_request(request)
        number, self._count = self._count, self._count + 1
        authors = cast("list[Assistant]", self.connections.authors)  # a sequence asks for their limits only
        self._waiting.append(Sequence(number, request, authors, self.tokenizer, self.eos_ids))
        return number

    def cancel(self, number: int) -> None:
        """Drop a running or waiting request and cancel its calls."""
        self._waiting = deque(sequence for sequence in self._waiting if sequence.number != number)
        running = self._active.pop(number, None)
        if running is not None:
            running.cancel()

    def close(self) -> None:
        """Drop all requests."""
        self._waiting.clear()
        for number in list(self._active):
            self.cancel(number)

    def step(self) -> list[RequestOutput]:
        """Start waiting requests and return new outputs in order. Waits briefly if there are none."""
        while self._waiting and len(self._active) < self.max_batch:
            sequence = self._waiting.popleft()
            self._active[sequence.number] = self.connections.start(self._decode(Run(sequence)))
        outputs = []
        try:
            outputs.append(self._outputs.get(timeout=_STEP_WAIT_S))
            while True:
                outputs.append(self._outputs.get_nowait())
        except queue.Empty:
            pass
        outputs = [output for output in outputs if output.number in self._active]  # without dropped requests
        for output in outputs:
            if output.completion is not None or output.failure is not None:
                self._active.pop(output.number, None)
        cancelled = [number for number, running in self._active.items() if running.cancelled()]
        for number in cancelled:
            del self._active[number]
        return outputs + [RequestOutput(number, failure=ModelFailure(_CLOSED)) for number in cancelled]

    def check_request(self, request: Request) -> None:
        """Check that the servers support a request.

        Raises:
            ConfigError: they do not support the policy or a parameter.
        """
        raise NotImplementedError

    # Methods that run in the thread of the connections

    async def advance(self, run: Run) -> None:
        """Request the next tokens of the sequence."""
        raise NotImplementedError

    async def _decode(self, run: Run) -> None:
        sequence = run.sequence
        try:
            while sequence.finish_reason is None:
                await self.advance(run)
        except CollmError as error:
            self._outputs.put(RequestOutput(sequence.number, failure=error))
        except Exception as error:
            failure = ModelFailure(f"decoding across servers failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
            self._outputs.put(RequestOutput(sequence.number, failure=failure))

    async def stream(
        self, run: Run, author: int, body: dict[str, Any], *, resumable: bool = True
    ) -> AsyncGenerator[GeneratedToken, None]:
        """Stream the tokens of one call."""
        endpoint = self.connections.authors[author]
        endpoint.usage.tokens_read += run.read(author)
        stream = endpoint.stream(self.connections.client, body, resumable=resumable)
        async with aclosing(stream) as pieces:
            async for piece in pieces:
                for written in piece:
                    yield written

    def body(self, run: Run) -> dict[str, Any]:
        """Build the part of a request that all authors share. It leaves nothing to the generation config of a model."""
        sequence, params = run.sequence, run.sequence.request.params
        body: dict[str, Any] = {
            "prompt": list(sequence.token_ids),
            "max_tokens": sequence.draft_limit + 1,
            "temperature": params.temperature,
            "repetition_penalty": params.repetition_penalty,
            "presence_penalty": params.presence_penalty,
            "frequency_penalty": params.frequency_penalty,
            "logprobs": 0,
            "ignore_eos": True,  # the text ends at `stop_token_ids`, whatever the model's EOS is
            "stop_token_ids": sorted(sequence.end_ids),
        }
        if params.temperature > 0:
            body |= {"top_p": params.top_p, "top_k": params.top_k, "min_p": 0.0}
        return body

    def emit(self, run: Run, decision: Decision) -> None:
        """Add a decision and output the tokens that became final."""
        sequence = run.sequence
        sequence.decisions.append(decision)
        for step in sequence.advance():
            self.connections.authors[step.author].usage.tokens_written += 1
            run.known[step.author] = len(sequence.token_ids)
            completion = sequence.completion() if sequence.finish_reason is not None else None
            self._outputs.put(RequestOutput(sequence.number, step, completion))


class VllmEngine(ServerEngine[AuthorConnections]):
    """Decodes on one server for each author.

    The base is asked to continue until it defers. Then the assistant is asked for one token. A request takes at most
    two calls for each deferral, and one more. If the policy's threshold changes, each change takes another call.
    """

    def check_request(self, request: Request) -> None:
        policy: Policy = request.policy
        if not isinstance(policy, ThresholdRule | SingleAuthorPolicy):
            raise ConfigError(
                f"{policy} cannot be followed across servers, because they report only what a threshold needs; use "
                "threshold, schedule, budget, random or single"
            )
        num_authors = len(self.connections.authors)
        if isinstance(policy, SingleAuthorPolicy) and not 0 <= policy.writer < num_authors:
            raise ConfigError(f"{policy} asks for author {policy.writer}, expected 0 to {num_authors - 1}")
        check_local_params(request.params)
        check_temperature(request.params)

    async def advance(self, run: Run) -> None:
        policy = run.sequence.request.policy
        if isinstance(policy, SingleAuthorPolicy) and policy.writer != BASE:
            await self._assistant_writes(run, policy.writer)
            return
        deferral = await self._base_writes(run)
        if deferral is not None:
            await self._ask_assistant(run, *deferral)

    async def _base_writes(self, run: Run) -> tuple[int, float] | None:
        """Let the base write until it defers, its threshold changes or the text ends.

        Returns:
            The assistant and the defer prob of a deferral; None if the base did not defer.
        """
        threshold, most = _next_threshold(run.sequence)
        async with aclosing(self.stream(run, BASE, self._base_body(run, threshold, most))) as stream:
            async for written in stream:
                defer_prob, logprob = self._defer_prob_and_logprob(written)
                if written.token_id in self.connections.defer_ids:
                    return self.connections.defer_ids.index(written.token_id) + 1, defer_prob
                self.emit(run, Decision(BASE, defer_prob, None, Draw(written.token_id, logprob)))
                if run.sequence.finish_reason is not None:
                    return None
        return None

    async def _assistant_writes(self, run: Run, author: int) -> None:
        """Let an assistant write the whole text. The base is not asked, so the defer prob is reported as 1."""
        try:
            self._check_assistant(run, author)
            async with aclosing(self.stream(run, author, self._body(run, author))) as stream:
                async for written in stream:
                    self.emit(run, Decision(author, 1.0, None, Draw(written.token_id, written.logprob)))
                    if run.sequence.finish_reason is not None:
                        return
        except ModelFailure as failure:
            await self._stand_in(run, author, 1.0, failure)

    async def _ask_assistant(self, run: Run, author: int, defer_prob: float) -> None:
        """Let an assistant write the next token. If it cannot be asked, the base may write it."""
        endpoint = self.connections.authors[author]
        try:
            self._check_assistant(run, author)
            endpoint.usage.tokens_read += run.read(author)
            written = await endpoint.one(self.connections.client, self._body(run, author))
        except ModelFailure as failure:
            await self._stand_in(run, author, defer_prob, failure)
        else:
            self.emit(run, Decision(author, defer_prob, None, Draw(written.token_id, written.logprob)))

    def _check_assistant(self, run: Run, author: int) -> None:
        """Raise Unreachable if the assistant failed too often for this sequence."""
        shut_s = run.refused.setdefault(author, CircuitBreaker()).shut_s()
        if shut_s:
            raise Unreachable(
                f"{self.connections.authors[author].name} failed too often for this text, so it is not asked for "
                f"{shut_s:.0f} s"
            )

    async def _stand_in(self, run: Run, author: int, defer_prob: float, failure: ModelFailure) -> None:
        """Let the base write the token of an assistant that failed, or raise the failure if `on_failure` is "fail"."""
        if not isinstance(failure, Unreachable):
            run.refused[author].failed()
        self.connections.authors[author].usage.failed += 1
        if self.connections.servers.on_failure == "fail":
            raise failure
        base = self.connections.authors[BASE]
        base.usage.tokens_read += run.read(BASE)
        written = await base.one(self.connections.client, self._base_body(run, 1.0, 1))
        drawn = Draw(written.token_id, self._defer_prob_and_logprob(written)[1])
        self.emit(run, Decision(author, defer_prob, None, drawn, abstained=True, stood_in=True))

    def _base_body(self, run: Run, threshold: float, most: int) -> dict[str, Any]:
        rows = {"logprob_token_ids": [*self.connections.defer_ids, self.connections.zero_id]}
        return {**self._body(run, BASE), **rows, "max_tokens": most, "vllm_xargs": {THRESHOLD: threshold}}

    def _body(self, run: Run, author: int) -> dict[str, Any]:
        sequence, body = run.sequence, self.body(run)
        if author == BASE:
            body["stop_token_ids"] = [*self.connections.defer_ids, *body["stop_token_ids"]]
        seed = sequence.request.params.seed
        if seed is not None:  # each call draws other numbers
            body["seed"] = random.Random(f"{seed} {len(sequence.steps)} {author}").getrandbits(31)
        return body

    def _defer_prob_and_logprob(self, written: GeneratedToken) -> tuple[float, float]:
        """Compute the defer prob, and the token's log-probability among tokens only.

        The server's log-probabilities share one normaliser, Z' = Z + sum_k exp r_k + n. Z sums over the tokens, r_k is
        the logit of row k, and n counts the rows of zeros. With the log-probabilities lp_0 of the row of zeros and lp_k
        of row k,

            r_k = lp_k - lp_0,  u_k = r_k / scale + b_k,  log P(x) = lp_x - log(1 - n exp lp_0 - sum_k exp lp_k).
        """
        try:
            rows = [written.about[token] for token in self.connections.defer_ids]
            zero = written.about[self.connections.zero_id]
        except KeyError as error:
            raise ModelFailure(
                f"the base's server did not report the log-probability of token {error}, which the defer prob needs; "
                "it must support logprob_token_ids, as vLLM does"
            ) from error
        u = torch.tensor(
            [(row - zero) / ROW_SCALE + bias for row, bias in zip(rows, self.connections.biases, strict=True)]
        )
        zeros = 1 + self.connections.defer_ids[0] - self.connections.vocab_size
        others = zeros * math.exp(zero) + sum(map(math.exp, rows))
        return float(defer_probs(u)), written.logprob - math.log1p(-min(others, 1 - 1e-12))


def _next_threshold(sequence: Sequence) -> tuple[float, int]:
    """The threshold of the next position, and for how many positions it stays the same if none is deferred."""
    policy, start, most = sequence.request.policy, len(sequence.steps), sequence.draft_limit + 1
    if isinstance(policy, SingleAuthorPolicy):
        return 1.0, most
    if isinstance(policy, ThresholdPolicy):
        return policy.threshold, most
    rule = cast(ThresholdRule, policy)

    def at(position: int) -> float:
        return rule.threshold_at(position, sequence.deferred, sequence.uniform(position, 0))

    threshold = at(start)
    return threshold, next((n for n in range(1, most) if at(start + n) != threshold), most)


def check_local_params(params: SamplingParams, local_only: ListOf[str] = _LOCAL_ONLY) -> None:
    """Raise a ConfigError if a parameter is only available with models in memory."""
    name = next((name for name in local_only if getattr(params, name) != getattr(SamplingParams(), name)), None)
    if name is not None:
        raise ConfigError(f"{name} is not available across servers; leave it out, or use engine 'local'")


def check_temperature(params: SamplingParams) -> None:
    """Raise a ConfigError if vLLM would raise the temperature."""
    if 0 < params.temperature < _LEAST_TEMPERATURE:
        raise ConfigError(
            f"temperature is {params.temperature}, which servers raise to {_LEAST_TEMPERATURE}; use 0 or at least "
            f"{_LEAST_TEMPERATURE}"
        )
