"""One server that continues token ids: requests, streams, and what is done when it does not answer."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from typing import Any, TypeVar

import anyio
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # so named in all its versions

from collm.core.types import ModelUsage
from collm.decoding.candidates import Likely
from collm.errors import LoadError, ModelFailure
from collm.vllm.answers import ErrorEventError, Piece, Written, event_data, read_likely, read_piece, retry_after_s
from collm.vllm.circuit_breaker import CircuitBreaker
from collm.vllm.servers import Servers

T = TypeVar("T")
_LOG = logging.getLogger(__name__)
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.25, 10.0
_LOOKS_EVERY_S, _LEAST_LOOK_S = 0.5, 5.0
_ENDING_S = 1.0
"""Longest wait for the end of a stream whose last token came; then its connection is not used again."""
_OUTAGES = {408, 429, 502, 503, 504}
"""Statuses that say something of the server, not of the request."""
_NO_TOKENIZER = {404, 405, 501}


class Unreachable(ModelFailure):
    """A server that did not answer, after all attempts."""


class _Failed(Exception):  # noqa: N818
    """An attempt that may go better next time."""

    def __init__(self, reason: str, *, outage: bool, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.reason, self.outage, self.wait_s = reason, outage, wait_s


class Endpoint:
    """A server as an author: what `Engine` knows of a runner, and its requests.

    A call is made again after a connection error, a time-out, status 429 or 5xx and an answer that is none, with
    pauses that double from a quarter of a second, or as long as Retry-After says, at most ten seconds. After three
    calls in a row without an answer the server is left alone (`CircuitBreaker`). What it says of one request, be it
    status 500 or nonsense, counts for that request alone.

    Args:
        name: what errors and counts call it.
        url: what stands before "/completions".
        servers: how patiently it is asked.
        vocab_size: ids that it may write.
        sleep: awaited between attempts, with seconds.

    Attributes:
        usage: `calls` counts requests; `forward_passes` tokens and deferrals that it generated; `tokens_read` what was
            new to it of each request, as its prefix cache should see it.
        max_length: most tokens of prompt and completion, as it says itself; None if it does not.
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
        """Learn what it serves, waiting until `deadline` (`time.monotonic`) for it to be up.

        Raises:
            LoadError: it is not up by then, refuses, or serves several models.
        """
        while True:
            look_s = min(self.servers.timeout_s, max(deadline - time.monotonic(), _LEAST_LOOK_S))
            try:
                with self._failures(look_s), anyio.fail_after(look_s):
                    reply = await client.get(f"{self.url}/models")
                self._check(reply.status_code, reply.text)
                break
            except _Failed as failure:
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
            raise LoadError(f"GET {self.url}/models gave no list of models; is the address right?") from error
        if len(cards) != 1:
            names = ", ".join(str(card.get("id")) for card in cards)
            raise LoadError(f"{self.url} serves several models ({names}); expected the {self.name} alone")
        self.max_length = longest if type(longest) is int else None

    async def tokenize(self, client: httpx.AsyncClient, text: str) -> list[int] | None:
        """Token ids of a text, None from a server that does not say.

        Raises:
            ModelFailure: as of `one`.
        """
        url = f"{self.url.removesuffix('/v1')}/tokenize"
        body = {"model": self.model, "prompt": text, "add_special_tokens": False}

        async def attempt() -> list[int] | None:
            with self._failures(self.servers.timeout_s):
                with anyio.fail_after(self.servers.timeout_s):
                    reply = await client.post(url, json=body)
                if reply.status_code in _NO_TOKENIZER:
                    return None
                self._check(reply.status_code, reply.text, reply.headers.get("Retry-After", ""))
                tokens = reply.json().get("tokens")
                if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
                    raise ValueError(f"no tokens of a text: {reply.text[:200]}")
                return tokens

        return await self._patiently(attempt)

    async def one(self, client: httpx.AsyncClient, body: dict[str, Any]) -> Written:
        """The next token.

        Raises:
            Unreachable: in no attempt was there an answer.
            ModelFailure: it refuses, or answers with something else.
        """
        asked = self._asked({**body, "max_tokens": 1}, [])

        async def attempt() -> Written:
            self.usage.calls += 1
            with self._failures(self.servers.timeout_s):
                piece = read_piece(await self._post(client, asked), asked["prompt"], self.vocab_size)
                if len(piece.written) != 1:
                    raise ValueError(f"{len(piece.written)} tokens where one was asked for")
            self.usage.forward_passes += 1
            return piece.written[0]

        return await self._patiently(attempt)

    async def stream(
        self, client: httpx.AsyncClient, body: dict[str, Any], *, resumable: bool = True
    ) -> AsyncGenerator[list[Written], None]:
        """Tokens as they come; leave it early with `aclosing`. An answer that breaks off is asked for again from there.

        Args:
            resumable: what was written may become part of the prompt; without this an answer that breaks off fails.

        Raises:
            Unreachable, ModelFailure: as `one`.
        """
        self._admit()
        written: list[int] = []
        failed = 0
        while True:
            try:
                async with aclosing(self._pieces(client, self._asked(body, written))) as pieces:
                    async for piece in pieces:
                        if piece.written:
                            failed = 0
                            self.breaker.succeeded()
                            self.usage.forward_passes += len(piece.written)
                            written += [one.token_id for one in piece.written]
                            yield piece.written
                return
            except _Failed as failure:
                if len(written) == body["max_tokens"]:  # only the end of the answer is missing
                    return
                failed += 1
                if written and not resumable:
                    raise Unreachable(
                        f"{self.name} at {self.url} failed after {len(written)} tokens: {failure.reason}; what this "
                        "rule says depends on how the text came about, so ask again from the start"
                    ) from failure
                await self._pause(failure, failed)
            except ModelFailure:
                self.breaker.succeeded()
                raise

    async def likely(self, client: httpx.AsyncClient, token_ids: list[int], count: int, most: int) -> list[Likely]:
        """The most probable tokens, with their probabilities, at each of the last `count` tokens.

        Raises:
            Unreachable, ModelFailure: as `one`.
        """
        body = {"model": self.model, "prompt": token_ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": most}

        async def attempt() -> list[Likely]:
            self.usage.calls += 1
            with self._failures(self.servers.timeout_s):
                return read_likely(await self._post(client, body), count)

        return await self._patiently(attempt)

    # Attempts

    async def _patiently(self, attempt: Callable[[], Awaitable[T]]) -> T:
        self._admit()
        failed = 0
        while True:
            try:
                result = await attempt()
            except _Failed as failure:
                failed += 1
                await self._pause(failure, failed)
            except ModelFailure:
                self.breaker.succeeded()
                raise
            else:
                self.breaker.succeeded()
                return result

    def _admit(self) -> None:
        shut_s = self.breaker.shut_s()
        if shut_s:
            raise Unreachable(
                f"{self.name} at {self.url} did not answer {self.breaker.failures} calls in a row and is left alone "
                f"for {shut_s:.0f} s; check that the server runs"
            )

    async def _pause(self, failure: _Failed, failed: int) -> None:
        """Wait before the next attempt, or give up."""
        if failed > self.servers.retries or (self.breaker.tripped and failure.outage):
            where, count = f"{self.name} at {self.url}", f"{failed} time{'s' * (failed > 1)}"
            if failure.outage:
                self.breaker.failed()
                raise Unreachable(f"{where} failed {count}, at last: {failure.reason}; check that the server runs")
            self.breaker.succeeded()
            raise ModelFailure(
                f"{where} gave no usable answer {count}, expected token ids with log-probabilities, at last: "
                f"{failure.reason}; check what it serves"
            )
        pause_s = min(_FIRST_WAIT_S * 2.0 ** (failed - 1), _LONGEST_WAIT_S) * self._random.uniform(0.5, 1.0)
        wait_s = min(max(pause_s, failure.wait_s), _LONGEST_WAIT_S, self.servers.timeout_s)
        _LOG.warning("%s at %s: %s; asking again in %.1f s", self.name, self.url, failure.reason, wait_s)
        await self.sleep(wait_s)

    def _asked(self, body: dict[str, Any], written: list[int]) -> dict[str, Any]:
        """The request for what follows what was written already; it draws on its own then."""
        asked = {"model": self.model, "return_token_ids": True, "return_tokens_as_token_ids": True, **body}
        asked |= {"prompt": [*body["prompt"], *written], "max_tokens": body["max_tokens"] - len(written)}
        if written and "seed" in body:
            asked["seed"] = random.Random(f"{body['seed']} {len(written)}").getrandbits(31)
        return asked

    # One attempt

    async def _post(self, client: httpx.AsyncClient, body: dict[str, Any]) -> str:
        with anyio.fail_after(self.servers.timeout_s):
            reply = await client.post(f"{self.url}/completions", json=body)
        self._check(reply.status_code, reply.text, reply.headers.get("Retry-After", ""))
        return str(reply.text)

    async def _pieces(self, client: httpx.AsyncClient, asked: dict[str, Any]) -> AsyncGenerator[Piece, None]:
        """Of one answer, up to its last."""
        self.usage.calls += 1
        left, limit_s = asked["max_tokens"], self.servers.timeout_s
        with self._failures(limit_s):
            async with aclosing(self._events(client, {**asked, "stream": True})) as events:
                while True:
                    piece = await self._next(events, asked, limit_s)
                    left -= len(piece.written)
                    if left < 0:
                        raise ValueError(f"more than the {asked['max_tokens']} tokens that were asked for")
                    if piece.last and left == asked["max_tokens"]:
                        raise ValueError("it ended without a token")
                    if piece.last:
                        await _end(events)
                    yield piece
                    if piece.last:
                        return

    async def _next(self, events: AsyncGenerator[str, None], asked: dict[str, Any], limit_s: float) -> Piece:
        """The next piece with tokens, or the last."""
        with anyio.fail_after(limit_s):
            while (text := await anext(events, None)) is not None:
                piece = read_piece(text, asked["prompt"], self.vocab_size)
                if piece.written or piece.last:
                    return piece
        raise _Failed("the answer broke off", outage=True)

    async def _events(self, client: httpx.AsyncClient, body: dict[str, Any]) -> AsyncGenerator[str, None]:
        async with client.stream("POST", f"{self.url}/completions", json=body) as reply:
            if reply.status_code != 200 or "event-stream" not in reply.headers.get("Content-Type", ""):
                await reply.aread()
                self._check(reply.status_code, reply.text, reply.headers.get("Retry-After", ""))
                yield reply.text  # a whole answer, or no answer at all
                return
            async with aclosing(event_data(reply.aiter_lines())) as data:
                async for event in data:
                    yield event

    def _check(self, status: int, text: str, retry_after: str = "") -> None:
        """Raise unless the status is 200."""
        if status == 200:
            return
        reason = f"status {status} {' '.join(self._redacted(text).split())[:300]}".strip()
        if status in _OUTAGES or status >= 500:
            raise _Failed(reason, outage=status in _OUTAGES, wait_s=retry_after_s(retry_after))
        advice = "check the address and what it serves"
        if status in (401, 403):
            named = self.servers.api_key_env
            advice = f"check the key in {named}" if named else "name the environment variable of its key (api_key_env)"
        raise ModelFailure(f"{self.name} at {self.url} refuses a request: {reason}; {advice}")

    def _redacted(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text

    @contextmanager
    def _failures(self, limit_s: float) -> Iterator[None]:
        """What may go wrong in an attempt, in one kind of exception."""
        try:
            yield
        except TimeoutError as error:
            raise _Failed(f"no answer within {limit_s:g} s", outage=True) from error
        except httpx.TransportError as error:
            raise _Failed(f"{type(error).__name__} {error}".strip(), outage=True) from error
        except ErrorEventError as error:
            self._check(error.status, str(error))
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise _Failed(self._redacted(str(error)), outage=False) from error


async def _end(events: AsyncGenerator[str, None]) -> None:
    """Read what follows the last token, so that the connection can serve again."""
    with suppress(httpx.HTTPError), anyio.move_on_after(_ENDING_S):
        async for _ in events:
            pass
