"""Decoding on one vLLM engine that holds base and assistant (`inline`). A completion is one request."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

from transformers import PreTrainedTokenizerBase

from collm.core.head import DeferralHead
from collm.core.named import name_of
from collm.core.policies import SingleAuthorPolicy, ThresholdPolicy
from collm.core.types import BASE
from collm.engine.candidates import Candidates
from collm.engine.request import Request
from collm.engine.sequence import Decision, Draw
from collm.errors import ConfigError, MismatchError, ModelFailure
from collm.vllm import AUTHORS, HEAD, POLICY, author_of
from collm.vllm.answers import GeneratedToken
from collm.vllm.connections import Connections
from collm.vllm.drafting import check_policy
from collm.vllm.engine import Run, ServerEngine, check_local_params, check_temperature
from collm.vllm.export import head_digest
from collm.vllm.servers import Servers

_ASSISTANT = 1
LOCAL_ONLY = ("min_p", "logit_bias", "bad_words", "structured_outputs", "prompt_logprobs")
"""Parameters that vLLM does not combine with drafts, or that the base does not support."""
_PROBE: dict[str, Any] = {"prompt": [0], "temperature": 0, "logprobs": 1}


class EngineConnection(Connections):
    """Connection to the server of an engine that holds base and assistant.

    Args:
        servers: the server's address, and settings for calls.
        head: the deferral head, which the engine must have.
        tokenizer: the tokenizer of both models.

    Raises:
        ConfigError, LoadError: as in `Connections`.
        MismatchError: as in `Connections`, or the server is not an engine of this collaboration.
    """

    def __init__(self, servers: Servers, head: DeferralHead, tokenizer: PreTrainedTokenizerBase) -> None:
        self.head = head_digest(head)
        super().__init__(servers, [*servers.urls] * 2, tokenizer)

    async def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        base, assistant = self.authors
        await assistant.find(self.client, time.monotonic() + self.servers.wait_s)
        base.model, base.max_length = assistant.model, assistant.max_length
        await self.check_tokens(assistant, tokenizer)
        for author in (BASE, _ASSISTANT):
            policy = f"single:writer={author}"
            try:
                body = {**_PROBE, "vllm_xargs": {POLICY: policy, AUTHORS: 1, HEAD: self.head}}
                writer = author_and_defer_prob(await assistant.one(self.client, body))[0]
            except ModelFailure as failure:
                raise MismatchError(
                    f"the server at {assistant.url} holds no engine of this collaboration ({failure}); start one with "
                    "'collm launch', or give a server for each author"
                ) from failure
            if writer != author:
                raise MismatchError(f"the server at {assistant.url} let author {writer} write, expected {author}")

    def candidates(
        self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], token_ids: Sequence[int], most: int
    ) -> list[list[Candidates]]:
        raise ConfigError("the candidates of each author are not available in one engine; use engine 'local'")


class OneEngine(ServerEngine[EngineConnection]):
    """Decodes on one engine, which drafts with the base and applies the policy itself."""

    def check_request(self, request: Request) -> None:
        check_policy(request.policy)
        if name_of(request.policy) is None:
            raise ConfigError(
                f"{request.policy} has no name, so it cannot be sent to another process; use engine 'local'"
            )
        check_local_params(request.params, LOCAL_ONLY)
        check_temperature(request.params)

    async def advance(self, run: Run) -> None:
        sequence = run.sequence
        policy, params = sequence.request.policy, sequence.request.params
        body = self.body(run)
        body["logprobs"] = 1 + (params.logprobs or 0)  # one of them describes the author
        body |= {"min_tokens": params.min_tokens, "allowed_token_ids": params.allowed_token_ids, "seed": params.seed}
        body["vllm_xargs"] = {POLICY: name_of(policy), AUTHORS: 1, HEAD: self.connections.head}
        resumable = isinstance(policy, ThresholdPolicy | SingleAuthorPolicy)
        async with aclosing(self.stream(run, _ASSISTANT, body, resumable=resumable)) as stream:
            async for written in stream:
                author, defer_prob = author_and_defer_prob(written)
                first, _, *others = written.about.items()  # the second describes the author
                top = sorted([first, *others], key=lambda pair: -pair[1])[: params.logprobs or 0]
                draw = Draw(written.token_id, written.logprob, tuple(top))
                self.emit(run, Decision(author, defer_prob, None, draw))
                if sequence.finish_reason is not None:
                    return


def author_and_defer_prob(written: GeneratedToken) -> tuple[int, float]:
    """Read the author and the defer prob from the entry after the token's own log-probability (`AUTHORS`).

    Raises:
        ModelFailure: the server did not report them.
    """
    entry = list(written.about.items())[1:2]
    if not entry:
        raise ModelFailure(f"the server did not report the author of token {written.token_id}")
    ((token_id, log_defer_prob),) = entry
    return author_of(token_id), math.exp(log_defer_prob)
