"""Connections to the servers of a collaboration, and a sequence that is decoded on them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from collections.abc import Sequence as ListOf
from contextlib import aclosing
from typing import Any, ClassVar, TypeVar

from transformers import PreTrainedTokenizerBase

from collm.core.params import SamplingParams
from collm.core.types import author_name
from collm.engine.candidates import Candidates
from collm.engine.engine import RequestOutput
from collm.engine.request import Request
from collm.engine.sequence import Decision, Sequence
from collm.errors import ConfigError, MismatchError
from collm.http.client import CircuitBreaker
from collm.http.loop import LoopThread
from collm.text.guards import PROBE, TokenizerIdentity
from collm.vllm.endpoint import Endpoint, GeneratedToken
from collm.vllm.servers import Servers

Opened = TypeVar("Opened", bound="Connections")
_LEAST_TEMPERATURE = 0.01
"""vLLM raises lower temperatures to this one."""


class Run:
    """A sequence that is decoded on the servers of `authors`. `report` is called with each output.

    Attributes:
        refused: for each author, counts calls for this sequence that failed although the server answers.
    """

    def __init__(self, sequence: Sequence, authors: ListOf[Endpoint], report: Callable[[RequestOutput], None]) -> None:
        self.sequence = sequence
        self.params = sequence.request.params
        self.policy = sequence.request.policy
        self.refused = [CircuitBreaker() for _ in authors]
        self._authors = authors
        self._report = report
        self._known = [0] * len(authors)  # tokens of the sequence that each server has read or written

    async def one(self, author: int, body: dict[str, Any]) -> GeneratedToken:
        """Request the next token."""
        self._read(author)
        return await self._authors[author].one(body)

    async def stream(
        self, author: int, body: dict[str, Any], *, resumable: bool = True
    ) -> AsyncGenerator[GeneratedToken, None]:
        """Stream the tokens of one call."""
        self._read(author)
        async with aclosing(self._authors[author].stream(body, resumable=resumable)) as pieces:
            async for piece in pieces:
                for written in piece:
                    yield written

    def _read(self, author: int) -> None:
        length = len(self.sequence.token_ids)
        self._authors[author].usage.tokens_read += length - self._known[author]
        self._known[author] = length

    def body(self) -> dict[str, Any]:
        """Build the part of a request that all authors share. It leaves nothing to the generation config of a model."""
        params = self.params
        body: dict[str, Any] = {
            "prompt": list(self.sequence.token_ids),
            "max_tokens": self.sequence.draft_limit + 1,
            "temperature": params.temperature,
            "repetition_penalty": params.repetition_penalty,
            "presence_penalty": params.presence_penalty,
            "frequency_penalty": params.frequency_penalty,
            "logprobs": 0,
            "ignore_eos": True,  # the text ends at `stop_token_ids`, whatever the model's EOS is
            "stop_token_ids": sorted(self.sequence.end_ids),
        }
        if params.temperature > 0:
            body |= {"top_p": params.top_p, "top_k": params.top_k, "min_p": 0.0}
        return body

    def emit(self, decision: Decision) -> None:
        """Add a decision and report the tokens that became final."""
        sequence = self.sequence
        sequence.decisions.append(decision)
        for step in sequence.advance():
            self._authors[step.author].usage.tokens_written += 1
            self._known[step.author] = len(sequence.token_ids)
            completion = sequence.completion() if sequence.finish_reason is not None else None
            self._report(RequestOutput(sequence.number, step, completion))


class Connections:
    """Connections to the servers of base and assistants, and how sequences are decoded there.

    Use it as a context manager, or call `close`. The connections are also closed when the object is garbage-collected.

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

    LOCAL_ONLY: ClassVar[ListOf[str]]
    """Parameters that are only available with models in memory."""

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

    def __enter__(self: Opened) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Wait for the servers and check which models they hold."""
        raise NotImplementedError

    async def advance(self, run: Run) -> None:
        """Request the next tokens of a sequence."""
        raise NotImplementedError

    def check_request(self, request: Request) -> None:
        """Raise a ConfigError if the servers do not support the policy or a parameter of a request."""
        raise NotImplementedError

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
        raise NotImplementedError

    async def check_tokens(self, author: Endpoint, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise a MismatchError if a server tokenizes text differently than the collaboration does."""
        theirs = await author.tokenize(PROBE)
        if theirs is not None and theirs != tokenizer(PROBE, add_special_tokens=False)["input_ids"]:
            raise MismatchError(
                f"{author.http.where} serves {author.model!r}, which tokenizes text differently; "
                "serve the model that the collaboration names"
            )
