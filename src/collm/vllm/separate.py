"""Decoding on one server for each author: the base writes until it defers, then an assistant writes one token."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence as ListOf
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from collm.core.head import DeferralHead, defer_probs
from collm.core.policies import PricePolicy, SingleAuthorPolicy, ThresholdPolicy, ThresholdRule
from collm.core.types import BASE
from collm.engine.candidates import Candidates, Likely, spelled
from collm.engine.decision import Draw
from collm.engine.request import Request
from collm.engine.sequence import Sequence
from collm.errors import ConfigError, MismatchError, ModelFailure
from collm.http.client import Unreachable
from collm.http.loop import gather
from collm.vllm import ROW_SCALE, THRESHOLD
from collm.vllm.connections import Connections, Run
from collm.vllm.endpoint import Endpoint, GeneratedToken
from collm.vllm.export import check_rows, defer_names
from collm.vllm.servers import Servers

_PROBE: dict[str, Any] = {"prompt": [0], "temperature": 0, "logprobs": 0}
_LEAST_LOGPROB = -1e3
"""Lower limit for the row of zeros. vLLM reports tokens that are ruled out with -9999."""


class AuthorConnections(Connections):
    """Connections to one server for each author.

    A request takes at most two calls for each deferral, and one more. Each change of the policy's threshold takes
    another call.

    Attributes:
        defer_ids: tokens with which the base's server reports deferrals to the assistants 1..K.
        zero_id: the token of the row of zeros, whose logit is 0.
        biases: b_1..b_K.

    Raises:
        ConfigError: there is not one server for each author.
        MismatchError: the base's server has another head or no plug-in.
        UnsupportedModel: no rows can hold the head.
        CollmError: as in `Connections`.
    """

    LOCAL_ONLY = (
        *Connections.LOCAL_ONLY,
        *("presence_penalty", "frequency_penalty", "repetition_penalty"),
        *("allowed_token_ids", "min_tokens", "logprobs"),
    )
    """These change or need logits. A text takes many calls, and a server counts only the tokens of one call."""

    def __init__(self, servers: Servers, head: DeferralHead, tokenizer: PreTrainedTokenizerBase) -> None:
        servers.check_count(head.num_assistants)
        check_rows(head)
        self.biases = head.bias.detach().float().tolist()
        self._names = defer_names(head)
        super().__init__(servers, servers.urls, tokenizer)

    # At the start

    async def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        await gather([author.find(self.servers.wait_s) for author in self.authors])
        for author in self.authors:
            await self.check_tokens(author, tokenizer)
        base, *assistants = self.authors
        rows = [await base.tokenize(name) for name in self._names]
        if any(row is None or len(row) != 1 or row[0] < self.vocab_size for row in rows):
            raise MismatchError(
                f"the {base.http.where} serves {base.model!r}, which is not an export of this collaboration's base "
                "and head; export it again with 'collm export vllm' and serve the new export"
            )
        *self.defer_ids, self.zero_id = (row[0] for row in rows if row)
        base.vocab_size = self.zero_id + 1  # the server reports deferrals as tokens
        await self._check_plugin(base)
        await gather([assistant.one(_PROBE) for assistant in assistants])

    async def _check_plugin(self, base: Endpoint) -> None:
        body = {**_PROBE, "logprob_token_ids": [*self.defer_ids, self.zero_id]}
        always = await base.one({**body, "vllm_xargs": {THRESHOLD: -1}})
        never = await base.one({**body, "vllm_xargs": {THRESHOLD: 1}})
        if always.token_id not in self.defer_ids or never.token_id >= self.vocab_size:
            problem = (
                "does not defer, because its vLLM has no collm plug-in; install collm-vllm (plugins/vllm) there and "
                "restart the server"
            )
        elif any(token not in never.about for token in [*self.defer_ids, self.zero_id]):
            problem = "does not report its defer prob; its server must support logprob_token_ids, as vLLM does"
        elif not _LEAST_LOGPROB < never.about[self.zero_id] < 0:
            problem = (
                "returns logits or processed values as log-probabilities; start its vLLM with the default "
                "--logprobs-mode (raw_logprobs)"
            )
        else:
            return
        raise MismatchError(f"the {base.http.where} {problem}")

    def check_request(self, request: Request) -> None:
        policy = request.policy
        if not isinstance(policy, ThresholdRule | SingleAuthorPolicy):
            raise ConfigError(
                f"{policy} cannot be followed across servers, because they report only what a threshold needs; use "
                "threshold, schedule, budget, random or single, without a judge"
            )
        if isinstance(policy, PricePolicy) and len(policy.prices) > 1:
            raise ConfigError(f"{policy} cannot be followed across servers, which report no gains; use one price")
        if isinstance(policy, SingleAuthorPolicy) and not 0 <= policy.writer < len(self.authors):
            raise ConfigError(f"{policy} asks for author {policy.writer}, expected 0 to {len(self.authors) - 1}")

    # Candidates

    def candidates(
        self, tokenizer: PreTrainedTokenizerBase, prompt_ids: ListOf[int], token_ids: ListOf[int], most: int
    ) -> list[list[Candidates]]:
        """Rows of the head among the base's most probable entries are left out, and the others are renormalised."""
        if not token_ids:
            return []

        async def likely() -> list[list[Likely]]:
            text, wanted = [*prompt_ids, *token_ids], most + 1 + len(self.defer_ids)
            return await gather([author.likely(text, len(token_ids), wanted) for author in self.authors])

        by_author = [[_without_rows(one, self.vocab_size)[:most] for one in each] for each in self.run(likely())]
        return spelled(tokenizer, prompt_ids, token_ids, by_author)

    # Decoding

    async def advance(self, run: Run) -> None:
        if isinstance(run.policy, SingleAuthorPolicy) and run.policy.writer != BASE:
            await self._assistant_writes(run, run.policy.writer, 1.0, self._body(run, run.policy.writer))
            return
        deferral = await self._base_writes(run)
        if deferral is not None:
            author, defer_prob = deferral
            await self._assistant_writes(run, author, defer_prob, {**self._body(run, author), "max_tokens": 1})

    async def _base_writes(self, run: Run) -> tuple[int, float] | None:
        """Let the base write until it defers, its threshold changes or the text ends. Returns a deferral, if any."""
        threshold, most = _next_threshold(run.sequence)
        async with run.stream(BASE, self._base_body(run, threshold, most)) as stream:
            async for written in stream:
                defer_prob, logprob = self._defer_prob_and_logprob(written)
                if written.token_id in self.defer_ids:
                    return self.defer_ids.index(written.token_id) + 1, defer_prob
                if run.emit(BASE, defer_prob, Draw(written.token_id, logprob)):
                    return None
        return None

    async def _assistant_writes(self, run: Run, author: int, defer_prob: float, body: dict[str, Any]) -> None:
        """Let an assistant write the next token, or the whole text. If it fails, the base may write the token."""
        endpoint = self.authors[author]
        try:
            shut_s = run.refused[author].shut_s()
            if shut_s:
                raise Unreachable(
                    f"{endpoint.name} failed too often for this text, so it is not asked for {shut_s:.0f} s"
                )
            async with run.stream(author, body) as stream:
                async for written in stream:
                    if run.emit(author, defer_prob, Draw(written.token_id, written.logprob)):
                        return
        except ModelFailure as failure:
            if not isinstance(failure, Unreachable):
                run.refused[author].failed()
            endpoint.usage.failed += 1
            if self.servers.on_failure == "fail":
                raise
            async with run.stream(BASE, self._base_body(run, 1.0, 1)) as stream:
                written = await anext(stream)
            logprob = self._defer_prob_and_logprob(written)[1]
            run.emit(author, defer_prob, Draw(written.token_id, logprob), stood_in=True)

    def _base_body(self, run: Run, threshold: float, most: int) -> dict[str, Any]:
        rows = {"logprob_token_ids": [*self.defer_ids, self.zero_id]}
        return {**self._body(run, BASE), **rows, "max_tokens": most, "vllm_xargs": {THRESHOLD: threshold}}

    def _body(self, run: Run, author: int) -> dict[str, Any]:
        body = run.body()
        if author == BASE:
            body["stop_token_ids"] = [*self.defer_ids, *body["stop_token_ids"]]
        if run.params.seed is not None:  # each call draws other numbers
            body["seed"] = random.Random(f"{run.params.seed} {len(run.sequence.steps)} {author}").getrandbits(31)
        return body

    def _defer_prob_and_logprob(self, written: GeneratedToken) -> tuple[float, float]:
        """Compute the defer prob, and the token's log-probability among tokens only.

        The server's log-probabilities share one normaliser, Z' = Z + sum_k exp r_k + n. Z sums over the tokens, r_k is
        the logit of row k, and n counts the rows of zeros. With the log-probabilities lp_0 of the row of zeros and lp_k
        of row k,

            r_k = lp_k - lp_0,  u_k = r_k / scale + b_k,  log P(x) = lp_x - log(1 - n exp lp_0 - sum_k exp lp_k).
        """
        try:
            rows = [written.about[token] for token in self.defer_ids]
            zero = written.about[self.zero_id]
        except KeyError as error:
            raise ModelFailure(
                f"the base's server did not report the log-probability of token {error}, which the defer prob needs; "
                "it must support logprob_token_ids, as vLLM does"
            ) from error
        u = torch.tensor([(row - zero) / ROW_SCALE + bias for row, bias in zip(rows, self.biases, strict=True)])
        zeros = 1 + self.defer_ids[0] - self.vocab_size
        others = zeros * math.exp(zero) + sum(map(math.exp, rows))
        return float(defer_probs(u)), written.logprob - math.log1p(-min(others, 1 - 1e-12))


def _without_rows(likely: Likely, vocab_size: int) -> Likely:
    """Drop entries beyond the vocabulary and divide the other probabilities by the remaining probability."""
    left = 1 - sum(prob for token_id, prob in likely if token_id >= vocab_size)
    return [(token_id, prob / left) for token_id, prob in likely if token_id < vocab_size]


def _next_threshold(sequence: Sequence) -> tuple[float, int]:
    """The threshold of the next position, and for how many positions it stays the same if none is deferred."""
    policy, start, most = sequence.request.policy, len(sequence.steps), sequence.draft_limit + 1
    if isinstance(policy, SingleAuthorPolicy | ThresholdPolicy):
        return (policy.threshold if isinstance(policy, ThresholdPolicy) else 1.0), most
    rule = cast(ThresholdRule, policy)

    def at(position: int) -> float:
        return rule.threshold_at(position, sequence.deferred, sequence.uniform(position, 0))

    threshold = at(start)
    return threshold, next((n for n in range(1, most) if at(start + n) != threshold), most)
