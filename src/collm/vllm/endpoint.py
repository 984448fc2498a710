"""A server that continues token ids: its requests, streams and retries."""

from __future__ import annotations

import asyncio
import logging
import random
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from typing import Any, TypeVar
from urllib.parse import unquote

import anyio
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # every version re-exports it

from collm.core.types import ModelUsage
from collm.engine.candidates import Likely
from collm.errors import LoadError, ModelFailure
from collm.vllm.answers import (
    ErrorEventError,
    GeneratedToken,
    Piece,
    event_data,
    read_likely,
    read_piece,
    retry_after_s,
)
from collm.vllm.circuit_breaker import CircuitBreaker
from collm.vllm.servers import Servers

T = TypeVar("T")
_LOG = logging.getLogger(__name__)
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.25, 10.0
_LOOKS_EVERY_S, _LEAST_LOOK_S = 0.5, 5.0
_ENDING_S = 1.0
"""Longest wait for the end of a stream after its last token. If it takes longer, the connection is not reused."""
_OUTAGES = {408, 429, 502, 503, 504}
"""Status codes that concern the server and not the request."""
_NO_TOKENIZER = {404, 405, 501}
"""Status codes of servers that have no endpoint for tokenization."""


class Unreachable(ModelFailure):
    """A server that did not answer in any attempt."""


class _FailedAttempt(Exception):  # noqa: N818
    """A failed attempt that may succeed if it is repeated."""

    def __init__(self, reason: str, *, outage: bool, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.reason, self.outage, self.wait_s = reason, outage, wait_s


class Endpoint:
    """A server as an author. It makes requests, and has the attributes of a runner that `Engine` reads.

    A call is repeated after a connection error, a timeout, status 429 or 5xx, or an unusable answer. The pauses start
    at a quarter of a second and double, or follow Retry-After. They last at most ten seconds. After three calls in a
    row without an answer, no calls are made for a while (`CircuitBreaker`). Failures that concern one request, such as
    status 500 or an unusable answer, do not count towards these three.

    Args:
        name: the author's name, in errors and counts.
        url: the base URL, to which "/completions" is appended.
        servers: timeouts, retries and key.
        vocab_size: token ids in answers must be below this number.
        sleep: awaited between attempts, with the seconds to wait.

    Attributes:
        usage: `calls` counts requests. `forward_passes` counts generated tokens and deferrals. `tokens_read` counts the
            tokens of each request that the server's prefix cache cannot have.
        model: the name of the served model.
        max_length: the server's limit for the tokens of prompt and completion; None if it states none.
        breaker: counts calls in a row without an answer.
    """

    may_abstain = False
    capacity = None
    most_slots = None
    open_slots = 0

    def __init__(
        self,
        name: str,
        url: str,
        servers: Servers,
        vocab_size: int,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.name = name
        self.url = url
        self.servers = servers
        self.vocab_size = vocab_size
        self.usage = ModelUsage()
        self.model = ""
        self.max_length: int | None = None
        self.breaker = CircuitBreaker()
        self.sleep = sleep
        self._random = random.Random()
        self._key = servers.headers.get("Authorization", "").removeprefix("Bearer ")

    async def find(self, client: httpx.AsyncClient, deadline: float) -> None:
        """Wait for the server and look up its model.

        Args:
            deadline: when to give up, on the clock of `time.monotonic`.

        Raises:
            LoadError: the server is not up by then, refuses the request, or serves several models.
        """
        while True:
            look_s = min(self.servers.timeout_s, max(deadline - time.monotonic(), _LEAST_LOOK_S))
            try:
                with self._translated_errors(look_s), anyio.fail_after(look_s):
                    reply = await client.get(f"{self.url}/models")
                self._check(reply.status_code, reply.text)
                break
            except _FailedAttempt as failure:
                reason = failure.reason
            except ModelFailure as error:
                raise LoadError(str(error)) from error
            left = deadline - time.monotonic()
            if left <= 0:
                raise LoadError(
                    f"{self.name} at {self.url} is not up after {self.servers.wait_s:g} s: {reason}; "
                    "start it, or wait longer"
                )
            _LOG.info("waiting for %s at %s: %s", self.name, self.url, reason)
            await asyncio.sleep(min(_LOOKS_EVERY_S, left))
        try:
            cards = reply.json()["data"]
            self.model, longest = str(cards[0]["id"]), cards[0].get("max_model_len")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise LoadError(f"GET {self.url}/models returned no list of models; check the address") from error
        if len(cards) != 1:
            names = ", ".join(str(card.get("id")) for card in cards)
            raise LoadError(f"{self.url} serves several models ({names}); expected only the {self.name}")
        self.max_length = longest if type(longest) is int else None

    async def tokenize(self, client: httpx.AsyncClient, text: str) -> list[int] | None:
        """Tokenize a text on the server. Returns None if the server has no endpoint for it.

        Raises:
            Unreachable, ModelFailure: as in `one`.
        """
        url = f"{self.url.removesuffix('/v1')}/tokenize"
        body = {"model": self.model, "prompt": text, "add_special_tokens": False}

        async def attempt() -> list[int] | None:
            with self._translated_errors(self.servers.timeout_s):
                with anyio.fail_after(self.servers.timeout_s):
                    reply = await client.post(url, json=body)
                if reply.status_code in _NO_TOKENIZER:
                    return None
                self._check(reply.status_code, reply.text, reply.headers.get("Retry-After", ""))
                tokens = reply.json().get("tokens")
                if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
                    raise ValueError(f"the answer has no list of token ids: {reply.text[:200]}")
                return tokens

        return await self._with_retries(attempt)

    async def one(self, client: httpx.AsyncClient, body: dict[str, Any]) -> GeneratedToken:
        """Request the next token.

        Raises:
            Unreachable: no attempt was answered.
            ModelFailure: the server refuses the request or gives no usable answer.
        """
        request = self._request_body({**body, "max_tokens": 1}, [])

        async def attempt() -> GeneratedToken:
            self.usage.calls += 1
            with self._translated_errors(self.servers.timeout_s):
                piece = read_piece(await self._post(client, request), request["prompt"], self.vocab_size)
                if len(piece.written) != 1:
                    raise ValueError(f"got {len(piece.written)} tokens, expected 1")
            self.usage.forward_passes += 1
            return piece.written[0]

        return await self._with_retries(attempt)

    async def stream(
        self, client: httpx.AsyncClient, body: dict[str, Any], *, resumable: bool = True
    ) -> AsyncGenerator[list[GeneratedToken], None]:
        """Stream tokens as they arrive. If an answer breaks off, its rest is requested. Use `aclosing` to stop early.

        Args:
            resumable: whether generated tokens may become part of the prompt. If not, an answer that breaks off is an
                error.

        Raises:
            Unreachable, ModelFailure: as in `one`.
        """
        self._check_breaker()
        written: list[int] = []
        failed = 0
        while True:
            try:
                async with aclosing(self._pieces(client, self._request_body(body, written))) as pieces:
                    async for piece in pieces:
                        if piece.written:
                            failed = 0
                            self.breaker.succeeded()
                            self.usage.forward_passes += len(piece.written)
                            written += [one.token_id for one in piece.written]
                            yield piece.written
                return
            except _FailedAttempt as failure:
                if len(written) == body["max_tokens"]:  # only the end of the answer is missing
                    return
                failed += 1
                if written and not resumable:
                    raise Unreachable(
                        f"{self.name} at {self.url} failed after {len(written)} tokens: {failure.reason}. The "
                        "policy depends on how the text was written, so the request cannot be resumed; repeat it"
                    ) from failure
                await self._pause(failure, failed)
            except ModelFailure:
                self.breaker.succeeded()
                raise

    async def likely(self, client: httpx.AsyncClient, token_ids: list[int], count: int, most: int) -> list[Likely]:
        """Request the most probable tokens, with their probabilities, at each of the last `count` tokens of a text.

        Raises:
            Unreachable, ModelFailure: as in `one`.
        """
        body = {"model": self.model, "prompt": token_ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": most}

        async def attempt() -> list[Likely]:
            self.usage.calls += 1
            with self._translated_errors(self.servers.timeout_s):
                return read_likely(await self._post(client, body), count)

        return await self._with_retries(attempt)

    # Attempts

    async def _with_retries(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Repeat an attempt until it succeeds, fails for good or there are no retries left."""
        self._check_breaker()
        failed = 0
        while True:
            try:
                result = await attempt()
            except _FailedAttempt as failure:
                failed += 1
                await self._pause(failure, failed)
            except ModelFailure:
                self.breaker.succeeded()
                raise
            else:
                self.breaker.succeeded()
                return result

    def _check_breaker(self) -> None:
        """Raise Unreachable while the circuit breaker blocks calls."""
        shut_s = self.breaker.shut_s()
        if shut_s:
            raise Unreachable(
                f"{self.name} at {self.url} did not answer {self.breaker.failures} calls in a row and is not called "
                f"for {shut_s:.0f} s; check that the server runs"
            )

    async def _pause(self, failure: _FailedAttempt, failed: int) -> None:
        """Wait before the next attempt, or raise if there is none."""
        if failed > self.servers.retries or (self.breaker.tripped and failure.outage):
            where, count = f"{self.name} at {self.url}", f"{failed} time{'s' * (failed > 1)}"
            if failure.outage:
                self.breaker.failed()
                raise Unreachable(
                    f"{where} failed {count}, the last time: {failure.reason}; check that the server runs"
                )
            self.breaker.succeeded()
            raise ModelFailure(
                f"{where} gave no usable answer {count}, expected token ids with log-probabilities, the last time: "
                f"{failure.reason}; check which model it serves"
            )
        pause_s = min(_FIRST_WAIT_S * 2.0 ** (failed - 1), _LONGEST_WAIT_S) * self._random.uniform(0.5, 1.0)
        wait_s = min(max(pause_s, failure.wait_s), _LONGEST_WAIT_S, self.servers.timeout_s)
        _LOG.warning("%s at %s: %s; asking again in %.1f s", self.name, self.url, failure.reason, wait_s)
        await self.sleep(wait_s)

    def _request_body(self, body: dict[str, Any], written: list[int]) -> dict[str, Any]:
        """Build the request for the tokens that follow `written`. A seed is changed, so that the request draws new
        numbers.
        """
        request = {"model": self.model, "return_token_ids": True, "return_tokens_as_token_ids": True, **body}
        request |= {"prompt": [*body["prompt"], *written], "max_tokens": body["max_tokens"] - len(written)}
        if written and "seed" in body:
            request["seed"] = random.Random(f"{body['seed']} {len(written)}").getrandbits(31)
        return request

    # One attempt

    async def _post(self, client: httpx.AsyncClient, body: dict[str, Any]) -> str:
        with anyio.fail_after(self.servers.timeout_s):
            reply = await client.post(f"{self.url}/completions", json=body)
        self._check(reply.status_code, reply.text, reply.headers.get("Retry-After", ""))
        return str(reply.text)

    async def _pieces(self, client: httpx.AsyncClient, request: dict[str, Any]) -> AsyncGenerator[Piece, None]:
        """Yield the pieces of one answer, up to its last."""
        self.usage.calls += 1
        left, limit_s = request["max_tokens"], self.servers.timeout_s
        with self._translated_errors(limit_s):
            async with aclosing(self._events(client, {**request, "stream": True})) as events:
                while True:
                    piece = await self._next(events, request, limit_s)
                    left -= len(piece.written)
                    if left < 0:
                        raise ValueError(f"got more than the {request['max_tokens']} tokens that were requested")
                    if piece.last and left == request["max_tokens"]:
                        raise ValueError("the answer ended without a token")
                    if piece.last:
                        await _drain(events)
                    yield piece
                    if piece.last:
                        return

    async def _next(self, events: AsyncGenerator[str, None], request: dict[str, Any], limit_s: float) -> Piece:
        """Wait for the next piece that has tokens or is the last."""
        with anyio.fail_after(limit_s):
            while (text := await anext(events, None)) is not None:
                piece = read_piece(text, request["prompt"], self.vocab_size)
                if piece.written or piece.last:
                    return piece
        raise _FailedAttempt("the answer broke off", outage=True)

    async def _events(self, client: httpx.AsyncClient, body: dict[str, Any]) -> AsyncGenerator[str, None]:
        """Yield the events of a stream, or the whole text of any other answer."""
        async with client.stream("POST", f"{self.url}/completions", json=body) as reply:
            if reply.status_code != 200 or "event-stream" not in reply.headers.get("Content-Type", ""):
                await reply.aread()
                self._check(reply.status_code, reply.text, reply.headers.get("Retry-After", ""))
                yield reply.text  # not a stream: a whole answer, or something else
                return
            async with aclosing(event_data(reply.aiter_lines())) as data:
                async for event in data:
                    yield event

    def _check(self, status: int, text: str, retry_after: str = "") -> None:
        """Raise an exception unless the status is 200."""
        if status == 200:
            return
        reason = f"status {status} {' '.join(self._redacted(text).split())[:300]}".strip()
        if status in _OUTAGES or status >= 500:
            raise _FailedAttempt(reason, outage=status in _OUTAGES, wait_s=retry_after_s(retry_after))
        advice = "check the address and the model that it serves"
        if status in (401, 403):
            variable = self.servers.api_key_env
            advice = f"check the key in {variable}" if variable else "name the key's environment variable (api_key_env)"
        raise ModelFailure(f"{self.name} at {self.url} refuses a request: {reason}; {advice}")

    def _redacted(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text

    @contextmanager
    def _translated_errors(self, limit_s: float) -> Iterator[None]:
        """Translate the exceptions of an attempt into `_FailedAttempt` and `ModelFailure`."""
        try:
            yield
        except TimeoutError as error:
            raise _FailedAttempt(f"no answer within {limit_s:g} s", outage=True) from error
        except httpx.TransportError as error:
            raise _FailedAttempt(f"{type(error).__name__} {error}".strip(), outage=True) from error
        except ErrorEventError as error:
            self._check(error.status, str(error))
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise _FailedAttempt(self._redacted(str(error)), outage=False) from error


def sockets(urls: Sequence[str], **options: Any) -> dict[str, httpx.AsyncHTTPTransport]:
    """Transports, for `mounts`, to those servers that listen on Unix sockets, with `options` of each transport."""
    hosts = filter(None, (re.match("http://(%2[Ff][^/]+)", url) for url in urls))
    return {host[0]: httpx.AsyncHTTPTransport(uds=unquote(host[1]), **options) for host in hosts}


async def _drain(events: AsyncGenerator[str, None]) -> None:
    """Read the rest of a stream, so that its connection can be reused."""
    with suppress(httpx.HTTPError), anyio.move_on_after(_ENDING_S):
        async for _ in events:
            pass
