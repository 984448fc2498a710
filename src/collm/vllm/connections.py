"""Connections to the servers of a collaboration, and a sequence that is decoded on them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from collections.abc import Sequence as ListOf
from contextlib import aclosing
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from collm.core.params import SamplingParams
from collm.core.types import author_name
from collm.engine.candidates import Candidates
from collm.engine.decision import Decision, Draw
from collm.engine.engine import RequestOutput
from collm.engine.request import Request
from collm.engine.sequence import Sequence
from collm.errors import ConfigError, MismatchError
from collm.http.client import CircuitBreaker
from collm.http.loop import LoopThread
from collm.text.guards import PROBE, TokenizerIdentity
from collm.vllm.endpoint import Endpoint, GeneratedToken
from collm.vllm.servers import Servers

_LEAST_TEMPERATURE = 0.01
"""vLLM raises lower temperatures to this one."""


class Run:
    """A sequence that is decoded on the servers of `authors`. `report` is called with each output.

    For each author, `refused` counts calls for this sequence that failed although the server answers.
    """

    def __init__(self, sequence: Sequence, authors: ListOf[Endpoint], report: Callable[[RequestOutput], None]) -> None:
        self.sequence = sequence
        self.params, self.policy = sequence.request.params, sequence.request.policy
        self.refused = [CircuitBreaker() for _ in authors]
        self._authors = authors
        self._report = report

    def stream(
        self, author: int, body: dict[str, Any], *, resumable: bool = True
    ) -> aclosing[AsyncGenerator[GeneratedToken, None]]:
        """Stream the tokens of one call, as a context manager."""
        length = len(self.sequence.token_ids)
        self._authors[author].usage.tokens_read += length - self.sequence.num_computed[author]
        self.sequence.num_computed[author] = length
        return aclosing(self._authors[author].stream(body, resumable=resumable))

    def body(self) -> dict[str, Any]:
        """Build the part of a request that all authors share. It leaves nothing to the generation config of a model."""
        params = self.params
        body: dict[str, Any] = {
            "prompt": list(self.sequence.token_ids),
            "max_tokens": self.sequence.draft_limit + 1,
            "logprobs": 0,
            "ignore_eos": True,  # the text ends at `stop_token_ids`, whatever the model's EOS is
            "stop_token_ids": sorted(self.sequence.end_ids),
        }
        names = ["temperature", "repetition_penalty", "presence_penalty", "frequency_penalty"]
        if params.temperature > 0:
            names += ["top_p", "top_k", "min_p"]
        return body | {name: getattr(params, name) for name in names}

    def emit(self, author: int, defer_prob: float, drawn: Draw, *, stood_in: bool = False) -> bool:
        """Add a token of the author that the policy chose, or of the base in its place, and report it. Returns whether
        the text has ended.
        """
        sequence = self.sequence
        sequence.decisions.append(Decision(author, defer_prob, None, drawn, abstained=stood_in, stood_in=stood_in))
        for step in sequence.advance():
            self._authors[step.author].usage.tokens_written += 1
            sequence.num_computed[step.author] = len(sequence.token_ids)
            completion = sequence.completion() if sequence.finish_reason is not None else None
            self._report(RequestOutput(sequence.number, step, completion))
        return sequence.finish_reason is not None


class Connections:
    """Connections to the servers of base and assistants, and how sequences are decoded there.

    `close` closes them. They are also closed when the object is garbage-collected.

    Args:
        servers: settings for calls.
        urls: the URL of each author's server, the base's first.
        tokenizer: the tokenizer of all models.

    Raises:
        ConfigError: the environment variable for the API key holds no key.
        LoadError: a server is not up in time, refuses the request or serves several models.
        MismatchError: a server has another model than the collaboration names.
    """

    LOCAL_ONLY: ClassVar[ListOf[str]] = ("min_p", "logit_bias", "bad_words", "structured_outputs", "prompt_logprobs")
    """Parameters for models in memory only, because vLLM does not combine them with drafts, or the base cannot."""

    def __init__(self, servers: Servers, urls: ListOf[str], tokenizer: PreTrainedTokenizerBase) -> None:
        self.servers = servers
        self.vocab_size = TokenizerIdentity.of(tokenizer).vocab_size
        self.authors = [Endpoint(author_name(author), url, servers, self.vocab_size) for author, url in enumerate(urls)]
        self._loop = LoopThread([author.http for author in self.authors])
        self.start, self.run, self.close = self._loop.start, self._loop.run, self._loop.close
        try:
            self.run(self.check(tokenizer))
        except BaseException:
            self.close()
            raise

    async def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Wait for the servers and check which models they hold."""

    async def advance(self, run: Run) -> None:
        """Request the next tokens of a sequence."""

    def check_request(self, request: Request) -> None:
        """Raise a ConfigError if the servers do not support the policy or a parameter of a request."""

    def check_params(self, params: SamplingParams) -> None:
        """Raise a ConfigError if the servers do not support a parameter."""
        default = SamplingParams()
        name = next((name for name in self.LOCAL_ONLY if getattr(params, name) != getattr(default, name)), None)
        if name is not None:
            raise ConfigError(f"{name} is not available across servers; leave it out, or use engine 'local'")
        if 0 < params.temperature < _LEAST_TEMPERATURE:
            raise ConfigError(
                f"temperature is {params.temperature}, which servers raise to {_LEAST_TEMPERATURE}; use 0 or at least "
                f"{_LEAST_TEMPERATURE}"
            )

    def candidates(
        self, tokenizer: PreTrainedTokenizerBase, prompt_ids: ListOf[int], token_ids: ListOf[int], most: int
    ) -> list[list[Candidates]]:
        """Compute what `engine.candidates.top_candidates` does. Raises a ConfigError if the servers cannot do it."""
        raise ConfigError("the candidates of each author are not available in one engine; use engine 'local'")

    async def check_tokens(self, author: Endpoint, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise a MismatchError if a server tokenizes text differently than the collaboration does."""
        theirs = await author.tokenize(PROBE)
        if theirs is not None and theirs != tokenizer(PROBE, add_special_tokens=False)["input_ids"]:
            raise MismatchError(
                f"{author.http.where} serves {author.model!r}, which tokenizes text differently; "
                "serve the model that the collaboration names"
            )
