"""Decoding on one engine of vLLM that holds base and assistant (`inline`): a completion is one request."""

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
from collm.decoding.candidates import Candidates
from collm.decoding.draws import Draw
from collm.decoding.request import Request
from collm.decoding.sequence import Decision
from collm.errors import ConfigError, MismatchError, ModelFailure
from collm.vllm import AUTHORS, HEAD, POLICY, author_of
from collm.vllm.answers import Written
from collm.vllm.drafting import check_policy
from collm.vllm.engine import Run, ServerEngine, check_local_params, check_temperature
from collm.vllm.export_manifest import head_digest
from collm.vllm.fleet import Connections
from collm.vllm.servers import Servers

_ASSISTANT = 1
LOCAL_ONLY = ("min_p", "logit_bias", "bad_words", "structured_outputs", "prompt_logprobs")
"""Parameters that vLLM does not combine with drafts, or the base cannot follow."""
_PROBE: dict[str, Any] = {"prompt": [0], "temperature": 0, "logprobs": 1}


class EngineConnection(Connections):
    """The server of an engine that holds base and assistant.

    Args:
        servers: its address, and how patiently it is asked.
        head: of the collaboration; the engine must hold this very one.
        tokenizer: of both models.

    Raises:
        ConfigError, LoadError: as of `Connections`.
        MismatchError: likewise, or it is another server.
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
                asked = {**_PROBE, "vllm_xargs": {POLICY: policy, AUTHORS: 1, HEAD: self.head}}
                said = author_and_defer_prob(await assistant.one(self.client, asked))[0]
            except ModelFailure as failure:
                raise MismatchError(
                    f"the server at {assistant.url} holds no engine of this collaboration ({failure}); start one with "
                    "'collm launch', or name a server for each author"
                ) from failure
            if said != author:
                raise MismatchError(f"the server at {assistant.url} let author {said} write, expected {author}")

    def candidates(
        self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], token_ids: Sequence[int], most: int
    ) -> list[list[Candidates]]:
        raise ConfigError("what each author would have written is not available in one engine; use engine 'local'")


class OneEngine(ServerEngine[EngineConnection]):
    """Decodes on one engine, which drafts with the base and follows the rule by itself."""

    def check_request(self, request: Request) -> None:
        check_policy(request.policy)
        if name_of(request.policy) is None:
            raise ConfigError(f"{request.policy} has no name by which another process knows it; use engine 'local'")
        check_local_params(request.params, LOCAL_ONLY)
        check_temperature(request.params)

    async def go_on(self, run: Run) -> None:
        sequence = run.sequence
        policy, params = sequence.request.policy, sequence.request.params
        body = self.body(run)
        body["logprobs"] = 1 + (params.logprobs or 0)  # who wrote it is one of them
        body |= {"min_tokens": params.min_tokens, "allowed_token_ids": params.allowed_token_ids, "seed": params.seed}
        body["vllm_xargs"] = {POLICY: name_of(policy), AUTHORS: 1, HEAD: self.connections.head}
        resumable = isinstance(policy, ThresholdPolicy | SingleAuthorPolicy)
        async with aclosing(self.stream(run, _ASSISTANT, body, resumable=resumable)) as stream:
            async for written in stream:
                author, defer_prob = author_and_defer_prob(written)
                draw = Draw(written.token_id, written.logprob, _top(written, params.logprobs or 0))
                self.settle(run, Decision(author, defer_prob, None, draw))
                if sequence.finish_reason is not None:
                    return


def author_and_defer_prob(written: Written) -> tuple[int, float]:
    """What the engine says beside a token; by `AUTHORS` it comes after the token itself.

    Raises:
        ModelFailure: the server says something else.
    """
    beside = list(written.about.items())[1:2]
    if not beside:
        raise ModelFailure(f"the server does not say who wrote token {written.token_id}")
    ((token_id, log_defer_prob),) = beside
    return author_of(token_id), math.exp(log_defer_prob)


def _top(written: Written, count: int) -> tuple[tuple[int, float], ...]:
    """The most probable tokens, without what says who wrote it."""
    (first, *others) = written.about.items()
    known = sorted([first, *others[1:]], key=lambda pair: -pair[1])
    return tuple(known[:count])
