"""Connections to all servers of a collaboration. One event loop in a separate thread makes all calls."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, TypeVar

from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # every version re-exports it
from transformers import PreTrainedTokenizerBase

from collm.core.head import DeferralHead
from collm.core.types import author_name
from collm.engine.candidates import Candidates, Likely, spelled
from collm.errors import ConfigError, MismatchError
from collm.text.guards import PROBE, TokenizerIdentity
from collm.vllm import THRESHOLD
from collm.vllm.endpoint import Endpoint, sockets
from collm.vllm.export import defer_names
from collm.vllm.servers import Servers

T = TypeVar("T")
Opened = TypeVar("Opened", bound="Connections")
_PROBE: dict[str, Any] = {"prompt": [0], "temperature": 0, "logprobs": 0}
_LEAST_LOGPROB = -1e3
"""Lower limit for the row of zeros. vLLM reports tokens that are ruled out with -9999."""
_IDLE_S = 3.0
"""Time after which an unused connection is closed. It is less than vLLM's five seconds, so that vLLM does not close a
connection at the moment of a request.
"""


def _without_rows(likely: Likely, vocab_size: int) -> Likely:
    """Drop entries beyond the vocabulary and divide the other probabilities by the remaining probability."""
    left = 1 - sum(prob for token_id, prob in likely if token_id >= vocab_size)
    return [(token_id, prob / left) for token_id, prob in likely if token_id < vocab_size]


class Connections:
    """Connections to the servers of base and assistants. Use it as a context manager, or call `close`.

    The connections are also closed when the object is garbage-collected.

    Args:
        servers: settings for calls.
        urls: the URL of each author's server, the base's first.
        tokenizer: the tokenizer of all models.

    Attributes:
        authors: an `Endpoint` for each author.
        vocab_size: number of token ids that all models share.

    Raises:
        ConfigError: the environment variable for the API key holds no key.
        LoadError: a server is not up in time, refuses the request or serves several models.
        MismatchError: a server has another model than the collaboration names.
    """

    def __init__(self, servers: Servers, urls: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
        self.servers = servers
        vocab_size = TokenizerIdentity.of(tokenizer).vocab_size
        self.authors = [Endpoint(author_name(author), url, servers, vocab_size) for author, url in enumerate(urls)]
        self.vocab_size = vocab_size
        limits = httpx.Limits(max_connections=None, keepalive_expiry=_IDLE_S)
        self.client = httpx.AsyncClient(
            headers=servers.headers, timeout=servers.timeout_s, limits=limits, mounts=sockets(urls, limits=limits)
        )
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=_run_loop, args=(self._loop,), name="collm-vllm", daemon=True)
        thread.start()
        self._finalizer = weakref.finalize(self, _close, self._loop, thread, self.client)
        try:
            self.run(self.check(tokenizer))
        except BaseException:
            self.close()
            raise

    def __enter__(self: Opened) -> Opened:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancel running calls, close the connections and end the thread. Further calls of this method do nothing."""
        self._finalizer()

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine in the thread of the event loop.

        Raises:
            ConfigError: the connections were closed.
        """
        if not self._finalizer.alive:
            coroutine.close()
            raise ConfigError("the connections to the servers were closed; load the collaboration again")
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine as `start` does, and wait for its result."""
        future = self.start(coroutine)
        try:
            return future.result()
        finally:
            future.cancel()

    async def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Wait for the servers and check which models they hold."""
        raise NotImplementedError

    def candidates(
        self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], token_ids: Sequence[int], most: int
    ) -> list[list[Candidates]]:
        """Compute what `engine.candidates.top_candidates` does, from the servers' prompt log-probabilities.

        Raises:
            ConfigError: the servers cannot provide them.
            ModelFailure: a server refuses the request or gives no usable answer.
        """
        raise NotImplementedError

    async def check_tokens(self, author: Endpoint, tokenizer: PreTrainedTokenizerBase) -> None:
        """Check that a server tokenizes text as the collaboration does.

        Raises:
            MismatchError: it does not.
        """
        theirs = await author.tokenize(self.client, PROBE)
        if theirs is not None and theirs != tokenizer(PROBE, add_special_tokens=False)["input_ids"]:
            raise MismatchError(
                f"{author.name} at {author.url} serves {author.model!r}, which tokenizes text differently; "
                "serve the model that the collaboration names"
            )


class AuthorConnections(Connections):
    """Connections to one server for each author.

    Args:
        servers: addresses, and settings for calls.
        head: the deferral head, which the export on the base's server must contain.
        tokenizer: the tokenizer of all models.

    Attributes:
        defer_ids: tokens with which the base's server reports deferrals to the assistants 1..K.
        zero_id: the token of the row of zeros, whose logit is 0.
        biases: b_1..b_K.

    Raises:
        ConfigError: there is not one server for each author, or as in `Connections`.
        LoadError: as in `Connections`.
        MismatchError: as in `Connections`, or the base's server has another head or no plug-in.
    """

    def __init__(self, servers: Servers, head: DeferralHead, tokenizer: PreTrainedTokenizerBase) -> None:
        servers.check_count(head.num_assistants)
        self.biases = head.bias.detach().float().tolist()
        self._names = defer_names(head)
        super().__init__(servers, servers.urls, tokenizer)

    def candidates(
        self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], token_ids: Sequence[int], most: int
    ) -> list[list[Candidates]]:
        """Compute candidates as `Connections.candidates` states.

        Rows of the head that are among the base's most probable entries are left out, and the probabilities are
        renormalised. Less probable rows remain in the normaliser.
        """
        if not token_ids:
            return []
        by_author = self.run(self._likely([*prompt_ids, *token_ids], len(token_ids), most))
        return spelled(tokenizer, prompt_ids, token_ids, by_author)

    async def _likely(self, token_ids: list[int], count: int, most: int) -> list[list[Likely]]:
        wanted = most + 1 + len(self.defer_ids)
        calls = [author.likely(self.client, token_ids, count, wanted) for author in self.authors]
        by_author = await _gather(calls)
        return [[_without_rows(likely, self.vocab_size)[:most] for likely in each] for each in by_author]

    async def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        deadline = time.monotonic() + self.servers.wait_s
        await _gather([author.find(self.client, deadline) for author in self.authors])
        for author in self.authors:
            await self.check_tokens(author, tokenizer)
        base, *assistants = self.authors
        rows = [await base.tokenize(self.client, name) for name in self._names]
        if any(row is None or len(row) != 1 or row[0] < self.vocab_size for row in rows):
            raise MismatchError(
                f"the base at {base.url} serves {base.model!r}, which is not an export of this collaboration's base "
                "and head; export it again with 'collm export vllm' and serve the new export"
            )
        *self.defer_ids, self.zero_id = (row[0] for row in rows if row)
        base.vocab_size = self.zero_id + 1  # the server reports deferrals as tokens
        await self._check_plugin(base)
        await _gather([assistant.one(self.client, _PROBE) for assistant in assistants])

    async def _check_plugin(self, base: Endpoint) -> None:
        body = {**_PROBE, "logprob_token_ids": [*self.defer_ids, self.zero_id]}
        always = await base.one(self.client, {**body, "vllm_xargs": {THRESHOLD: -1}})
        never = await base.one(self.client, {**body, "vllm_xargs": {THRESHOLD: 1}})
        if always.token_id not in self.defer_ids or never.token_id >= self.vocab_size:
            raise MismatchError(
                f"the base at {base.url} does not defer, because its vLLM has no collm plug-in; install collm-vllm "
                "(plugins/vllm) there and restart the server"
            )
        if any(token not in never.about for token in [*self.defer_ids, self.zero_id]):
            raise MismatchError(
                f"the base at {base.url} does not report its defer prob; its server must support logprob_token_ids, as "
                "vLLM does"
            )
        if not _LEAST_LOGPROB < never.about[self.zero_id] < 0:
            raise MismatchError(
                f"the base at {base.url} returns logits or processed values as log-probabilities; start its vLLM with "
                "the default --logprobs-mode (raw_logprobs)"
            )


async def _gather(coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Await all coroutines. The first exception cancels the others."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


def _close(loop: asyncio.AbstractEventLoop, thread: threading.Thread, client: httpx.AsyncClient) -> None:
    """Stop the loop and wait for its thread, unless the thread itself dropped the last reference."""
    asyncio.run_coroutine_threadsafe(_stop(loop, client), loop)
    if threading.current_thread() is not thread:
        thread.join()


async def _stop(loop: asyncio.AbstractEventLoop, client: httpx.AsyncClient) -> None:
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    try:
        await asyncio.gather(*tasks, return_exceptions=True)
        await client.aclose()
        await loop.shutdown_asyncgens()
    finally:
        loop.stop()
