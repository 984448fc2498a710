"""Scoring with a model behind an OpenAI-compatible server that returns prompt log-probabilities, such as vLLM."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import random
import re
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import KW_ONLY, dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import torch
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # available in all its versions
from torch import Tensor

from collm.errors import CollmError, ConfigError, LoadError, MismatchError, ModelFailure
from collm.training.examples import Example

logger = logging.getLogger(__name__)

T = TypeVar("T")
Pair = tuple[Tensor, Tensor]
Client = httpx.AsyncClient
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0
_LOWEST_LOGPROB, _ROUNDING_NATS = torch.finfo(torch.float32).min, 1e-3
_RETRYABLE = (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError)
_TOO_LARGE = re.compile(r"context (length|window|size)|max_model_len|too (long|many)|longer than|vocab", re.IGNORECASE)


@dataclass(eq=False)
class RemoteModel:
    """A frozen model behind `POST {base_url}/completions`. It keeps no connections or threads between calls.

    Args:
        base_url: URL before "/completions"; for vLLM it ends in "/v1".
        model: the server's name of the model.
        vocab_size: V, the vocabulary size that all models share, because a server does not report its own.
        name: name in messages; defaults to `model`.
        max_length: largest number of tokens before the last token of an example, None for no limit. It is lowered to
            the server's max_model_len - 2, which leaves room for that last token and a generated one.
        concurrency: largest number of requests in flight.
        timeout_s: time limit of a request, in seconds.
        retries: further attempts after a connection error, a timeout, or status 429 or 5xx.
        api_key_env: environment variable with the API key; without it no key is sent.
        sleep: called with the seconds to wait between attempts.

    Raises:
        ConfigError: an option is out of range, or the environment variable has no key.
        LoadError: the server cannot be reached, rejects the request, or does not serve this model.
    """

    base_url: str
    model: str
    _: KW_ONLY
    vocab_size: int
    name: str = ""
    max_length: int | None = None
    concurrency: int = 16
    timeout_s: float = 120.0
    retries: int = 5
    api_key_env: str | None = None
    sleep: Callable[[float], Awaitable[None]] = field(default=asyncio.sleep, repr=False)

    def __post_init__(self) -> None:
        for option, least in {"vocab_size": 1, "max_length": 1, "concurrency": 1, "retries": 0}.items():
            if (value := getattr(self, option)) is not None and value < least:
                raise ConfigError(f"{option} is {value}, expected at least {least}")
        if not 0 < self.timeout_s < math.inf:
            raise ConfigError(f"timeout_s is {self.timeout_s}, expected a positive number of seconds")
        if not re.fullmatch(r"https?://[^\s/@?#]+(/[^\s@?#]*)?", self.base_url):  # not shown, as it may contain a key
            raise ConfigError("base_url is not a URL like http://localhost:8000/v1 (pass a key with api_key_env)")
        self._key = os.environ.get(self.api_key_env, "").strip() if self.api_key_env else ""
        if self.api_key_env and not (self._key and self._key.isascii() and self._key.isprintable()):
            raise ConfigError(f"the environment variable {self.api_key_env} has no key (printable ASCII); set it")
        self.base_url, self.name, self._random = self.base_url.rstrip("/"), self.name or self.model, random.Random()
        _run(self._check_served())

    def score(self, examples: Sequence[Example], *, numbers: Sequence[int] | None = None) -> list[Pair]:
        """Score the target tokens. The first failure or an interrupt cancels all requests.

        Args:
            numbers: numbers of the examples in messages; defaults to their indices.

        Returns:
            For each example, in order, log-probabilities in nats, fp32, shape (n,), and whether each target token is
            the argmax, bool, shape (n,). Of tied tokens the lowest id is the argmax, as for models in memory, but
            among the returned tokens only: vLLM returns the gold token and one of the best. It reports a probability
            of 0 as -9999.

        Raises:
            LoadError: the server can no longer be reached, or rejects the request.
            MismatchError: the server reports that an example is too long or has an unknown token id.
            ModelFailure: a response lacks log-probabilities of the example's tokens.
        """
        return _run(self._score_all(examples, numbers or range(len(examples)))) if examples else []

    async def _score_all(self, examples: Sequence[Example], numbers: Sequence[int]) -> list[Pair]:
        limit = asyncio.Semaphore(self.concurrency)
        async with self._client() as client:
            pairs = zip(examples, numbers, strict=True)
            tasks = [asyncio.create_task(self._score_one(client, limit, *pair)) for pair in pairs]
            try:  # gather would raise an interrupt a second time during asyncio's cleanup
                await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            finally:
                for task in tasks:
                    task.cancel()
                results = await asyncio.gather(*tasks, return_exceptions=True)
        if failures := [result for result in results if isinstance(result, Exception)]:
            raise failures[0]
        return [task.result() for task in tasks]

    async def _score_one(self, client: Client, limit: asyncio.Semaphore, example: Example, number: int) -> Pair:
        token_ids = [int(token_id) for token_id in example.token_ids]
        # prompt_logprobs 0 does not suffice for ties, because vLLM's rank of the gold token counts all tied tokens
        options = {"prompt_logprobs": 1, "max_tokens": 1, "return_token_ids": True}
        what = f"example {number} ({len(token_ids)} tokens)"
        async with limit:
            answer = await self._ask(
                client, "/completions", {"model": self.model, "prompt": token_ids, **options}, what
            )
        try:
            return _read_answer(json.loads(answer), token_ids, example.is_target, self.vocab_size)
        except ValueError as error:
            message = f"{self.name} at {self.base_url} returned an invalid response for {what}: {error}"
            raise ModelFailure(self._redact(message)) from None

    async def _check_served(self) -> None:
        """Check that the server has the model, and lower max_length to the server's limit."""
        async with self._client() as client:
            answer = await self._ask(client, "/models")
        try:
            served = {str(card["id"]): card.get("max_model_len") for card in json.loads(answer)["data"]}
        except (ValueError, LookupError, TypeError, AttributeError):
            raise LoadError(f"GET {self.base_url}/models returned no list of models; check base_url") from None
        if self.model not in served:
            names = self._redact(str([*served]))[:300]
            raise LoadError(f"{self.base_url} does not serve {self.model!r}; it serves: {names}")
        if isinstance(longest := served[self.model], int):
            self.max_length = min(longest - 2, self.max_length or longest)

    def _client(self) -> Client:
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        limits = httpx.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)
        return Client(headers=headers, timeout=None, limits=limits)

    async def _ask(self, client: Client, path: str, payload: Any = None, example: str = "") -> bytes:
        """Send a request, with retries, and return the content of a response with status 200."""
        url, method, attempts = self.base_url + path, "POST" if payload else "GET", self.retries + 1
        for attempt in range(1, attempts + 1):
            wait_s = min(_FIRST_WAIT_S * 2.0 ** (attempt - 1), _LONGEST_WAIT_S) * self._random.uniform(0.5, 1.0)
            try:
                response = await asyncio.wait_for(client.request(method, url, json=payload), self.timeout_s)
                if response.status_code == 200:
                    return response.content
                if response.status_code != 429 and response.status_code < 500:
                    raise self._refusal(response, example)
                reason, wait_s = self._describe(response), max(wait_s, _retry_after_s(response))
            except asyncio.TimeoutError:
                reason = f"no answer within {self.timeout_s:g} s"
            except _RETRYABLE as error:
                reason = f"{type(error).__name__} {error}".strip()
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise LoadError(f"{method} {url} failed: {type(error).__name__} {error}") from None
            if attempt < attempts:
                logger.warning("%s: %s; attempt %d of %d in %.1f s", url, reason, attempt + 1, attempts, wait_s)
                await self.sleep(wait_s)
        raise LoadError(f"{method} {url} failed {attempts} times, last with: {reason}; check that the server runs")

    def _refusal(self, response: httpx.Response, example: str) -> CollmError:
        description = self._describe(response)
        if example and response.status_code in (400, 413, 422) and _TOO_LARGE.search(description):
            advice = "lower max_length if it is too long; otherwise it was made with another tokenizer"
            return MismatchError(f"{self.name} at {self.base_url} rejected {example}: {description}; {advice}")
        advice = "check base_url (for vLLM it ends in /v1) and the models of the server"
        if response.status_code in (401, 403):
            advice = f"check the key in {self.api_key_env}" if self.api_key_env else "pass its key with api_key_env"
        return LoadError(f"{response.request.method} {response.url} was rejected: {description}; {advice}")

    def _describe(self, response: httpx.Response) -> str:
        return f"status {response.status_code} {' '.join(self._redact(response.text).split())[:300]}".strip()

    def _redact(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def _retry_after_s(response: httpx.Response) -> float:
    """The Retry-After header, in seconds or as a date; 0 if there is none."""
    value = response.headers.get("Retry-After", "")
    with suppress(ValueError, TypeError):
        return float(value) if value.isdecimal() else parsedate_to_datetime(value).timestamp() - time.time()
    return 0.0


def _read_answer(answer: Any, token_ids: Sequence[int], is_target: Sequence[bool], vocab_size: int) -> Pair:
    """Log-probabilities and correctness of the target tokens; a ValueError if the response is invalid."""
    try:
        choice = answer["choices"][0]
        positions, echoed = list(choice["prompt_logprobs"]), choice.get("prompt_token_ids")
    except (LookupError, TypeError, AttributeError):
        raise ValueError("no choices[0].prompt_logprobs, which the server must support, as vLLM does") from None
    if len(positions) != len(token_ids):
        raise ValueError(f"{len(positions)} positions for {len(token_ids)} tokens")
    if echoed is not None and echoed != token_ids:
        raise ValueError("its prompt_token_ids are not the token ids that were sent")
    places = (place for place in range(1, len(token_ids)) if is_target[place])
    read = [_read_position(place, positions[place], token_ids[place], vocab_size) for place in places]
    values, flags = zip(*read, strict=True)
    return torch.tensor(values, dtype=torch.float32), torch.tensor(flags, dtype=torch.bool)


def _read_position(place: int, entries: Any, gold: int, vocab_size: int) -> tuple[float, bool]:
    """Log-probability of the gold token, and whether it is the argmax (from its rank if no other token is listed)."""
    where = f"position {place} (token {gold})"
    if not isinstance(entries, dict) or str(gold) not in entries:
        raise ValueError(f"{where} has no entry for its token, but {str(entries)[:100]}")
    try:
        logprobs = {int(token_id): float(entry["logprob"]) for token_id, entry in entries.items()}
    except (ValueError, LookupError, TypeError, ArithmeticError):
        logprobs = {gold: math.nan}
    if not all(_LOWEST_LOGPROB <= value <= _ROUNDING_NATS for value in logprobs.values()):
        raise ValueError(f"{where} expected finite log-probabilities up to 0, got {str(entries)[:100]}")
    best, rank = min(logprobs, key=lambda token_id: (-logprobs[token_id], token_id)), entries[str(gold)].get("rank")
    if len(logprobs) == 1 and not isinstance(rank, int):
        raise ValueError(f"{where} has neither a rank nor another token to compare with")
    correct = rank == 1 if len(logprobs) == 1 else best == gold
    if (correct or best != gold) and logprobs[best] < -math.log(vocab_size) - 1:
        raise ValueError(f"{where} has {logprobs[best]:.4g} nats for its best token, less than a uniform distribution")
    return logprobs[gold], correct


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to completion, in a thread if an event loop is already running, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with closing(asyncio.new_event_loop()) as loop, ThreadPoolExecutor(1) as pool:
        task = loop.create_task(work)
        try:
            return pool.submit(loop.run_until_complete, task).result()
        except KeyboardInterrupt:
            loop.call_soon_threadsafe(task.cancel)
            raise
