"""Decoding on one vLLM engine that holds base and assistant (`inline`). A completion is one request."""

from __future__ import annotations

import math
from typing import Any

from transformers import PreTrainedTokenizerBase

from collm.core.head import DeferralHead
from collm.core.named import name_of
from collm.core.policies import SingleAuthorPolicy, ThresholdPolicy
from collm.core.types import BASE
from collm.engine.decision import Draw
from collm.engine.request import Request
from collm.errors import ConfigError, MismatchError, ModelFailure
from collm.vllm import AUTHORS, HEAD, POLICY, author_of
from collm.vllm.connections import Connections, Run
from collm.vllm.drafting import check_policy
from collm.vllm.endpoint import GeneratedToken
from collm.vllm.export import head_digest
from collm.vllm.servers import Servers

_ASSISTANT = 1
_PROBE: dict[str, Any] = {"prompt": [0], "temperature": 0, "logprobs": 1}


class EngineConnection(Connections):
    """Connection to the server of an engine that holds base and assistant, and applies the policy itself.

    Raises a MismatchError if the server is not an engine of this collaboration, and what `Connections` raises.
    """

    def __init__(self, servers: Servers, head: DeferralHead, tokenizer: PreTrainedTokenizerBase) -> None:
        self.head = head_digest(head)
        super().__init__(servers, [*servers.urls] * 2, tokenizer)

    async def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        base, assistant = self.authors
        await assistant.find(self.servers.wait_s)
        base.model, base.max_length = assistant.model, assistant.max_length
        await self.check_tokens(assistant, tokenizer)
        for author in (BASE, _ASSISTANT):
            try:
                body = {**_PROBE, "vllm_xargs": {POLICY: f"single:writer={author}", AUTHORS: 1, HEAD: self.head}}
                writer = author_and_defer_prob(await assistant.one(body))[0]
            except ModelFailure as failure:
                raise MismatchError(
                    f"the server at {assistant.url} holds no engine of this collaboration ({failure}); start one with "
                    "'collm launch', or give a server for each author"
                ) from failure
            if writer != author:
                raise MismatchError(f"the server at {assistant.url} let author {writer} write, expected {author}")

    def check_request(self, request: Request) -> None:
        check_policy(request.policy)
        if name_of(request.policy) is None:
            raise ConfigError(
                f"{request.policy} has no name, so it cannot be sent to another process; use engine 'local'"
            )

    async def advance(self, run: Run) -> None:
        params, top = run.params, run.params.logprobs or 0
        body = run.body()
        body |= {"min_tokens": params.min_tokens, "allowed_token_ids": params.allowed_token_ids, "seed": params.seed}
        body["logprobs"] = 1 + top  # one of them describes the author
        body["vllm_xargs"] = {POLICY: name_of(run.policy), AUTHORS: 1, HEAD: self.head}
        resumable = isinstance(run.policy, ThresholdPolicy | SingleAuthorPolicy)
        async with run.stream(_ASSISTANT, body, resumable=resumable) as stream:
            async for written in stream:
                author, defer_prob = author_and_defer_prob(written)
                own, _, *others = written.about.items()
                likely = sorted([own, *others], key=lambda pair: -pair[1])[:top]
                if run.emit(author, defer_prob, Draw(written.token_id, written.logprob, tuple(likely))):
                    return


def author_and_defer_prob(written: GeneratedToken) -> tuple[int, float]:
    """Read the author and the defer prob from the entry after the token's own log-probability (`AUTHORS`)."""
    if len(written.about) < 2:
        raise ModelFailure(f"the server did not report the author of token {written.token_id}")
    token_id, log_defer_prob = list(written.about.items())[1]
    return author_of(token_id), math.exp(log_defer_prob)
