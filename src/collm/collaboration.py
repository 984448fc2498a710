"""CoLLM: a base model, its deferral head and its assistants as one object that loads, saves and generates."""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Sequence
from copy import copy
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from collm.artefact import Parts, default_threshold, load_parts, local_directory, save_calibration, save_parts
from collm.completions import Completions, OnCompletion, as_prompts, complete, params_for_each, steps
from collm.core.calibration import Calibration
from collm.core.head import DeferralHead
from collm.core.named import policy_named
from collm.core.params import SamplingParams
from collm.core.policies import Policy, SingleAuthorPolicy, ThresholdPolicy
from collm.core.types import BASE, PromptLogprob, TokenStep, author_name
from collm.engine.candidates import Candidates, aligned_candidates
from collm.engine.chunks import Chunks
from collm.engine.engine import DecodingLoop
from collm.engine.request import Request, check_names_author, check_prompt
from collm.engine.runner import ModelRunner
from collm.engines import Backend, EngineName, InMemory, OnServers, check_engine
from collm.errors import ConfigError, MismatchError
from collm.models.language_model import LanguageModel
from collm.models.members import Member, aligned, as_member
from collm.models.tools import ToolModel, ToolRunner
from collm.text.alignment import Alignment
from collm.text.guards import TokenizerIdentity, check_accepted
from collm.text.template import Prompt, PromptTemplate
from collm.tools.spec import ToolFunction, ToolSpec
from collm.vllm.endpoint import Endpoint
from collm.vllm.export import export_base
from collm.vllm.servers import Servers


class CoLLM:
    """A collaboration of language models (Co-LLM, arXiv 2403.03870).

    Args:
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
        servers: servers that run base and assistants. No model is loaded in this process then.
        eager: do not use CUDA graphs.
        cache_memory: KV cache memory on each device, for all models together: "4GiB", a number of bytes, or a share of
            the memory that is free after the models are loaded, "50%". By default 80% on a GPU and 50% on a CPU.

    Raises:
        MismatchError: the models, the tokenizer or the head do not fit together.
    """

    def __init__(
        self,
        base: Member,
        assistants: Sequence[Member | ToolFunction],
        head: DeferralHead,
        tokenizer: PreTrainedTokenizerBase,
        *,
        tokenizers: Sequence[PreTrainedTokenizerBase] | None = None,
        template: PromptTemplate | None = None,
        calibration: Calibration | None = None,
        accept_differences: Sequence[str] = (),
        training: dict[str, Any] | None = None,
        eager: bool = False,
        cache_memory: str | int | None = None,
        servers: Servers | None = None,
    ) -> None:
        check_accepted(accept_differences)
        _check_local_options(servers, eager=eager, cache_memory=cache_memory)
        _check_count(assistants, head)
        if isinstance(base, ToolSpec):
            raise ConfigError(f"the base is {base}, expected a language model: the head reads its hidden states")
        self.base = base
        self.assistants = tuple(as_member(assistant) for assistant in assistants)
        self.head = head
        self.tokenizer = tokenizer
        self.identity = TokenizerIdentity.of(tokenizer)
        self.template = template or PromptTemplate.of(tokenizer)
        self.calibration = calibration
        self.accept_differences = tuple(accept_differences)
        self.training = training or {}
        self.servers = servers
        self._source: Path | None = None
        self.alignment = self._aligned(tokenizers)
        members, stop_ids = [self.base, *self.assistants], self.template.turn_ends
        self._in_memory = InMemory(
            members,
            head,
            tokenizer,
            stop_ids=stop_ids,
            accept_differences=self.accept_differences,
            alignment=self.alignment,
            eager=eager,
            cache_memory=cache_memory,
        )
        self.backend: Backend = self._in_memory
        if servers is not None:
            self.backend = OnServers(
                servers, members, head, tokenizer, stop_ids=stop_ids, accept_differences=self.accept_differences
            )

    def _aligned(self, tokenizers: Sequence[PreTrainedTokenizerBase] | None) -> Alignment | None:
        """The alignment of the authors' tokenizers, by default those of the models; None if they share one."""
        alignment = aligned(
            self.base,
            self.assistants,
            self.tokenizer,
            self.template,
            tokenizers=tokenizers,
            accept_differences=self.accept_differences,
        )
        if alignment is not None and self.servers is not None:
            raise ConfigError(
                "the models have different tokenizers, which needs their logits at every token; servers give only the "
                "most probable tokens, so use engine 'local'"
            )
        return alignment

    # Loading and saving

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        revision: str | None = None,
        base: Member | None = None,
        assistants: Sequence[Member | ToolFunction] | None = None,
        device: str | None = None,
        dtype: str | None = None,
        eager: bool = False,
        cache_memory: str | int | None = None,
        trust_code: bool = False,
        engine: EngineName | None = None,
        servers: Servers | None = None,
    ) -> CoLLM:
        """Load a collaboration from a directory or a Hub repository. Model weights are loaded on first use.

        Args:
            path: a directory or a Hub repository id.
            revision: Hub branch, tag or commit.
            base, assistants: models to use instead of those in the artefact, for example after they were moved.
            device, dtype: device and dtype of all models, instead of those in the artefact. For a device per model,
                separate them by commas, the base's first: "cuda:0,cuda:1".
            eager, cache_memory: as for the class.
            trust_code: run the functions that the artefact names as assistants.
            engine: "local" or "vllm". By default "vllm" if servers are given.
            servers: servers that run base and assistants. An artefact cannot name them.

        Raises:
            ArtefactError: the artefact is missing, incomplete or corrupt, its tokenizer has changed, or it names code
                that is not trusted.
            ConfigError: servers with the local engine, or the vllm engine without servers.
            MismatchError: the models do not fit together.
        """
        check_engine(engine, servers)
        _check_local_options(servers, device=device, dtype=dtype)
        directory = local_directory(path, revision)
        parts = load_parts(
            directory,
            base=base,
            assistants=assistants,
            device=device,
            dtype=dtype,
            trust_code=trust_code,
            load_adapter=servers is None,
        )
        model = cls(**vars(parts), eager=eager, cache_memory=cache_memory, servers=servers)
        model._source = directory if base is None else None
        return model

    def save_pretrained(self, path: str | Path) -> None:
        """Write the artefact. An existing artefact at `path` is replaced atomically; other files beside it are kept.

        The weights of a base that is a module are saved, of a PEFT model only the adapter. A base that is a spec is
        referenced by its path.

        Raises:
            ArtefactError: `path` is not a collaboration, or an assistant has no path to reference.
            LoadError: the base's adapter is not LoRA, so it could not be loaded again.
            WriteError: the disk is full or not writable. `path` is unchanged.
        """
        save_parts(self._parts, path, self._source)

    def save_calibration(self, path: str | Path) -> None:
        """Write the calibration, the default threshold and the model card into an existing artefact."""
        save_calibration(self.calibration, path)

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, commit_message: str = "Add collaboration"
    ) -> str:
        """Upload the artefact to the Hub and return its URL."""
        from huggingface_hub import HfApi

        api = HfApi()
        with tempfile.TemporaryDirectory() as temporary:
            directory = Path(temporary) / "collaboration"
            self.save_pretrained(directory)
            address = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=directory, commit_message=commit_message)
        return str(address)

    def export_vllm(self, path: str | Path) -> None:
        """Write the base with the head as rows of its output layer, for vLLM (`vllm.export.export_base`).

        Raises:
            ArtefactError: `path` exists.
            ConfigError, UnsupportedModel: the models are on servers, or the base's output layer cannot hold the head.
            WriteError: the disk is full or not writable.
        """
        self.check_in_memory()
        threshold = default_threshold(self.calibration)
        export_base(self.base, self.head, self.tokenizer, Path(path), default_threshold=threshold)

    @property
    def _parts(self) -> Parts:
        return Parts(**{part.name: getattr(self, part.name) for part in fields(Parts)})

    # Decoding

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        threshold: float | None = None,
        budget: float | None = None,
        policy: str | Policy | Sequence[Policy] | None = None,
        max_batch: int = 16,
        lookahead: int | None = None,
        max_wait: int | None = None,
        on_completion: OnCompletion | None = None,
    ) -> Completions:
        """Continue each prompt.

        Args:
            prompts: strings, chats (lists of messages) or lists of token ids. Or a single prompt.
            params: sampling parameters for all prompts, or a list with one for each prompt. With a seed for all
                prompts, prompt i uses seed + i.
            threshold: the base keeps a token while its defer prob is at most this. By default the calibrated threshold.
            budget: use the best calibrated threshold within this deferral rate, instead of `threshold`.
            policy: "threshold" (default), another name for `core.named.policy_named` ("joint", "mixture",
                "contrastive:beta=0.5"), or a policy object for all prompts or for each.
            max_batch: maximum number of prompts decoded at once.
            lookahead: maximum number of drafted tokens, 0 for none. The output does not depend on it.
            max_wait: maximum number of steps in which a prompt waits for others that need the same assistant, 0 for
                none. Servers take neither `lookahead` nor `max_wait`.
            on_completion: called with the index and the completion of each finished prompt.

        Raises:
            ConfigError: options that contradict each other or have no effect.
            RequestError: an invalid prompt.
            MismatchError: the models do not fit together.
            ModelFailure: a model raised or returned NaN.
            PolicyFailure: a policy raised.
        """
        listed = as_prompts(prompts)
        drawing = params_for_each(params or SamplingParams(), len(listed))
        policies = self._policies(policy, threshold, budget, len(listed))
        self._check_lookahead(lookahead, policies)
        before = {author.name: copy(author.usage) for author in self.runners}
        engine = self.engine(max_batch, lookahead, max_wait)
        requests = map(self.request, listed, drawing, policies)
        completions = complete(engine, requests, on_completion)
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
        threshold: float | None = None,
        budget: float | None = None,
        policy: str | Policy | None = None,
        lookahead: int | None = None,
    ) -> Generator[TokenStep, None, None]:
        """Continue one prompt and yield its tokens as they are generated. Arguments as for `generate`."""
        (chosen,) = self._policies(policy, threshold, budget, 1)
        self._check_lookahead(lookahead, [chosen])
        if params is not None and params.prompt_logprobs is not None:
            raise ConfigError("prompt_logprobs has no effect on a stream; use generate, or the method prompt_logprobs")
        engine = self.engine(1, lookahead)
        engine.add(self.request(prompt, params or SamplingParams(), chosen))
        return steps(engine)

    @property
    def author_names(self) -> list[str]:
        """The name of each author, the base first: base, assistant, assistant-2, .."""
        return [author_name(author) for author in range(1 + len(self.assistants))]

    @property
    def tokenizers(self) -> list[PreTrainedTokenizerBase]:
        """The tokenizer of each author, the base first."""
        if self.alignment is None:
            return [self.tokenizer] * (1 + len(self.assistants))
        return [one.tokenizer for one in self.alignment.tokenizers]

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

    def check_params(self, params: SamplingParams) -> None:
        """Check that requests with these parameters can be decoded. Grammars are compiled and cached.

        Raises:
            RequestError: an unknown token id or an invalid grammar.
            ConfigError: a parameter that servers do not support, or a tokenizer that does not support grammars.
            MissingExtra: the grammar package is not installed.
        """
        self.backend.check_params(params)

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
            ModelFailure, ToolFailure: an author failed.
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

    def _policies(
        self, policy: str | Policy | Sequence[Policy] | None, threshold: float | None, budget: float | None, count: int
    ) -> Sequence[Policy]:
        if policy is None or isinstance(policy, str | Policy):
            return [self.policy(policy, threshold, budget)] * count
        _check_alone(threshold, budget)
        if len(policy) != count:
            raise ConfigError(f"got {len(policy)} policies for {count} prompts; give one for each, or one for all")
        return policy

    def policy(
        self, policy: str | Policy | None = None, threshold: float | None = None, budget: float | None = None
    ) -> Policy:
        """The policy that `generate` uses with these options.

        Raises:
            ConfigError: options that contradict each other, an unknown name, or no default threshold.
        """
        if policy is None or policy == "threshold":
            return ThresholdPolicy(self.threshold(threshold, budget))
        _check_alone(threshold, budget)
        chosen = policy_named(policy) if isinstance(policy, str) else policy
        if self.alignment is not None:
            check_names_author(chosen, len(self.assistants))
        return chosen

    def threshold(self, threshold: float | None = None, budget: float | None = None) -> float:
        """The threshold that `generate` uses with these options. By default the calibrated threshold.

        Raises:
            ConfigError: both options are given, or the collaboration is not calibrated.
        """
        if threshold is not None and budget is not None:
            raise ConfigError("threshold and budget are both given; a budget selects a threshold, so give one of them")
        if threshold is not None:
            return threshold
        if self.calibration is None:
            needed = "a budget needs a calibration" if budget is not None else "there is no default threshold"
            raise ConfigError(
                f"{needed}: the collaboration is not calibrated; run 'collm calibrate' or pass a threshold"
            )
        return self.calibration.best(1.0 if budget is None else budget).threshold

    def _check_lookahead(self, lookahead: int | None, policies: Sequence[Policy]) -> None:
        asking = next((policy for policy in policies if policy.consults(len(self.assistants))), None)
        if lookahead and asking is not None:
            raise ConfigError(
                f"lookahead={lookahead} has no effect with {asking}, which asks other authors before every token; "
                "leave it out"
            )

    def engine(self, max_batch: int = 16, lookahead: int | None = None, max_wait: int | None = None) -> DecodingLoop:
        """A decoding loop that requests can join at any time. Use one at a time, and `close` it.

        Args:
            max_batch, lookahead, max_wait: as for `generate`.

        Raises:
            ConfigError: a limit is out of range or has no effect.
            LoadError: a model cannot be loaded, or a server cannot be reached.
            MismatchError: the models do not fit together.
        """
        return self.backend.engine(max_batch, lookahead, max_wait)

    @property
    def runners(self) -> Sequence[ModelRunner | ToolRunner | Endpoint]:
        """The runner of each author, the base first. It counts the author's usage."""
        return self.backend.runners

    @property
    def members(self) -> list[LanguageModel | ToolModel]:
        """All models and tools in memory, the base first.

        Raises:
            ConfigError: the models are on servers.
        """
        self.check_in_memory()
        return self._in_memory.members

    def check_in_memory(self) -> None:
        """Raise a ConfigError if the models are on servers, so that this process loads none."""
        if self.servers is not None:
            raise ConfigError("this needs the models in memory, but they are on servers; use engine 'local'")


def _check_alone(threshold: float | None, budget: float | None) -> None:
    if threshold is not None or budget is not None:
        raise ConfigError("threshold and budget have no effect unless the policy is 'threshold'; leave them out")


def _check_local_options(servers: Servers | None, **options: str | int | None) -> None:
    given = [name for name, value in options.items() if value not in (None, False)]
    if servers is not None and given:
        raise ConfigError(f"{', '.join(given)} has no effect across servers; leave it out, or use engine 'local'")


def _check_count(assistants: Sequence[object], head: DeferralHead) -> None:
    if len(assistants) != head.num_assistants:
        raise MismatchError(
            f"the head chooses among {head.num_assistants} assistants, but {len(assistants)} are given; "
            "give one model for each of its outputs"
        )
