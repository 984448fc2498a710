"""One server that continues token ids: requests, streams, and what is done when it does not answer."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # so named in all its versions

from collm.core.types import ModelUsage
from collm.decoding.candidates import Likely
from collm.errors import LoadError, MismatchError, ModelFailure
from collm.vllm.servers import Servers

_LOG = logging.getLogger(__name__)
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.25, 10.0
_TRIPS_AFTER, _COOLS_S = 3, 10.0
_TRANSIENT = (httpx.TransportError, asyncio.TimeoutError)


@dataclass(frozen=True)
class Written:
    """A token that a server wrote, its log-probability in nats, and those of the tokens that were asked about."""

    token_id: int
    logprob: float
    about: dict[int, float] = field(default_factory=dict)


class Unreachable(ModelFailure):
    """A server that did not answer, after all attempts."""


class Endpoint:
    """A server as an author: what `Engine` knows of a runner, and its requests.

    After three calls in a row that failed in all their attempts it is left alone for ten seconds: calls fail at once,
    and the first one after that tries again.

    Args:
        name: what errors and counts call it.
        url: what stands before "/completions".
        servers: how patiently it is asked.
        vocab_size: ids that it may write.

    Attributes:
        usage: `calls` counts requests; `forward_passes` tokens and deferrals that it generated; `tokens_read` what was
            new to it of each request, as its prefix cache should see it.
        max_length: most tokens of prompt and completion, as it says itself.
    """

    may_abstain = False
    open_slots = 0

    def __init__(self, name: str, url: str, servers: Servers, vocab_size: int) -> None:
        self.name = name
        self.url = url
        self.servers = servers
        self.vocab_size = vocab_size
        self.usage = ModelUsage()
        self.model = ""
        self.max_length: int | None = None
        self._random = random.Random()
        self._failures = 0
        self._closed_until = 0.0

    async def find(self, client: httpx.AsyncClient, deadline: float) -> None:
        """Learn what it serves, waiting until `deadline` (`time.monotonic`) for it to be up.

        Raises:
            LoadError: it is not up by then, refuses, or serves several models.
        """
        while True:
            try:
                reply = await asyncio.wait_for(client.get(f"{self.url}/models"), self.servers.timeout_s)
                if reply.status_code == 200:
                    break
                if reply.status_code < 500:
                    raise LoadError(f"{self.name} at {self.url} answers {_said(reply)}; check address and key")
                reason = _said(reply)
            except _TRANSIENT as error:
                reason = f"{type(error).__name__} {error}".strip()
            if time.monotonic() >= deadline:
                raise LoadError(
                    f"{self.name} at {self.url} is not up after {self.servers.wait_s:g} s: {reason}; "
                    "start it, or wait longer"
                )
            _LOG.info("waiting for %s at %s: %s", self.name, self.url, reason)
            await asyncio.sleep(0.5)
        try:
            cards = reply.json()["data"]
            self.model, self.max_length = str(cards[0]["id"]), cards[0].get("max_model_len")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise LoadError(f"GET {self.url}/models gave no list of models; is the address right?") from error
        if len(cards) != 1:
            names = ", ".join(str(card.get("id")) for card in cards)
            raise LoadError(f"{self.url} serves several models ({names}); expected the {self.name} alone")

    async def tokenize(self, client: httpx.AsyncClient, text: str) -> list[int] | None:
        """Token ids of a text, None from a server that does not say."""
        url = f"{self.url.removesuffix('/v1')}/tokenize"
        reply = await client.post(url, json={"model": self.model, "prompt": text, "add_special_tokens": False})
        if reply.status_code == 404:
            return None
        try:
            return [int(token) for token in reply.json()["tokens"]]
        except (ValueError, LookupError, TypeError) as error:
            raise LoadError(f"{self.name} at {url} gave no tokens of a text: {_said(reply)}") from error

    async def one(self, client: httpx.AsyncClient, body: dict[str, Any]) -> Written:
        """The next token.

        Raises:
            Unreachable: in no attempt was there an answer.
            ModelFailure: it refuses, or answers with something else.
        """
        async with aclosing(self.stream(client, {**body, "max_tokens": 1}, streaming=False)) as written:
            async for tokens in written:
                return tokens[0]
        raise self._no_use("no token")

    async def stream(
        self, client: httpx.AsyncClient, body: dict[str, Any], *, streaming: bool = True
    ) -> AsyncGenerator[list[Written], None]:
        """Tokens as they come; leave it early with `aclosing`. An answer that breaks off is asked for again from there.

        Raises:
            Unreachable, ModelFailure: as `one`.
        """
        left = self._closed_until - time.monotonic()
        if left > 0:
            raise Unreachable(
                f"{self.name} at {self.url} failed {self._failures} times and is left alone for {left:.0f} s"
            )
        prompt, most = list(body["prompt"]), body["max_tokens"]
        attempt = 0
        while True:
            asked = {"model": self.model, "return_token_ids": True, "return_tokens_as_token_ids": True, **body}
            asked |= {"prompt": prompt, "max_tokens": most, "stream": streaming}
            self.usage.calls += 1
            try:
                chunks = self._events(client, asked) if streaming else self._whole(client, asked)
                async with aclosing(chunks):
                    async for choice in chunks:
                        tokens = self._read(choice, prompt)
                        self.usage.forward_passes += len(tokens)
                        prompt += [one.token_id for one in tokens]
                        most -= len(tokens)
                        attempt = self._failures = 0
                        if tokens:
                            yield tokens
                        if choice.get("finish_reason"):
                            return
                reason, wait_s = "the answer broke off", 0.0
            except _Refused as refusal:
                reason, wait_s = refusal.reason, refusal.wait_s
            except _TRANSIENT as error:
                reason, wait_s = f"{type(error).__name__} {error}".strip(), 0.0
            attempt += 1
            if attempt > self.servers.retries:
                self._trip()
                raise Unreachable(
                    f"{self.name} at {self.url} failed {attempt} times, at last: {reason}; check that the server runs"
                )
            pause = min(_FIRST_WAIT_S * 2.0 ** (attempt - 1), _LONGEST_WAIT_S) * self._random.uniform(0.5, 1.0)
            await asyncio.sleep(min(max(pause, wait_s), _LONGEST_WAIT_S))

    async def likely(self, client: httpx.AsyncClient, token_ids: list[int], count: int, most: int) -> list[Likely]:
        """The most probable tokens, with their probabilities, at each of the last `count` tokens.

        Raises:
            ModelFailure: it refuses, or answers with something else.
        """
        body = {"model": self.model, "prompt": token_ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": most}
        try:
            async for choice in self._whole(client, body):
                places = choice["prompt_logprobs"][-count:]
                read = [{int(token): float(entry["logprob"]) for token, entry in place.items()} for place in places]
                ranked = [sorted(place.items(), key=lambda item: -item[1]) for place in read]
                return [[(token, math.exp(logprob)) for token, logprob in place] for place in ranked]
        except (_Refused, *_TRANSIENT, ValueError, LookupError, TypeError, AttributeError) as error:
            raise self._no_use(f"{type(error).__name__} {error}") from error
        raise self._no_use("nothing")

    def _trip(self) -> None:
        self._failures += 1
        if self._failures >= _TRIPS_AFTER:
            self._closed_until = time.monotonic() + _COOLS_S

    async def _whole(self, client: httpx.AsyncClient, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        reply = await asyncio.wait_for(client.post(f"{self.url}/completions", json=body), self.servers.timeout_s)
        self._check_status(reply, reply.text)
        yield self._choice(reply.text)

    async def _events(self, client: httpx.AsyncClient, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        timeout = httpx.Timeout(self.servers.timeout_s)  # of reading: between two pieces
        async with client.stream("POST", f"{self.url}/completions", json=body, timeout=timeout) as reply:
            if reply.status_code != 200:
                self._check_status(reply, (await reply.aread()).decode(errors="replace"))
            async for line in _data(reply.aiter_lines()):
                if line == "[DONE]":
                    return
                yield self._choice(line)

    def _check_status(self, reply: httpx.Response, text: str) -> None:
        if reply.status_code == 200:
            return
        reason = f"status {reply.status_code} {' '.join(text.split())[:300]}"
        if reply.status_code == 429 or reply.status_code >= 500:
            raise _Refused(reason, _retry_after_s(reply))
        raise ModelFailure(f"{self.name} at {self.url} refuses a request: {reason}")

    def _choice(self, text: str) -> dict[str, Any]:
        try:
            event = json.loads(text)
            if "error" in event:
                raise _Refused(str(event["error"])[:300], 0.0)
            return event["choices"][0]  # type: ignore[no-any-return]
        except (ValueError, LookupError, TypeError) as error:
            raise self._no_use(text) from error

    def _read(self, choice: dict[str, Any], prompt: Sequence[int]) -> list[Written]:
        """Tokens of an answer or of a piece of one."""
        try:
            echoed = choice.get("prompt_token_ids")
            if echoed is not None and list(echoed) != list(prompt):
                raise ValueError("its prompt_token_ids are not the token ids that were sent")
            token_ids, logprobs = choice["token_ids"], choice.get("logprobs") or {"token_logprobs": []}
            values = logprobs["token_logprobs"]
            about = logprobs.get("top_logprobs") or [{}] * len(token_ids)
            read = [
                Written(
                    int(token), float(value), {int(key.removeprefix("token_id:")): float(p) for key, p in of.items()}
                )
                for token, value, of in zip(token_ids, values, about, strict=True)
            ]
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise self._no_use(f"{type(error).__name__} {error} in {choice}") from error
        outside = [one.token_id for one in read if not 0 <= one.token_id < self.vocab_size]
        if outside:
            raise MismatchError(
                f"{self.name} at {self.url} wrote token id {outside[0]}, expected ids below {self.vocab_size}: it "
                "serves another model"
            )
        return read

    def _no_use(self, what: str) -> ModelFailure:
        return ModelFailure(
            f"{self.name} at {self.url} gave no usable answer, expected token ids with log-probabilities: {what[:300]}"
        )


class _Refused(Exception):  # noqa: N818
    """A status that may pass."""

    def __init__(self, reason: str, wait_s: float) -> None:
        super().__init__(reason)
        self.reason, self.wait_s = reason, wait_s


async def _data(lines: AsyncIterator[str]) -> AsyncGenerator[str, None]:
    """The data of server-sent events that have one line each, as OpenAI's have."""
    async for line in lines:
        if line.startswith("data:"):
            yield line.removeprefix("data:").strip()


def _said(reply: httpx.Response) -> str:
    return f"status {reply.status_code} {' '.join(reply.text.split())[:300]}".strip()


def _retry_after_s(reply: httpx.Response) -> float:
    value = reply.headers.get("Retry-After", "")
    return float(value) if value.isdecimal() else 0.0
