"""All servers of a collaboration: checked once, then asked from one event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, TypeVar

from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # so named in all its versions
from transformers import PreTrainedTokenizerBase

from collm.core.head import DeferralHead
from collm.decoding.candidates import Candidates, Likely, spelled
from collm.errors import ConfigError, MismatchError
from collm.models.guards import PROBE, TokenizerIdentity
from collm.models.members import author_name
from collm.vllm import THRESHOLD
from collm.vllm.endpoint import Endpoint
from collm.vllm.export_manifest import defer_names
from collm.vllm.servers import Servers

T = TypeVar("T")
Opened = TypeVar("Opened", bound="Connections")
_PROBE: dict[str, Any] = {"prompt": [0], "temperature": 0, "logprobs": 0}
_LEAST_LOGPROB = -1e3
"""Of the row of zeros; vLLM writes what was ruled out as -9999."""
_IDLE_S = 3.0
"""Less than the five seconds after which vLLM closes a connection that nobody uses, lest a request meet that."""


def _among_tokens(likely: Likely, vocab_size: int) -> Likely:
    """Without what is no token, and without its share."""
    left = 1 - sum(prob for token_id, prob in likely if token_id >= vocab_size)
    return [(token_id, prob / left) for token_id, prob in likely if token_id < vocab_size]


class Connections:
    """Servers of base and assistants, with one pool of connections; a context manager, or `close` it.

    Nothing is left of one that was forgotten, either.

    Args:
        servers: where they are, and how patiently they are asked.
        urls: of each author, the base's first.
        tokenizer: of all models.

    Attributes:
        authors: an `Endpoint` for each author.
        vocab_size: ids that all models share.

    Raises:
        ConfigError: no key where one was named.
        LoadError: a server is not up in time or serves something else.
        MismatchError: a server does not hold what the collaboration names.
    """

    def __init__(self, servers: Servers, urls: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
        self.servers = servers
        vocab_size = TokenizerIdentity.of(tokenizer).vocab_size
        self.authors = [
            Endpoint(author_name(author, len(urls) - 1), url, servers, vocab_size) for author, url in enumerate(urls)
        ]
        self.vocab_size = vocab_size
        limits = httpx.Limits(max_connections=None, keepalive_expiry=_IDLE_S)
        self.client = httpx.AsyncClient(headers=servers.headers, timeout=servers.timeout_s, limits=limits)
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=_serve, args=(self._loop,), name="collm-vllm", daemon=True)
        thread.start()
        self._ending = weakref.finalize(self, _end, self._loop, thread, self.client)
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
        """Break off what is asked, close the connections and end the thread; once is enough."""
        self._ending()

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Do something in the loop's thread.

        Raises:
            ConfigError: the fleet was closed.
        """
        if not self._ending.alive:
            work.close()
            raise ConfigError("the connections to the servers were closed; load the collaboration again")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """As `start`, and wait for it."""
        future = self.start(work)
        try:
            return future.result()
        finally:
            future.cancel()

    async def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Wait for the servers and see what they hold."""
        raise NotImplementedError

    def candidates(
        self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], token_ids: Sequence[int], most: int
    ) -> list[list[Candidates]]:
        """As `decoding.candidates.top_candidates`, by the servers' log-probabilities of a prompt.

        Raises:
            ConfigError: the servers do not say.
            ModelFailure: a server refuses, or answers with something else.
        """
        raise NotImplementedError

    async def check_tokens(self, author: Endpoint, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise a MismatchError for a server that splits text into other tokens."""
        theirs = await author.tokenize(self.client, PROBE)
        if theirs is not None and theirs != tokenizer(PROBE, add_special_tokens=False)["input_ids"]:
            raise MismatchError(
                f"{author.name} at {author.url} serves {author.model!r}, which splits a text into other tokens; "
                "serve the model that the collaboration names"
            )


class Fleet(Connections):
    """A server for each author.

    Args:
        servers: where they are.
        head: of the collaboration; the base's server must hold this very one.
        tokenizer: of all models.

    Attributes:
        defer_ids: tokens by which the base's server says that it defers, of assistants 1..K.
        zero_id: the token whose logit is 0.
        biases: b_1..b_K.

    Raises:
        ConfigError: not one server for each author, or as of `Connections`.
        LoadError: as of `Connections`.
        MismatchError: likewise, or the base's server has no plug-in.
    """

    def __init__(self, servers: Servers, head: DeferralHead, tokenizer: PreTrainedTokenizerBase) -> None:
        servers.check_count(head.num_assistants)
        self.biases = head.bias.detach().float().tolist()
        self._names = defer_names(head)
        super().__init__(servers, servers.urls, tokenizer)

    def candidates(
        self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], token_ids: Sequence[int], most: int
    ) -> list[list[Candidates]]:
        """As of `Connections`.

        Rows of the head that are among the base's likeliest are left out and their share with them; rarer ones stay in
        its normaliser.
        """
        if not token_ids:
            return []
        by_author = self.run(self._likely([*prompt_ids, *token_ids], len(token_ids), most))
        return spelled(tokenizer, prompt_ids, token_ids, by_author)

    async def _likely(self, token_ids: list[int], count: int, most: int) -> list[list[Likely]]:
        wanted = most + 1 + len(self.defer_ids)
        asked = [author.likely(self.client, token_ids, count, wanted) for author in self.authors]
        said = await _together(asked)
        return [[_among_tokens(one, self.vocab_size)[:most] for one in of_author] for of_author in said]

    async def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        deadline = time.monotonic() + self.servers.wait_s
        await _together([author.find(self.client, deadline) for author in self.authors])
        for author in self.authors:
            await self.check_tokens(author, tokenizer)
        base, *assistants = self.authors
        rows = [await base.tokenize(self.client, name) for name in self._names]
        if any(row is None or len(row) != 1 or row[0] < self.vocab_size for row in rows):
            raise MismatchError(
                f"the base at {base.url} serves {base.model!r}, which is no export of this collaboration's base and "
                "head; serve what 'collm export vllm' writes now"
            )
        *self.defer_ids, self.zero_id = (row[0] for row in rows if row)
        base.vocab_size = self.zero_id + 1  # deferrals come as tokens
        await self._check_plugin(base)
        await _together([assistant.one(self.client, _PROBE) for assistant in assistants])

    async def _check_plugin(self, base: Endpoint) -> None:
        asked = {**_PROBE, "logprob_token_ids": [*self.defer_ids, self.zero_id]}
        always = await base.one(self.client, {**asked, "vllm_xargs": {THRESHOLD: -1}})
        never = await base.one(self.client, {**asked, "vllm_xargs": {THRESHOLD: 1}})
        if always.token_id not in self.defer_ids or never.token_id >= self.vocab_size:
            raise MismatchError(
                f"the base at {base.url} does not defer: its vLLM has no collm plug-in; install it there with "
                "'pip install --no-deps collm' and start the server again"
            )
        if any(token not in never.about for token in [*self.defer_ids, self.zero_id]):
            raise MismatchError(
                f"the base at {base.url} does not say how likely it defers; it must support logprob_token_ids, as "
                "vLLM does"
            )
        if not _LEAST_LOGPROB < never.about[self.zero_id] < 0:
            raise MismatchError(
                f"the base at {base.url} gives logits or processed values as log-probabilities; start its vLLM with "
                "the default --logprobs-mode (raw_logprobs)"
            )


async def _together(works: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results; the first failure ends them all."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


def _end(loop: asyncio.AbstractEventLoop, thread: threading.Thread, client: httpx.AsyncClient) -> None:
    """End the thread; not waiting for it where it is the one that dropped the fleet's last reference."""
    asyncio.run_coroutine_threadsafe(_finish(loop, client), loop)
    if threading.current_thread() is not thread:
        thread.join()


async def _finish(loop: asyncio.AbstractEventLoop, client: httpx.AsyncClient) -> None:
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    try:
        await asyncio.gather(*tasks, return_exceptions=True)
        await client.aclose()
        await loop.shutdown_asyncgens()
    finally:
        loop.stop()
