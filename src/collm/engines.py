"""Decoding backends of a collaboration: models in memory, or servers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Literal, Protocol, cast, get_args

from torch import nn
from transformers import PreTrainedTokenizerBase

from collm.core.head import DeferralHead
from collm.core.params import SamplingParams
from collm.core.types import PromptLogprob, author_name
from collm.engine.cache_memory import cache_bytes, share_cache_memory
from collm.engine.candidates import Candidates, top_candidates
from collm.engine.chunks import Chunks
from collm.engine.engine import LOOKAHEAD, MAX_WAIT, DecodingLoop, Engine
from collm.engine.logits_processors import bad_word_tokens
from collm.engine.prompt_logprobs import prompt_logprobs
from collm.engine.request import check_params, check_segment_params
from collm.engine.runner import ModelRunner
from collm.errors import ConfigError, MismatchError
from collm.models.language_model import LanguageModel
from collm.models.loading import ModelSpec, empty_model, saved_eos_ids
from collm.models.members import Member, load_members
from collm.models.tools import ToolModel, ToolRunner
from collm.text.alignment import Alignment
from collm.text.grammars import Grammars
from collm.text.guards import TokenizerIdentity, check_eos
from collm.vllm.endpoint import Endpoint
from collm.vllm.engine import ServerEngine
from collm.vllm.one_engine import EngineConnection
from collm.vllm.separate import AuthorConnections
from collm.vllm.servers import Servers

EngineName = Literal["local", "vllm"]


class Backend(Protocol):
    """Interface of backends."""

    @property
    def runners(self) -> Sequence[ModelRunner | ToolRunner | Endpoint]:
        """The runners of all authors, the base first, with their usage."""

    def engine(self, max_batch: int, lookahead: int | None, max_wait: int | None) -> DecodingLoop:
        """Create a decoding loop; arguments as in `CoLLM.engine`."""

    def candidates(self, prompt_ids: Sequence[int], token_ids: Sequence[int], most: int) -> Chunks[list[Candidates]]:
        """Each author's most probable tokens at each token, as in `engine.candidates.top_candidates`."""

    def prompt_logprobs(self, prompt_ids: Sequence[int], most: int, author: int | None) -> Chunks[PromptLogprob | None]:
        """Log-probabilities of a text's tokens, as in `engine.prompt_logprobs.prompt_logprobs`."""

    def check_params(self, params: SamplingParams) -> None:
        """Check that requests with these parameters can be decoded, as in `CoLLM.check_params`."""

    def weights_per_token(self, author: int) -> int:
        """Number of an author's weights in matrix products per token; 0 for a tool."""


class InMemory:
    """Backend with models in this process, loaded on first use.

    Args:
        members: the base, then the assistants.
        head: the deferral head.
        tokenizer: the tokenizer of all members.
        stop_ids: tokens that end a text besides EOS.
        accept_differences, eager, cache_memory: as in `CoLLM`.
        alignment: alignment of members with different tokenizers; `tokenizer` and `stop_ids` are then the base's.
    """

    def __init__(
        self,
        members: Sequence[Member],
        head: DeferralHead,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop_ids: Collection[int] = (),
        accept_differences: Collection[str] = (),
        alignment: Alignment | None = None,
        eager: bool = False,
        cache_memory: str | int | None = None,
    ) -> None:
        self._given = members
        self._head = head
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._accept_differences = accept_differences
        self._alignment = alignment
        self._eager = eager
        self._cache_memory = cache_memory
        cache_bytes(cache_memory)

    @cached_property
    def members(self) -> list[LanguageModel | ToolModel]:
        """Load all members and check that they match.

        Raises:
            LoadError: a model cannot be loaded.
            MismatchError: the members do not match.
        """
        vocab_size = TokenizerIdentity.of(self._tokenizer).vocab_size
        models = load_members(self._given, self._tokenizer, vocab_size=vocab_size, alignment=self._alignment)
        base = cast(LanguageModel, models[0])
        if base.hidden_size != self._head.hidden_size:
            raise MismatchError(
                f"the head expects hidden states of size {self._head.hidden_size}, the base has {base.hidden_size}; "
                "this head belongs to another base"
            )
        self._head.to(base.device)
        return models

    @cached_property
    def runners(self) -> list[ModelRunner | ToolRunner]:
        static = False if self._eager else None
        runners = [
            ModelRunner(member, static=static) if isinstance(member, LanguageModel) else ToolRunner(member)
            for member in self.members
        ]
        share_cache_memory([one for one in runners if isinstance(one, ModelRunner)], self._cache_memory)
        return runners

    @cached_property
    def _eos_ids(self) -> frozenset[int]:
        members = self.members if self._alignment is None else self.members[:1]
        named = [(model.name, model.eos_token_ids) for model in members if isinstance(model, LanguageModel)]
        return _eos_ids(named, self._tokenizer, self._accept_differences).union(self._stop_ids)

    @cached_property
    def grammars(self) -> Grammars:
        return Grammars(self._tokenizer, TokenizerIdentity.of(self._tokenizer).vocab_size, self._eos_ids)

    def engine(self, max_batch: int, lookahead: int | None, max_wait: int | None) -> Engine:
        base, *assistants = self.runners
        for member, runner in zip(self._given, self.runners, strict=True):
            if isinstance(member, nn.Module):  # its weights may have changed since the last call
                runner.forget()
            if isinstance(runner, ModelRunner):
                runner.prepare(max_batch)
        return Engine(
            cast(ModelRunner, base),
            assistants,
            self._head,
            self._tokenizer,
            eos_ids=self._eos_ids,
            grammars=self.grammars,
            alignment=self._alignment,
            max_batch=max_batch,
            lookahead=LOOKAHEAD if lookahead is None else lookahead,
            max_wait=MAX_WAIT if max_wait is None else max_wait,
        )

    def candidates(self, prompt_ids: Sequence[int], token_ids: Sequence[int], most: int) -> Chunks[list[Candidates]]:
        return top_candidates(self.runners, self._tokenizer, prompt_ids, token_ids, most)

    def prompt_logprobs(self, prompt_ids: Sequence[int], most: int, author: int | None) -> Chunks[PromptLogprob | None]:
        return prompt_logprobs(self.runners, self._head, prompt_ids, most, author)

    def check_params(self, params: SamplingParams) -> None:
        check_params(params, TokenizerIdentity.of(self._tokenizer).vocab_size)
        if self._alignment is not None:
            check_segment_params(params)
        bad_word_tokens(self._tokenizer, tuple(params.bad_words))  # is cached, as the decoding loop needs it at once
        if params.structured_outputs is not None:
            self.grammars.compile(params.structured_outputs, trusted=False)

    def weights_per_token(self, author: int) -> int:
        member = self.members[author]
        return member.weights_per_token if isinstance(member, LanguageModel) else 0


class OnServers:
    """Backend with a server for each author, or one engine with base and assistant. No model is loaded in this process.

    Args:
        servers: the servers.
        members, head, tokenizer, stop_ids, accept_differences: as in `InMemory`.

    Raises:
        ConfigError: there is not one server per author, or an assistant is a tool.
    """

    def __init__(
        self,
        servers: Servers,
        members: Sequence[Member],
        head: DeferralHead,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop_ids: Collection[int] = (),
        accept_differences: Collection[str] = (),
    ) -> None:
        self._in_one = servers.are_one(len(members) - 1)
        if not self._in_one:
            servers.check_count(len(members) - 1)
        tools = [one for one in members if not isinstance(one, ModelSpec | nn.Module)]
        if tools:
            raise ConfigError(f"the assistant {tools[0]} is a tool, which servers cannot run; use engine 'local'")
        self._servers = servers
        self._given = cast("Sequence[ModelSpec | nn.Module]", members)
        self._head = head
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._accept_differences = accept_differences

    @cached_property
    def connections(self) -> AuthorConnections | EngineConnection:
        """Connect to the servers and check them.

        Raises:
            ConfigError, LoadError, MismatchError: as in `AuthorConnections` or `EngineConnection`.
        """
        kind = EngineConnection if self._in_one else AuthorConnections
        return kind(self._servers, self._head, self._tokenizer)

    @property
    def runners(self) -> Sequence[Endpoint]:
        return self.connections.authors

    @cached_property
    def _eos_ids(self) -> frozenset[int]:
        named = [
            (
                author_name(author),
                saved_eos_ids(one) if isinstance(one, ModelSpec) else LanguageModel(one, name="").eos_token_ids,
            )
            for author, one in enumerate(self._given)
        ]
        return _eos_ids(named, self._tokenizer, self._accept_differences).union(self._stop_ids)

    def engine(self, max_batch: int, lookahead: int | None, max_wait: int | None) -> ServerEngine:
        for name, value in {"lookahead": lookahead, "max_wait": max_wait}.items():
            if value is not None:
                raise ConfigError(f"{name}={value} has no effect across servers; leave it out")
        return ServerEngine(self.connections, self._tokenizer, eos_ids=self._eos_ids, max_batch=max_batch)

    def candidates(self, prompt_ids: Sequence[int], token_ids: Sequence[int], most: int) -> Chunks[list[Candidates]]:
        yield self.connections.candidates(self._tokenizer, prompt_ids, token_ids, most)

    def prompt_logprobs(self, prompt_ids: Sequence[int], most: int, author: int | None) -> Chunks[PromptLogprob | None]:
        raise ConfigError("log-probabilities of a prompt are not available across servers; use engine 'local'")

    def check_params(self, params: SamplingParams) -> None:
        check_params(params, self.connections.vocab_size)
        self.connections.check_params(params)

    def weights_per_token(self, author: int) -> int:
        member = self._given[author]
        module = empty_model(member) if isinstance(member, ModelSpec) else member
        return LanguageModel(module, name="").weights_per_token


def check_engine(engine: EngineName | None, servers: Servers | None) -> None:
    """Raise a ConfigError if the engine is unknown, or if `servers` does not match it."""
    if engine not in (None, *get_args(EngineName)):
        raise ConfigError(f"engine is {engine!r}, expected one of {', '.join(get_args(EngineName))}")
    if engine == "local" and servers is not None:
        raise ConfigError("servers have no effect with engine 'local'; leave out the servers or the engine")
    if engine == "vllm" and servers is None:
        raise ConfigError("engine 'vllm' requires servers; pass their addresses, the base's first")


def _eos_ids(
    named: list[tuple[str, frozenset[int]]], tokenizer: PreTrainedTokenizerBase, accept: Collection[str]
) -> frozenset[int]:
    """EOS token ids of the tokenizer and of all models, which must agree."""
    model_eos_ids = check_eos(named, accept=accept)
    eos = cast("int | None", tokenizer.eos_token_id)
    return model_eos_ids if eos is None else model_eos_ids | {eos}
