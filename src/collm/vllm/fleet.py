"""All servers of a collaboration: checked once, then asked from one event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
import time
from asyncio import gather
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # so named in all its versions
from transformers import PreTrainedTokenizerBase

from collm.core.head import DeferralHead
from collm.decoding.candidates import Candidates, Likely, spelled
from collm.errors import MismatchError
from collm.models.guards import PROBE, TokenizerIdentity
from collm.models.members import author_name
from collm.vllm import THRESHOLD
from collm.vllm.endpoint import Endpoint
from collm.vllm.note import defer_names
from collm.vllm.servers import Servers

T = TypeVar("T")


def _among_tokens(likely: Likely, vocab_size: int) -> Likely:
    """Without what is no token, and without its share."""
    left = 1 - sum(prob for token_id, prob in likely if token_id >= vocab_size)
    return [(token_id, prob / left) for token_id, prob in likely if token_id < vocab_size]


class Fleet:
    """The servers of base and assistants, with one pool of connections.

    Args:
        servers: where they are.
        head: of the collaboration; the base's server must hold this very one.
        tokenizer: of all models.

    Attributes:
        authors: an `Endpoint` for each author, the base's first.
        defer_ids: tokens by which the base's server says that it defers, of assistants 1..K.
        zero_id: the token whose logit is 0.
        biases: b_1..b_K.

    Raises:
        ConfigError: not one server for each author, or no key where one was named.
        LoadError: a server is not up in time or serves something else.
        MismatchError: a server has another vocabulary, or the base's another head or no plug-in.
    """

    def __init__(self, servers: Servers, head: DeferralHead, tokenizer: PreTrainedTokenizerBase) -> None:
        servers.check_count(head.num_assistants)
        self.servers = servers
        self.biases = head.bias.detach().float().tolist()
        self._names = defer_names(head)
        vocab_size = TokenizerIdentity.of(tokenizer).vocab_size
        self.authors = [
            Endpoint(author_name(author, head.num_assistants), url, servers, vocab_size)
            for author, url in enumerate(servers.urls)
        ]
        self.vocab_size = vocab_size
        self.client = httpx.AsyncClient(
            headers=servers.headers, timeout=None, limits=httpx.Limits(max_connections=None)
        )
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, name="collm-vllm", daemon=True).start()
        self.run(self._check(tokenizer))

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do something in the loop's thread and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def candidates(
        self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], token_ids: Sequence[int], most: int
    ) -> list[list[Candidates]]:
        """As `decoding.candidates.top_candidates`, by the servers' log-probabilities of a prompt.

        Rows of the head that are among the base's likeliest are left out and their share with them; rarer ones stay in
        its normaliser.

        Raises:
            ModelFailure: a server refuses, or answers with something else.
        """
        if not token_ids:
            return []
        by_author = self.run(self._likely([*prompt_ids, *token_ids], len(token_ids), most))
        return spelled(tokenizer, prompt_ids, token_ids, by_author)

    async def _likely(self, token_ids: list[int], count: int, most: int) -> list[list[Likely]]:
        wanted = most + 1 + len(self.defer_ids)
        asked = (author.likely(self.client, token_ids, count, wanted) for author in self.authors)
        return [[_among_tokens(one, self.vocab_size)[:most] for one in of_author] for of_author in await gather(*asked)]

    async def _check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        deadline = time.monotonic() + self.servers.wait_s
        await gather(*(author.find(self.client, deadline) for author in self.authors))
        probe = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
        for author in self.authors:
            theirs = await author.tokenize(self.client, PROBE)
            if theirs is not None and theirs != probe:
                raise MismatchError(
                    f"{author.name} at {author.url} serves {author.model!r}, which splits a text into other tokens; "
                    "serve the model that the collaboration names"
                )
        base = self.authors[0]
        rows = [await base.tokenize(self.client, name) for name in self._names]
        if any(row is None or len(row) != 1 or row[0] < self.vocab_size for row in rows):
            raise MismatchError(
                f"the base at {base.url} serves {base.model!r}, which is no export of this collaboration's base and "
                "head; serve what 'collm export vllm' writes now"
            )
        *self.defer_ids, self.zero_id = (row[0] for row in rows if row)
        base.vocab_size = self.zero_id + 1  # deferrals come as tokens
        await self._check_plugin(base)

    async def _check_plugin(self, base: Endpoint) -> None:
        body = {"prompt": [0], "max_tokens": 1, "temperature": 0, "logprobs": 0}
        always = await base.one(self.client, {**body, "vllm_xargs": {THRESHOLD: -1}})
        never = await base.one(self.client, {**body, "vllm_xargs": {THRESHOLD: 1}})
        if always.token_id not in self.defer_ids or never.token_id >= self.vocab_size:
            raise MismatchError(
                f"the base at {base.url} does not defer: its vLLM has no collm plug-in; install it there with "
                "'pip install --no-deps collm' and start the server again"
            )
