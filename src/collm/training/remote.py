"""Scoring by a model behind an OpenAI-compatible server that returns log-probabilities of prompts, as vLLM does."""

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
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # so named in all its versions
from torch import Tensor

from collm.errors import CollmError, ConfigError, LoadError, MismatchError, ModelFailure
from collm.training.examples import Example

logger = logging.getLogger(__name__)

T = TypeVar("T")
Pair = tuple[Tensor, Tensor]
Client = httpx.AsyncClient
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0
_LOWEST_LOGPROB, _ROUNDING_NATS = torch.finfo(torch.float32).min, 1e-3
_PASSING = (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError)
_DOES_NOT_FIT = re.compile(
    r"context (length|window|size)|max_model_len|too (long|many)|longer than|vocab", re.IGNORECASE
)


@dataclass(eq=False)
class RemoteModel:
    """A frozen model behind `POST {base_url}/completions`. Between calls it keeps no connection and no thread.

    Args:
        base_url: what stands before "/completions"; with vLLM it ends in "/v1".
        model: what the server calls it.
        vocab_size: V, the ids that all models share; a server does not tell its own.
        name: what messages call it; `model` if not given.
        max_length: most tokens it reads before the last token of an example, None for no limit; lowered to what the
            server's max_model_len leaves, which counts that last token too and one that is written.
        concurrency: most requests in flight.
        timeout_s: time limit of one request, in seconds.
        retries: further attempts after a connection error, a timeout, and status 429 or 5xx.
        api_key_env: the environment variable that holds the key; without it no key is sent.
        sleep: awaited between attempts, with seconds.

    Raises:
        ConfigError: an option out of range, or an environment variable without a key.
        LoadError: the server cannot be reached, refuses, or does not serve this model.
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
        if not re.fullmatch(r"https?://[^\s/@?#]+(/[^\s@?#]*)?", self.base_url):  # not shown, as it may hold a key
            raise ConfigError("base_url is no URL like http://localhost:8000/v1 (a key is given by api_key_env)")
        self._key = os.environ.get(self.api_key_env, "").strip() if self.api_key_env else ""
        if self.api_key_env and not (self._key and self._key.isascii() and self._key.isprintable()):
            raise ConfigError(f"the environment variable {self.api_key_env} holds no key (printable ASCII); set it")
        self.base_url, self.name, self._random = self.base_url.rstrip("/"), self.name or self.model, random.Random()
        _run(self._find())

    def score(self, examples: Sequence[Example], *, numbers: Sequence[int] | None = None) -> list[Pair]:
        """What it says of the target tokens. The first failure and an interrupt end all requests.

        Messages call the examples by these `numbers`, by their places in the list if not given.

        Returns:
            For each example, in order, log-probabilities in nats, fp32, shape (n,), and whether each target token is
            the argmax, bool, shape (n,). Of tied tokens the lowest id is the argmax, as in memory, of those that the
            server returns: vLLM returns the gold token and one of the best. It writes a probability of 0 as -9999.

        Raises:
            LoadError: the server cannot be reached any more, or refuses.
            MismatchError: it says that an example is too long or holds a token id that it does not have.
            ModelFailure: an answer does not give log-probabilities of the tokens of its example.
        """
        return _run(self._score_all(examples, numbers or range(len(examples)))) if examples else []

    async def _score_all(self, examples: Sequence[Example], numbers: Sequence[int]) -> list[Pair]:
        limit = asyncio.Semaphore(self.concurrency)
        async with self._client() as client:
            pairs = zip(examples, numbers, strict=True)
            tasks = [asyncio.create_task(self._score_one(client, limit, *pair)) for pair in pairs]
            try:  # not by gather, which would raise an interrupt of one request a second time, in asyncio's own cleanup
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
        # prompt_logprobs 0 would do but for ties: vLLM counts all tied tokens into the rank of the gold one
        asked = {"prompt_logprobs": 1, "max_tokens": 1, "return_token_ids": True}
        what = f"example {number} ({len(token_ids)} tokens)"
        async with limit:
            answer = await self._ask(client, "/completions", {"model": self.model, "prompt": token_ids, **asked}, what)
        try:
            return _read_answer(json.loads(answer), token_ids, example.is_target, self.vocab_size)
        except ValueError as error:
            message = f"{self.name} at {self.base_url} gave no usable answer for {what}: {error}"
            raise ModelFailure(self._redact(message)) from None

    async def _find(self) -> None:
        """Check that the model is served, and lower max_length to what the server says."""
        async with self._client() as client:
            answer = await self._ask(client, "/models")
        try:
            served = {str(card["id"]): card.get("max_model_len") for card in json.loads(answer)["data"]}
        except (ValueError, LookupError, TypeError, AttributeError):
            raise LoadError(f"GET {self.base_url}/models gave no list of models; is base_url right?") from None
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
        """What the server answers with status 200, in as many attempts as allowed."""
        url, method, attempts = self.base_url + path, "POST" if payload else "GET", self.retries + 1
        for attempt in range(1, attempts + 1):
            wait_s = min(_FIRST_WAIT_S * 2.0 ** (attempt - 1), _LONGEST_WAIT_S) * self._random.uniform(0.5, 1.0)
            try:
                response = await asyncio.wait_for(client.request(method, url, json=payload), self.timeout_s)
                if response.status_code == 200:
                    return response.content
                if response.status_code != 429 and response.status_code < 500:
                    raise self._refusal(response, example)
                reason, wait_s = self._said(response), max(wait_s, _retry_after_s(response))
            except asyncio.TimeoutError:
                reason = f"no answer within {self.timeout_s:g} s"
            except _PASSING as error:
                reason = f"{type(error).__name__} {error}".strip()
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise LoadError(f"{method} {url} failed: {type(error).__name__} {error}") from None
            if attempt < attempts:
                logger.warning("%s: %s; attempt %d of %d in %.1f s", url, reason, attempt + 1, attempts, wait_s)
                await self.sleep(wait_s)
        raise LoadError(f"{method} {url} failed {attempts} times, at last: {reason}; check that the server runs")

    def _refusal(self, response: httpx.Response, example: str) -> CollmError:
        said = self._said(response)
        if example and response.status_code in (400, 413, 422) and _DOES_NOT_FIT.search(said):
            advice = "lower max_length if it is too long; else it was made with another tokenizer"
            return MismatchError(f"{example} does not fit {self.name} at {self.base_url}: {said}; {advice}")
        advice = "check base_url (with vLLM it ends in /v1) and what the server serves"
        if response.status_code in (401, 403):
            advice = f"check the key in {self.api_key_env}" if self.api_key_env else "give its key by api_key_env"
        return LoadError(f"{response.request.method} {response.url} was refused: {said}; {advice}")

    def _said(self, response: httpx.Response) -> str:
        return f"status {response.status_code} {' '.join(self._redact(response.text).split())[:300]}".strip()

    def _redact(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def _retry_after_s(response: httpx.Response) -> float:
    """What the header says in seconds or as a date; 0 if neither."""
    value = response.headers.get("Retry-After", "")
    with suppress(ValueError, TypeError):
        return float(value) if value.isdecimal() else parsedate_to_datetime(value).timestamp() - time.time()
    return 0.0


def _read_answer(answer: Any, token_ids: Sequence[int], is_target: Sequence[bool], vocab_size: int) -> Pair:
    """Log-probabilities and flags of the target tokens; ValueError says what is wrong with the answer."""
    try:
        choice = answer["choices"][0]
        positions, echoed = list(choice["prompt_logprobs"]), choice.get("prompt_token_ids")
    except (LookupError, TypeError, AttributeError):
        raise ValueError("no choices[0].prompt_logprobs; the server must support them, as vLLM does") from None
    if len(positions) != len(token_ids):
        raise ValueError(f"{len(positions)} positions for {len(token_ids)} tokens")
    if echoed is not None and echoed != token_ids:
        raise ValueError("its prompt_token_ids are not the token ids that were sent")
    places = (place for place in range(1, len(token_ids)) if is_target[place])
    read = [_read_position(place, positions[place], token_ids[place], vocab_size) for place in places]
    values, flags = zip(*read, strict=True)
    return torch.tensor(values, dtype=torch.float32), torch.tensor(flags, dtype=torch.bool)


def _read_position(place: int, entries: Any, gold: int, vocab_size: int) -> tuple[float, bool]:
    """Log-probability of the gold token, and whether it is the argmax: by its rank if no other token came."""
    where = f"position {place} (token {gold})"
    if not isinstance(entries, dict) or str(gold) not in entries:
        raise ValueError(f"{where} has nothing about its token, but {str(entries)[:100]}")
    try:
        logprobs = {int(token_id): float(entry["logprob"]) for token_id, entry in entries.items()}
    except (ValueError, LookupError, TypeError, ArithmeticError):
        logprobs = {gold: math.nan}
    if not all(_LOWEST_LOGPROB <= value <= _ROUNDING_NATS for value in logprobs.values()):
        raise ValueError(f"{where} has no finite log-probabilities up to 0, but {str(entries)[:100]}")
    best, rank = min(logprobs, key=lambda token_id: (-logprobs[token_id], token_id)), entries[str(gold)].get("rank")
    if len(logprobs) == 1 and not isinstance(rank, int):
        raise ValueError(f"{where} has neither a rank nor another token to compare with")
    correct = rank == 1 if len(logprobs) == 1 else best == gold
    if (correct or best != gold) and logprobs[best] < -math.log(vocab_size) - 1:
        raise ValueError(f"{where} has {logprobs[best]:.4g} nats for its best token, below a uniform distribution")
    return logprobs[gold], correct


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end; in a thread of its own where an event loop runs already, as in a notebook."""
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
