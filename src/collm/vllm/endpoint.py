"""A server that continues token ids: its requests, and strict reading of its answers."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import random
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any

import anyio

from collm.core.types import ModelUsage
from collm.engine.candidates import Likely
from collm.errors import LoadError, ModelFailure
from collm.http.client import (
    CallSettings,
    FailedAttempt,
    HttpClient,
    Refused,
    Unreachable,
    check_echo,
    logprob,
    read_strictly,
)
from collm.vllm.servers import Servers

_LOG = logging.getLogger(__name__)
_LOOKS_EVERY_S, _LEAST_LOOK_S = 0.5, 5.0
_ENDING_S = 1.0
"""Longest wait for the end of a stream after its last token. If it takes longer, the connection is not reused."""
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.25, 10.0
_ENDINGS = (None, "stop", "length")
_NO_TOKENIZER = {404, 405, 501}
"""Status codes of servers that have no endpoint for tokenization."""


@dataclass(frozen=True)
class GeneratedToken:
    """A token that a server generated, its log-probability in nats, and those of the tokens that the request named."""

    token_id: int
    logprob: float
    about: dict[int, float] = field(default_factory=dict)


class Endpoint:
    """A server as an author. It makes requests (`http.client`), and has the attributes of a runner that `Engine` reads.

    Args:
        name: the author's name, in errors and counts.
        url: base URL, with "#MODEL" if the server has several models, such as the adapters of one.
        servers: timeouts, retries and key.
        vocab_size: token ids in answers must be below this number.

    Attributes:
        usage: `calls` counts requests. `forward_passes` counts generated tokens and deferrals. `tokens_read` counts the
            tokens of each request that the server's prefix cache cannot have.
        model: the name of the served model.
        max_length: the server's limit for the tokens of prompt and completion; None if it states none.
    """

    capacity = None

    def __init__(self, name: str, url: str, servers: Servers, vocab_size: int) -> None:
        self.name = name
        self.url, _, self.model = url.partition("#")
        self.vocab_size = vocab_size
        self.usage = ModelUsage()
        self.max_length: int | None = None
        waits_s = (_FIRST_WAIT_S, min(_LONGEST_WAIT_S, servers.timeout_s))
        settings = CallSettings(servers.timeout_s, servers.retries, servers.api_key_env, waits_s)
        self.http = HttpClient(name, self.url, settings)

    async def find(self, wait_s: float) -> None:
        """Wait for the server and look up its model. Raises a LoadError as `Connections` does."""
        deadline = time.monotonic() + wait_s
        while True:
            look_s = min(self.http.settings.timeout_s, max(deadline - time.monotonic(), _LEAST_LOOK_S))
            try:
                models = self.http.models(await self.http.attempt(f"{self.url}/models", None, str, limit_s=look_s))
                break
            except FailedAttempt as failure:
                reason = failure
            except ModelFailure as error:
                raise LoadError(str(error)) from error
            left = deadline - time.monotonic()
            if left <= 0:
                raise LoadError(f"{self.http.where} is not up after {wait_s:g} s: {reason}; start it, or wait longer")
            _LOG.info("waiting for %s: %s", self.http.where, reason)
            await asyncio.sleep(min(_LOOKS_EVERY_S, left))
        self.model = self.model or (next(iter(models)) if len(models) == 1 else "")
        if self.model not in models:
            served = f"several models ({', '.join(models)})" if models else "no model"
            expected = self.model or f"only the {self.name}, or its model after the address: {self.url}#MODEL"
            raise LoadError(f"{self.url} serves {served}; expected {expected}")
        longest = models[self.model]
        self.max_length = longest if type(longest) is int else None

    async def tokenize(self, text: str) -> list[int] | None:
        """Tokenize a text on the server. Returns None if the server has no endpoint for it."""

        def read(answer: str) -> list[int]:
            tokens = json.loads(answer).get("tokens")
            if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
                raise ValueError(f"the answer has no list of token ids: {answer[:200]}")
            return tokens

        body = {"model": self.model, "prompt": text, "add_special_tokens": False}
        try:
            return await self.http.call(f"{self.url.removesuffix('/v1')}/tokenize", body, read)
        except Refused as refusal:
            if refusal.status in _NO_TOKENIZER:
                return None
            raise

    async def one(self, body: dict[str, Any]) -> GeneratedToken:
        """Request the next token. This and the methods below raise what `HttpClient.call` does."""
        async with aclosing(self.stream({**body, "max_tokens": 1})) as tokens:
            return await anext(tokens)

    async def likely(self, token_ids: list[int], count: int, most: int) -> list[Likely]:
        """Request the most probable tokens, with their probabilities, at each of the last `count` tokens of a text."""

        def read(answer: str) -> list[Likely]:
            positions = (self.http.first_choice(answer) or {})["prompt_logprobs"][-count:]
            logprobs = [{int(token): logprob(entry["logprob"]) for token, entry in at.items()} for at in positions]
            if len(logprobs) != count:
                raise ValueError(f"got log-probabilities at {len(logprobs)} positions, expected {count}")
            ranked = [sorted(at.items(), key=lambda item: -item[1]) for at in logprobs]
            return [[(token, math.exp(value)) for token, value in at] for at in ranked]

        body = {"model": self.model, "prompt": token_ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": most}

        async def attempt() -> list[Likely]:
            self.usage.calls += 1
            return await self.http.attempt(f"{self.url}/completions", body, read)

        return await self.http.with_retries(attempt)

    async def stream(self, body: dict[str, Any], *, resumable: bool = True) -> AsyncGenerator[GeneratedToken, None]:
        """Stream tokens. Use `aclosing` to stop early. If an answer breaks off, its rest is requested, unless
        generated tokens must not become part of a prompt (`resumable`).
        """
        self.http.check_breaker()
        written: list[int] = []
        failed = 0
        while True:
            try:
                async with aclosing(self._pieces(self._request(body, written))) as pieces:
                    async for piece in pieces:
                        failed = 0
                        self.http.breaker.succeeded()
                        self.usage.forward_passes += len(piece)
                        written += [one.token_id for one in piece]
                        for one in piece:
                            yield one
                return
            except FailedAttempt as failure:
                if len(written) == body["max_tokens"]:  # only the end of the answer is missing
                    return
                failed += 1
                if written and not resumable:
                    raise Unreachable(
                        f"{self.http.where} failed after {len(written)} tokens: {failure}. The policy depends on how "
                        "the text was written, so the request cannot be resumed; repeat it"
                    ) from failure
                await self.http.pause(failure, failed)
            except ModelFailure:
                self.http.breaker.succeeded()
                raise

    # One request

    def _request(self, body: dict[str, Any], written: list[int]) -> dict[str, Any]:
        """The request for the tokens that follow `written`. It has another seed, so that it draws new numbers."""
        request = {"model": self.model, "return_token_ids": True, "return_tokens_as_token_ids": True, **body}
        request |= {"prompt": [*body["prompt"], *written], "max_tokens": body["max_tokens"] - len(written)}
        if written and "seed" in body:
            request["seed"] = random.Random(f"{body['seed']} {len(written)}").getrandbits(31)
        return request

    async def _pieces(self, request: dict[str, Any]) -> AsyncGenerator[list[GeneratedToken], None]:
        """Yield the tokens of one answer, as they arrive."""
        self.usage.calls += 1
        most, count, is_last = request["max_tokens"], 0, False
        body = {**request, "stream": True} if most > 1 else request
        with self.http.translated_errors(self.http.settings.timeout_s):
            async with aclosing(self.http.events(f"{self.url}/completions", body)) as events:
                while not is_last:
                    piece: list[GeneratedToken] = []
                    with anyio.fail_after(self.http.settings.timeout_s):
                        while not piece and not is_last:
                            text = await anext(events, None)
                            if text is None:
                                raise FailedAttempt("the answer broke off", outage=True)
                            piece, is_last = read_strictly(text, lambda event: self._read(event, request))
                    count += len(piece)
                    if count > most:
                        raise ValueError(f"got more than the {most} tokens that were requested")
                    if not count:
                        raise ValueError("the answer ended without a token")
                    if is_last:  # the connection can be reused only if the rest of the stream is read
                        with suppress(Exception), anyio.move_on_after(_ENDING_S):
                            async for _ in events:
                                pass
                    yield piece

    def _read(self, text: str, request: dict[str, Any]) -> tuple[list[GeneratedToken], bool]:
        """Read the tokens of an answer, or of one event of a stream, and whether it is the last."""
        choice = self.http.first_choice(text)
        if choice is None:
            return [], False
        check_echo(choice, request["prompt"])
        ending, logprobs = choice.get("finish_reason"), choice.get("logprobs") or {"token_logprobs": []}
        if ending not in _ENDINGS:
            raise ValueError(f"the answer ended with finish_reason {ending!r}, expected 'stop' or 'length'")
        token_ids = choice["token_ids"]
        about = logprobs.get("top_logprobs") or [{}] * len(token_ids)
        written = []
        for token_id, value, top in zip(token_ids, logprobs["token_logprobs"], about, strict=True):
            by_token = {int(key.removeprefix("token_id:")): logprob(beside) for key, beside in top.items()}
            written.append(GeneratedToken(self._token_id(token_id), logprob(value), by_token))
        return written, ending is not None

    def _token_id(self, value: Any) -> int:
        if type(value) is not int or value < 0:
            raise ValueError(f"{value!r} is not a token id")
        if value >= self.vocab_size:
            raise ValueError(
                f"got token id {value}, expected ids below {self.vocab_size}; the server has another model"
            )
        return value
