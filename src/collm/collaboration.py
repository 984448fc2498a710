"""CoLLM: a base model, its deferral head and its assistants as one object that loads, saves and generates."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from copy import copy
from dataclasses import KW_ONLY, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn
from transformers import PreTrainedTokenizerBase

from collm.artefact import Parts, default_threshold, load_parts, local_directory
from collm.completions import (
    Completions,
    OnCompletion,
    as_prompts,
    check_policy,
    choose_threshold,
    complete,
    params_for_each,
    policy_for_each,
    price_policy,
    steps,
)
from collm.core.named import judged, policy_named
from collm.core.params import SamplingParams
from collm.core.policies import Policy, SingleAuthorPolicy, ThresholdPolicy
from collm.core.types import BASE, PromptLogprob, TokenStep, author_name
from collm.engine.candidates import Candidates, aligned_candidates
from collm.engine.chunks import Chunks
from collm.engine.engine import DecodingLoop
from collm.engine.llama_runner import LlamaRunner
from collm.engine.request import Request, check_prompt
from collm.engine.runner import ModelRunner
from collm.engines import (
    Backend,
    Choice,
    Generating,
    InMemory,
    Limits,
    OnServers,
    Runtime,
    check_engine,
    check_local_options,
)
from collm.errors import ConfigError, MismatchError
from collm.models.loading import ModelSpec
from collm.models.members import Member, Model, aligned, as_member
from collm.models.tools import ToolModel, ToolRunner
from collm.text.guards import TokenizerIdentity, check_accepted
from collm.text.template import Prompt, PromptTemplate
from collm.tools.spec import ToolFunction, ToolSpec
from collm.vllm.endpoint import Endpoint
from collm.vllm.export import export_base
from collm.vllm.servers import Servers

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(eq=False, repr=False)
class CoLLM(Parts):
    """A collaboration of language models (Co-LLM, arXiv 2403.03870).

    Attributes:
        base: the small model whose hidden states the head reads. A module, or a spec that is loaded on first use.
        assistants: authors 1..K. Modules, specs, or tools: a `ToolSpec` or an importable function.
        head: the deferral head. It has one output per assistant.
        tokenizer: the base's tokenizer, and the default for assistants.
        tokenizers: one for each assistant. By default a spec's own tokenizer, and the base's for modules and tools.
            Models with different tokenizers decide about segments of the text instead of tokens (`text.alignment`).
        template: how prompts and chats are rendered. By default prompts stay as they are, and chats use the tokenizer's
            chat template.
        calibration: the source of the default threshold and of the thresholds for budgets.
        accept_differences: differences between the models to accept: special_tokens, eos, chat_template.
        training: training metrics, for the model card.
        eager: do not use CUDA graphs.
        cache_memory: KV cache memory on each device, for all models together: "4GiB", a number of bytes, or a share of
            the memory that is free after the models are loaded, "50%". By default 80% on a GPU and 50% on a CPU.
        servers: servers that run base and assistants. No model is loaded in this process then.

    Raises:
        MismatchError: the models, the tokenizer or the head do not fit together.
    """

    _: KW_ONLY
    tokenizers: Sequence[PreTrainedTokenizerBase] | None = None
    eager: bool = False
    cache_memory: str | int | None = None
    servers: Servers | None = None

    def __post_init__(self) -> None:
        check_accepted(self.accept_differences)
        check_local_options(self.servers, eager=self.eager, cache_memory=self.cache_memory)
        if len(self.assistants) != self.head.num_assistants:
            raise MismatchError(
                f"the head chooses among {self.head.num_assistants} assistants, but {len(self.assistants)} are given; "
                "give one model for each of its outputs"
            )
        if isinstance(self.base, ToolSpec):
            raise ConfigError(f"the base is {self.base}, expected a language model: the head reads its hidden states")
        self.assistants = assistants = tuple(as_member(assistant) for assistant in self.assistants)
        self.identity = TokenizerIdentity.of(self.tokenizer)
        self.template = self.template or PromptTemplate.of(self.tokenizer)
        models = (self.base, assistants, self.tokenizer, self.template)
        self.alignment = aligned(*models, tokenizers=self.tokenizers, accept_differences=self.accept_differences)
        if self.alignment is not None and self.servers is not None:
            raise ConfigError(
                "the models have different tokenizers, which needs their logits at every token; servers give only the "
                "most probable tokens, so use engine 'local'"
            )
        parts = ([self.base, *assistants], self.head, self.tokenizer, self.template.turn_ends, self.accept_differences)
        self._in_memory = InMemory(*parts, self.alignment, self.eager, self.cache_memory)
        self.backend: Backend = self._in_memory if self.servers is None else OnServers(*parts, self.servers)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        revision: str | None = None,
        base: Member | None = None,
        assistants: Sequence[Member | ToolFunction | str] | None = None,
        device: str | None = None,
        dtype: str | None = None,
        trust_code: bool = False,
        **runtime: Unpack[Runtime],
    ) -> CoLLM:
        """Load a collaboration from a directory or a Hub repository. Model weights are loaded on first use.

        Args:
            path: a directory or a Hub repository id.
            revision: Hub branch, tag or commit.
            base, assistants: models to use instead of those in the artefact, for example after they were moved. An
                assistant that is text is the path of a model, which is loaded as the artefact says, or a tool.
            device, dtype: device and dtype of all models, instead of those in the artefact. For a device per model,
                separate them by commas, the base's first: "cuda:0,cuda:1".
            trust_code: run the functions that the artefact names as assistants.
            **runtime: as in `Runtime`. An artefact cannot name servers.

        Raises:
            ArtefactError: the artefact is missing, incomplete or corrupt, its tokenizer has changed, or it names code
                that is not trusted.
            ConfigError: servers with the local engine, or the vllm engine without servers.
            MismatchError: the models do not fit together.
        """
        servers = runtime.get("servers")
        check_engine(runtime.get("engine"), servers)
        check_local_options(servers, device=device, dtype=dtype)
        parts = load_parts(
            local_directory(path, revision),
            base=base,
            assistants=assistants,
            device=device,
            dtype=dtype,
            trust_code=trust_code,
            dequantize=runtime.get("engine") == "transformers",
        )
        options: dict[str, Any] = {name: value for name, value in runtime.items() if name != "engine"}
        return cls(**vars(parts), **options)

    def export_vllm(self, path: str | Path) -> None:
        """Write the base with the head as rows of its output layer, for vLLM (`vllm.export.export_base`).

        Raises:
            ArtefactError: `path` exists.
            ConfigError, UnsupportedModel: the models are on servers, or the base's output layer cannot hold the head.
        """
        self.check_in_memory()
        base, threshold = cast("nn.Module | ModelSpec", self.base), default_threshold(self.calibration)
        export_base(base, self.head, self.tokenizer, Path(path), default_threshold=threshold)

    # Decoding

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        policy: str | Policy | Sequence[Policy] | None = None,
        on_completion: OnCompletion | None = None,
        **options: Unpack[Generating],
    ) -> Completions:
        """Continue each prompt.

        Args:
            prompts: strings, chats (lists of messages) or lists of token ids. Or a single prompt.
            params: sampling parameters, for all prompts or one for each. With one seed, prompt i uses seed + i.
            policy: "threshold" (default), another name for `core.named.policy_named` ("joint", "mixture",
                "contrastive:beta=0.5"), or a policy object for all prompts or for each.
            on_completion: called with the index and the completion of each finished prompt.
            **options: who writes, as in `engines.Choice`; and max_batch, lookahead and max_wait, as for `engine`.

        Raises:
            ConfigError: options that contradict each other or have no effect.
            RequestError: an invalid prompt.
            MismatchError: the models do not fit together.
            ModelFailure: a model raised or returned NaN.
            PolicyFailure: a policy raised.
        """
        listed = as_prompts(prompts)
        drawing = params_for_each(params or SamplingParams(), len(listed))
        choice = {name: options.pop(name, None) for name in Choice.__annotations__}  # type: ignore[misc]
        if isinstance(policy, str | Policy | None):
            policies: Sequence[Policy] = [self.policy(policy, **choice)] * len(listed)
        else:
            policies = [self.policy(one) for one in policy_for_each(policy, len(listed), choice)]
        before = {author.name: copy(author.usage) for author in self.runners}
        requests = map(self.request, listed, drawing, policies)
        completions = complete(self.engine(**cast(Limits, options)), requests, on_completion)
        for completion, drawn, chosen in zip(completions, drawing, policies, strict=True):
            if drawn.prompt_logprobs is not None:
                read = completion.prompt_token_ids
                completion.prompt_logprobs = self.prompt_logprobs(read, drawn.prompt_logprobs, policy=chosen)
        usage = {author.name: author.usage - before[author.name] for author in self.runners}
        return Completions(completions, usage)

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        policy: str | Policy | None = None,
        lookahead: int | None = None,
        **choice: Unpack[Choice],
    ) -> Generator[TokenStep, None, None]:
        """Continue one prompt and yield its tokens as they are generated. Arguments as for `generate`."""
        chosen = self.policy(policy, **choice)
        if params is not None and params.prompt_logprobs is not None:
            raise ConfigError("prompt_logprobs has no effect on a stream; use generate, or the method prompt_logprobs")
        engine = self.engine(1, lookahead)
        engine.add(self.request(prompt, params or SamplingParams(), chosen))
        return steps(engine)

    def engine(self, max_batch: int = 16, lookahead: int | None = None, max_wait: int | None = None) -> DecodingLoop:
        """A decoding loop that requests can join at any time. Use one at a time, and `close` it.

        Args:
            max_batch: maximum number of prompts decoded at once.
            lookahead: maximum number of drafted tokens, 0 for none. The output does not depend on it.
            max_wait: maximum number of steps in which a prompt waits for others that need the same assistant, 0 for
                none. Servers take neither `lookahead` nor `max_wait`.

        Raises:
            ConfigError: a limit is out of range or has no effect.
            LoadError, MismatchError: a model cannot be loaded, or a server not be reached; or models do not fit.
        """
        return self.backend.engine(max_batch, lookahead, max_wait)

    def request(self, prompt: Prompt, params: SamplingParams, policy: Policy) -> Request:
        """The decoding loop's request for a prompt.

        Raises:
            ConfigError: a seed without sampling, or log-probabilities of a prompt that have no meaning.
            RequestError: an invalid prompt.
        """
        if params.prompt_logprobs is not None:
            self._scored_author(policy)
        prompt_ids = self.template.encode_prompt(self.tokenizer, prompt)
        return Request(prompt_ids, params, policy, self.assistant_prompts(prompt))

    def assistant_prompts(self, prompt: Prompt) -> list[list[int]]:
        """A prompt in the tokens of each assistant. Empty if all models share one tokenizer.

        Raises:
            RequestError: an assistant's template rejects the prompt.
        """
        return [] if self.alignment is None else self.alignment.assistant_prompts(prompt)

    def policy(
        self,
        policy: str | Policy | None = None,
        threshold: float | None = None,
        budget: float | None = None,
        price: float | Sequence[float] | None = None,
        judge: str | None = None,
    ) -> Policy:
        """The policy that `generate` uses with these options.

        Raises:
            ConfigError: options that contradict each other, an unknown name, no default threshold, or a judge that the
                models cannot have.
        """
        if policy is None and threshold is None and budget is None and isinstance(price, Sequence) and len(price) > 1:
            policy, price = price_policy(price), None
        if policy is None or policy == "threshold":
            chosen: Policy = ThresholdPolicy(self.threshold(threshold, budget, price))
            if self.calibration is not None and threshold is None and price is None:
                judge = judge or self.calibration.judge
        elif any(one is not None for one in (threshold, budget, price)):
            raise ConfigError(f"threshold, budget and price have no effect with policy {policy}; leave them out")
        else:
            chosen = policy_named(policy) if isinstance(policy, str) else policy
        chosen = chosen if judge is None else judged(chosen, judge)
        check_policy(chosen, self.head, self.assistants, self.alignment)
        return chosen

    def threshold(
        self, threshold: float | None = None, budget: float | None = None, price: float | Sequence[float] | None = None
    ) -> float:
        """The threshold that `generate` uses with these options, as `completions.choose_threshold` with its errors."""
        return choose_threshold(self.calibration, self.head, threshold, budget, price)

    def check_params(self, params: SamplingParams) -> None:
        """Check that requests with these parameters can be decoded. Grammars are compiled and cached.

        Raises:
            RequestError: an unknown token id or an invalid grammar.
            ConfigError: a parameter that servers do not support, or a tokenizer that does not support grammars.
            MissingExtra: the grammar package is not installed.
        """
        self.backend.check_params(params)

    # What the authors predict for a given text

    def prompt_logprobs(
        self, prompt: Prompt, most: int = 0, *, policy: Policy | None = None
    ) -> list[PromptLogprob | None]:
        """Log-probabilities of a prompt's tokens under the joint model, log sum_z P(z) P_z. None for the first token.

        Args:
            prompt: as for `generate`.
            most: number of most probable tokens to list at each position.
            policy: a `SingleAuthorPolicy` for the log-probabilities of that author. Other policies have no effect.

        Raises:
            RequestError: an invalid prompt.
            ConfigError: the collaboration decodes on servers.
            ModelFailure: a model failed. A tool that fails abstains, as in decoding.
        """
        return list(chain.from_iterable(self.prompt_logprobs_in_chunks(prompt, most, policy=policy)))

    def prompt_logprobs_in_chunks(
        self, prompt: Prompt, most: int = 0, *, policy: Policy | None = None
    ) -> Chunks[PromptLogprob | None]:
        """Like `prompt_logprobs`, chunk by chunk. An `engine` may step in between."""
        prompt_ids = self.template.encode_prompt(self.tokenizer, prompt)
        author = self._scored_author(policy)
        check_prompt(self.runners, self.identity.vocab_size, prompt_ids, room=0)
        yield from self.backend.prompt_logprobs(prompt_ids, most, author)

    def _scored_author(self, policy: Policy | None) -> int | None:
        """The author whose log-probabilities a prompt gets; None for those of the joint model."""
        author = policy.writer if isinstance(policy, SingleAuthorPolicy) else None
        if self.alignment is not None and author != BASE:
            raise ConfigError(
                "the models have different tokenizers, so only the base has log-probabilities of these tokens; ask for "
                "those of the base alone (policy 'single:writer=0')"
            )
        return author

    def candidates(self, prompt: Prompt, token_ids: Sequence[int], most: int = 5) -> list[list[Candidates]]:
        """The most probable tokens of each author at each token of an answer (`engine.candidates`).

        An assistant with another tokenizer has candidates only at the beginning of a segment.
        """
        return list(chain.from_iterable(self.candidates_in_chunks(prompt, token_ids, most)))

    def candidates_in_chunks(self, prompt: Prompt, token_ids: Sequence[int], most: int = 5) -> Chunks[list[Candidates]]:
        """Like `candidates`, chunk by chunk. An `engine` may step in between."""
        prompt_ids = self.template.encode_prompt(self.tokenizer, prompt)
        if self.alignment is None:
            yield from self.backend.candidates(prompt_ids, token_ids, most)
        else:
            prompts = [prompt_ids, *self.assistant_prompts(prompt)]
            yield from aligned_candidates(self._in_memory.runners, self.alignment, prompts, token_ids, most)

    # Authors

    @property
    def author_names(self) -> list[str]:
        """The name of each author, the base first: base, assistant, assistant-2, .."""
        return [author_name(author) for author in range(1 + len(self.assistants))]

    @property
    def author_tokenizers(self) -> list[PreTrainedTokenizerBase]:
        """The tokenizer of each author, the base first."""
        if self.alignment is None:
            return [self.tokenizer] * (1 + len(self.assistants))
        return [one.tokenizer for one in self.alignment.tokenizers]

    @property
    def runners(self) -> Sequence[ModelRunner | LlamaRunner | ToolRunner | Endpoint]:
        """The runner of each author, the base first. It counts the author's usage."""
        return self.backend.runners

    @property
    def members(self) -> list[Model | ToolModel]:
        """All models and tools in memory, the base first. A ConfigError if they are on servers."""
        self.check_in_memory()
        return self._in_memory.members

    def check_in_memory(self) -> None:
        """Raise a ConfigError if the models are on servers, so that this process loads none."""
        if self.servers is not None:
            raise ConfigError("this needs the models in memory, but they are on servers; use engine 'local'")
