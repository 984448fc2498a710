"""Decoding backends of a collaboration: models in memory, or servers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol, TypedDict, cast, get_args

from torch import nn
from transformers import PreTrainedTokenizerBase

from collm.core.head import DeferralHead
from collm.core.params import SamplingParams
from collm.core.types import BASE, PromptLogprob, author_name
from collm.engine.cache_memory import cache_bytes, share_cache_memory
from collm.engine.candidates import Candidates, top_candidates
from collm.engine.chunks import Chunks
from collm.engine.engine import DecodingLoop, Engine, EngineConfig
from collm.engine.llama_runner import LlamaRunner
from collm.engine.logits_processors import bad_word_tokens
from collm.engine.prompt_logprobs import prompt_logprobs
from collm.engine.request import check_params, check_segment_params
from collm.engine.runner import ModelRunner
from collm.engine.shared_pass import SharedPass, shared_passes
from collm.engine.slot_table import SlotTable
from collm.errors import ConfigError, MismatchError
from collm.models.language_model import LanguageModel
from collm.models.llama import LlamaModel
from collm.models.loading import ModelSpec, empty_model
from collm.models.members import Member, Model, eos_ids_of, load_members
from collm.models.tools import ToolModel, ToolRunner
from collm.text.alignment import Alignment
from collm.text.grammars import Grammars
from collm.text.guards import TokenizerIdentity, check_eos
from collm.vllm.endpoint import Endpoint
from collm.vllm.engine import ServerEngine
from collm.vllm.one_engine import EngineConnection
from collm.vllm.separate import AuthorConnections
from collm.vllm.servers import Servers

EngineName = Literal["local", "transformers", "vllm"]


class Runtime(TypedDict, total=False):
    """Where and how a collaboration decodes: options of `CoLLM.from_pretrained`.

    Attributes:
        eager, cache_memory, servers: as for `CoLLM`.
        engine: "local" (in this process), "transformers" or "vllm" (the default with servers). "transformers" is local
            too, but dequantizes GGUF files instead of running them in llama.cpp.
    """

    eager: bool
    cache_memory: str | int | None
    servers: Servers | None
    engine: EngineName | None


class Choice(TypedDict, total=False):
    """Who writes the tokens: options of `CoLLM.generate`.

    Attributes:
        threshold: the base keeps a token while its defer prob is at most this. By default the calibrated threshold.
        budget: use the best calibrated threshold whose deferral rate is within this limit with 95 %, instead.
        price: defer where a head of objective "gain" predicts more nats than this: one, or one for each assistant.
        judge: says which tokens of the base stand, beside a rule that compares the defer prob with a threshold:
            "exact", "blend:weight=0.5", "joint" or "regret:nats=2" (`core.judges`). By default that of the calibration
            whose threshold is used, or none, which keeps all.
    """

    threshold: float | None
    budget: float | None
    price: float | Sequence[float] | None
    judge: str | None


class Limits(TypedDict, total=False):
    """Limits of a decoding loop: options of `CoLLM.engine`."""

    max_batch: int
    lookahead: int | None
    max_wait: int | None


class Generating(Choice, Limits, total=False):
    """Options of `CoLLM.generate`."""


class Backend(Protocol):
    """Interface of backends."""

    @property
    def runners(self) -> Sequence[ModelRunner | LlamaRunner | ToolRunner | Endpoint]:
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


@dataclass(eq=False)
class InMemory:
    """Backend with models in this process, loaded on first use.

    Attributes:
        given: the base, then the assistants.
        head: the deferral head.
        tokenizer: the tokenizer of all members.
        stop_ids: tokens that end a text besides EOS.
        accept_differences, eager, cache_memory: as in `CoLLM`.
        alignment: alignment of members with different tokenizers; `tokenizer` and `stop_ids` are then the base's.
    """

    given: Sequence[Member]
    head: DeferralHead
    tokenizer: PreTrainedTokenizerBase
    stop_ids: Collection[int] = ()
    accept_differences: Collection[str] = ()
    alignment: Alignment | None = None
    eager: bool = False
    cache_memory: str | int | None = None

    def __post_init__(self) -> None:
        cache_bytes(self.cache_memory)

    @cached_property
    def members(self) -> list[Model | ToolModel]:
        """Load all members and check that they match.

        Raises:
            LoadError: a model cannot be loaded.
            MismatchError: the members do not match.
        """
        vocab_size = TokenizerIdentity.of(self.tokenizer).vocab_size
        models = load_members(self.given, self.tokenizer, vocab_size=vocab_size, alignment=self.alignment)
        base = cast(Model, models[0])
        if base.hidden_size != self.head.hidden_size:
            raise MismatchError(
                f"the head expects hidden states of size {self.head.hidden_size}, the base has {base.hidden_size}; "
                "this head belongs to another base"
            )
        self.head.to(base.device)
        return models

    @cached_property
    def runners(self) -> list[ModelRunner | LlamaRunner | ToolRunner]:
        static = False if self.eager else None
        runners: list[ModelRunner | LlamaRunner | ToolRunner] = []
        for author, member in enumerate(self.members):
            if isinstance(member, LlamaModel):
                runners.append(LlamaRunner(member, hidden=author == BASE))
            elif isinstance(member, ToolModel):
                runners.append(ToolRunner(member))
            else:
                runners.append(ModelRunner(member, static=static))
        share_cache_memory([one for one in runners if isinstance(one, SlotTable)], self.cache_memory)
        return runners

    @cached_property
    def _shared(self) -> list[SharedPass]:
        return shared_passes(self.runners[1:])

    @cached_property
    def grammars(self) -> Grammars:
        members = self.members if self.alignment is None else self.members[:1]
        named = [(model.name, model.eos_token_ids) for model in members if not isinstance(model, ToolModel)]
        eos_ids = _eos_ids(named, self.tokenizer, self.accept_differences).union(self.stop_ids)
        return Grammars(self.tokenizer, TokenizerIdentity.of(self.tokenizer).vocab_size, eos_ids)

    def engine(self, max_batch: int, lookahead: int | None, max_wait: int | None) -> Engine:
        for member, runner in zip(self.given, self.runners, strict=True):
            if isinstance(member, nn.Module):  # its weights may have changed since the last call
                runner.forget()
            if not isinstance(runner, ToolRunner):
                runner.prepare(max_batch)
        given = {"max_batch": max_batch, "lookahead": lookahead, "max_wait": max_wait}
        return Engine(
            self.runners,
            self.head,
            self.tokenizer,
            EngineConfig(**{name: value for name, value in given.items() if value is not None}),
            grammars=self.grammars,
            alignment=self.alignment,
            shared=self._shared,
        )

    def candidates(self, prompt_ids: Sequence[int], token_ids: Sequence[int], most: int) -> Chunks[list[Candidates]]:
        return top_candidates(self.runners, self.tokenizer, prompt_ids, token_ids, most)

    def prompt_logprobs(self, prompt_ids: Sequence[int], most: int, author: int | None) -> Chunks[PromptLogprob | None]:
        return prompt_logprobs(self.runners, self.head, prompt_ids, most, author)

    def check_params(self, params: SamplingParams) -> None:
        check_params(params, TokenizerIdentity.of(self.tokenizer).vocab_size)
        if self.alignment is not None:
            check_segment_params(params)
        bad_word_tokens(self.tokenizer, tuple(params.bad_words))  # is cached, as the decoding loop needs it at once
        if params.structured_outputs is not None:
            self.grammars.compile(params.structured_outputs, trusted=False)

    def weights_per_token(self, author: int) -> int:
        member = self.members[author]
        return 0 if isinstance(member, ToolModel) else member.weights_per_token


@dataclass(eq=False)
class OnServers:
    """Backend with a server for each author, or one engine with base and assistant. No model is loaded in this process.

    Attributes:
        given, head, tokenizer, stop_ids, accept_differences: as in `InMemory`.
        servers: the servers.

    Raises:
        ConfigError: there is not one server per author, or an assistant is a tool.
    """

    given: Sequence[Member]
    head: DeferralHead
    tokenizer: PreTrainedTokenizerBase
    stop_ids: Collection[int]
    accept_differences: Collection[str]
    servers: Servers

    def __post_init__(self) -> None:
        self._in_one = self.servers.are_one(len(self.given) - 1)
        if not self._in_one:
            self.servers.check_count(len(self.given) - 1)
        tools = [one for one in self.given if not isinstance(one, ModelSpec | nn.Module)]
        if tools:
            raise ConfigError(f"the assistant {tools[0]} is a tool, which servers cannot run; use engine 'local'")

    @cached_property
    def connections(self) -> AuthorConnections | EngineConnection:
        """Connect to the servers and check them.

        Raises:
            ConfigError, LoadError, MismatchError: as in `AuthorConnections` or `EngineConnection`.
        """
        kind = EngineConnection if self._in_one else AuthorConnections
        return kind(self.servers, self.head, self.tokenizer)

    @property
    def runners(self) -> Sequence[Endpoint]:
        return self.connections.authors

    @cached_property
    def _eos_ids(self) -> frozenset[int]:
        named = [(author_name(author), eos_ids_of(one)) for author, one in enumerate(self.given)]
        return _eos_ids(named, self.tokenizer, self.accept_differences).union(self.stop_ids)

    def engine(self, max_batch: int, lookahead: int | None, max_wait: int | None) -> ServerEngine:
        for name, value in {"lookahead": lookahead, "max_wait": max_wait}.items():
            if value is not None:
                raise ConfigError(f"{name}={value} has no effect across servers; leave it out")
        return ServerEngine(self.connections, self.tokenizer, eos_ids=self._eos_ids, max_batch=max_batch)

    def candidates(self, prompt_ids: Sequence[int], token_ids: Sequence[int], most: int) -> Chunks[list[Candidates]]:
        yield self.connections.candidates(self.tokenizer, prompt_ids, token_ids, most)

    def prompt_logprobs(self, prompt_ids: Sequence[int], most: int, author: int | None) -> Chunks[PromptLogprob | None]:
        raise ConfigError("log-probabilities of a prompt are not available across servers; use engine 'local'")

    def check_params(self, params: SamplingParams) -> None:
        check_params(params, self.connections.vocab_size)
        self.connections.check_params(params)

    def weights_per_token(self, author: int) -> int:
        member = self.given[author]
        module = empty_model(member) if isinstance(member, ModelSpec) else cast(nn.Module, member)
        return LanguageModel(module, name="").weights_per_token


def check_engine(engine: EngineName | None, servers: Servers | None) -> None:
    """Raise a ConfigError if the engine is unknown, or if `servers` does not match it."""
    if engine not in (None, *get_args(EngineName)):
        raise ConfigError(f"engine is {engine!r}, expected one of {', '.join(get_args(EngineName))}")
    if engine in ("local", "transformers") and servers is not None:
        raise ConfigError(f"servers have no effect with engine {engine!r}; leave out the servers or the engine")
    if engine == "vllm" and servers is None:
        raise ConfigError("engine 'vllm' requires servers; pass their addresses, the base's first")


def check_local_options(servers: Servers | None, **options: str | int | None) -> None:
    """Raise a ConfigError if options of models in this process are given beside servers."""
    given = [name for name, value in options.items() if value not in (None, False)]
    if servers is not None and given:
        raise ConfigError(f"{', '.join(given)} has no effect across servers; leave it out, or use engine 'local'")


def _eos_ids(
    named: list[tuple[str, frozenset[int]]], tokenizer: PreTrainedTokenizerBase, accept: Collection[str]
) -> frozenset[int]:
    """EOS token ids of the tokenizer and of all models, which must agree."""
    model_eos_ids = check_eos(named, accept=accept)
    eos = cast("int | None", tokenizer.eos_token_id)
    return model_eos_ids if eos is None else model_eos_ids | {eos}
