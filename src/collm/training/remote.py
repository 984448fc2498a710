"""Scoring with a model behind an OpenAI-compatible server that returns prompt log-probabilities, such as vLLM."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing, closing
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
from torch import Tensor

from collm.errors import CollmError, ConfigError, LoadError, MismatchError, ModelFailure
from collm.http.client import CallSettings, FailedAttempt, HttpClient, Refused, check_echo, check_url, logprob
from collm.http.loop import LoopThread, gather
from collm.training.examples import Example

Pair = tuple[Tensor, Tensor]
_TOO_LARGE = re.compile(r"context (length|window|size)|max_model_len|too (long|many)|longer than|vocab", re.IGNORECASE)


@dataclass(eq=False)
class RemoteModel:
    """A frozen model behind `POST {base_url}/completions`. It keeps no connections or threads between calls.

    Args:
        base_url: URL before "/completions"; for vLLM it ends in "/v1".
        name: the server's name of the model.
        vocab_size: V, the vocabulary size that all models share, because a server does not report its own.
        concurrency: largest number of requests in flight.
        timeout_s: time limit of a request, in seconds.
        retries: further attempts after a connection error, a timeout, or status 429 or 5xx.
        api_key_env: environment variable with the API key; without it no key is sent.
        sleep: called with the seconds to wait between attempts.

    Attributes:
        max_length: largest number of tokens before the last token of an example: the server's max_model_len - 2, which
            leaves room for that last token and a generated one; None if the server has no limit.

    Raises:
        ConfigError: an option is out of range, or the environment variable has no key.
        LoadError: the server cannot be reached, rejects the request, or does not serve this model.
    """

    base_url: str
    name: str
    _: KW_ONLY
    vocab_size: int
    max_length: int | None = field(default=None, init=False)
    concurrency: int = 16
    timeout_s: float = 120.0
    retries: int = 5
    api_key_env: str | None = None
    sleep: Callable[[float], Awaitable[None]] = field(default=asyncio.sleep, repr=False)

    def __post_init__(self) -> None:
        for option in ("vocab_size", "concurrency"):
            if (value := getattr(self, option)) < 1:
                raise ConfigError(f"{option} is {value}, expected at least 1")
        check_url("base_url", self.base_url)
        self.base_url = self.base_url.rstrip("/")
        with closing(LoopThread()) as loop:
            loop.run(self._check_served())

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
        if not examples:
            return []
        with closing(LoopThread()) as loop:
            return loop.run(self._score_all(examples, numbers or range(len(examples))))

    async def _score_all(self, examples: Sequence[Example], numbers: Sequence[int]) -> list[Pair]:
        limit = asyncio.Semaphore(self.concurrency)
        async with aclosing(self._client()) as client:
            pairs = zip(examples, numbers, strict=True)
            return await gather([self._score_one(client, limit, *pair) for pair in pairs])

    async def _score_one(self, client: HttpClient, limit: asyncio.Semaphore, example: Example, number: int) -> Pair:
        token_ids = [int(token_id) for token_id in example.token_ids]
        what = f"example {number} ({len(token_ids)} tokens)"
        # prompt_logprobs 0 does not suffice for ties, because vLLM's rank of the gold token counts all tied tokens
        options = {"prompt_logprobs": 1, "max_tokens": 1, "return_token_ids": True}
        body = {"model": self.name, "prompt": token_ids, **options}
        try:
            async with limit:
                answer = await client.call(f"{self.base_url}/completions", body, str)
        except ModelFailure as failure:
            raise _load_error(failure, what) from None
        try:
            return _read_answer(client.first_choice(answer), token_ids, example.is_target, self.vocab_size)
        except (ValueError, FailedAttempt) as error:
            message = client.redacted(f"{client.where} returned an invalid response for {what}: {error}")
            raise ModelFailure(message) from None

    async def _check_served(self) -> None:
        """Check that the server has the model, and read its limit."""
        async with aclosing(self._client()) as client:
            try:
                served = client.models(await client.call(f"{self.base_url}/models", None, str))
            except ModelFailure as failure:
                raise _load_error(failure) from None
            if self.name not in served:
                names = client.redacted(str([*served]))[:300]
                raise LoadError(f"{self.base_url} does not serve {self.name!r}; it serves: {names}")
        if isinstance(longest := served[self.name], int):
            self.max_length = longest - 2

    def _client(self) -> HttpClient:
        settings = CallSettings(self.timeout_s, self.retries, self.api_key_env, sleep=self.sleep)
        return HttpClient(self.name, self.base_url, settings)


def _load_error(failure: ModelFailure, example: str = "") -> CollmError:
    """The error for a call that failed: about the example if the server refuses it for its size or its tokens."""
    refusal = failure.reason if isinstance(failure, Refused) and failure.status in (400, 413, 422) else ""
    if example and _TOO_LARGE.search(refusal):
        advice = "lower max_length if it is too long; otherwise it was made with another tokenizer"
        return MismatchError(f"{example} was refused: {failure}; {advice}")
    return LoadError(str(failure))


def _read_answer(
    choice: dict[str, Any] | None, token_ids: Sequence[int], is_target: Sequence[bool], vocab_size: int
) -> Pair:
    """Log-probabilities and correctness of the target tokens; a ValueError if the response is invalid."""
    positions = choice.get("prompt_logprobs") if isinstance(choice, dict) else None
    if choice is None or not isinstance(positions, list):
        raise ValueError("no choices[0].prompt_logprobs, which the server must support, as vLLM does")
    if len(positions) != len(token_ids):
        raise ValueError(f"{len(positions)} positions for {len(token_ids)} tokens")
    check_echo(choice, token_ids)
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
        logprobs = {int(token_id): logprob(entry["logprob"]) for token_id, entry in entries.items()}
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"{where} expected finite log-probabilities up to 0, got {str(entries)[:100]}") from None
    best, rank = min(logprobs, key=lambda token_id: (-logprobs[token_id], token_id)), entries[str(gold)].get("rank")
    if len(logprobs) == 1 and not isinstance(rank, int):
        raise ValueError(f"{where} has neither a rank nor another token to compare with")
    correct = rank == 1 if len(logprobs) == 1 else best == gold
    if (correct or best != gold) and logprobs[best] < -math.log(vocab_size) - 1:
        raise ValueError(f"{where} has {logprobs[best]:.4g} nats for its best token, less than a uniform distribution")
    return logprobs[gold], correct
