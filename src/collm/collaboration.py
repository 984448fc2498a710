"""CoLLM: a base, its deferral head and its assistants as one object: load, save, generate, stream."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from copy import copy
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from collm.completions import Completions, OnCompletion, as_prompts, complete, params_for_each, steps
from collm.core.calibration import Calibration
from collm.core.head import DeferralHead
from collm.core.named import policy_named
from collm.core.params import SamplingParams
from collm.core.policies import Policy, SingleAuthorPolicy, ThresholdPolicy
from collm.core.types import BASE, PromptLogprob, TokenStep
from collm.decoding.candidates import Candidates, aligned_candidates
from collm.decoding.engine import DecodingLoop
from collm.decoding.request import Request, check_names_author, check_prompt
from collm.engines import Backend, EngineName, InMemory, InOneEngine, OnServers, check_engine
from collm.errors import ConfigError, MismatchError
from collm.models.alignment import Alignment
from collm.models.guards import TokenizerIdentity, check_accepted
from collm.models.language_model import LanguageModel
from collm.models.loading import ModelSpec, load_tokenizer
from collm.models.members import Member, aligned, as_member
from collm.models.runner import ModelRunner
from collm.models.template import Prompt, PromptTemplate
from collm.models.tools import ToolModel, ToolRunner
from collm.storage import Parts, default_threshold, load_parts, push_to_hub, save_calibration, save_parts
from collm.tools.spec import ToolFunction, ToolSpec
from collm.vllm.endpoint import Endpoint
from collm.vllm.export import export_base
from collm.vllm.servers import Servers


class CoLLM:
    """A collaboration of language models (Co-LLM, arXiv 2403.03870).

    Args:
        base: the small model whose hidden states the head reads; a module, or a spec to load on first use.
        assistants: authors 1..K, likewise; or tools: a `ToolSpec`, or a function of yours that a module holds.
        head: the deferral head; its shape must fit.
        tokenizer: of the base, and of all that have no other.
        tokenizers: of the assistants, where they have others; by default those that lie beside the models that specs
            name, and the base's for modules and tools. Models with different tokenizers decide about segments of the
            text in place of tokens (`models.alignment`).
        template: how prompts and chats become text; by default prompts as they stand and the tokenizer's chat template.
        calibration: what `generate` takes its default threshold and its budgets from.
        accept_differences: differences between the models to put up with: special_tokens, eos, chat_template.
        training: what was measured while training, for the model card.
        servers: where base and assistants are served; then nothing is loaded here, and decoding goes across them.
        eager: run models as they are, without CUDA graphs; has no effect without a GPU.
        cache_memory: memory for keys and values on each device, all models together: "4GiB", a number of bytes, or a
            share of what is free once the models are loaded, "50%"; by default 80% on a GPU, 50% on a CPU.

    Raises:
        MismatchError: the models, the tokenizer or the head do not fit.
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
        self.template = template or PromptTemplate(chat=cast("str | None", tokenizer.chat_template))
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
            kind = InOneEngine if servers.are_one(head.num_assistants) else OnServers
            self.backend = kind(
                servers, members, head, tokenizer, stop_ids=stop_ids, accept_differences=self.accept_differences
            )

    def _aligned(self, tokenizers: Sequence[PreTrainedTokenizerBase] | None) -> Alignment | None:
        """The alignment of the authors' tokenizers, by default those of the models; None if they share one."""
        if tokenizers is None:
            tokenizers = [
                load_tokenizer(one) if isinstance(one, ModelSpec) else self.tokenizer for one in self.assistants
            ]
        alignment = aligned(
            self.base,
            self.assistants,
            [self.tokenizer, *tokenizers],
            self.template,
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
        """Load a collaboration from a directory or a Hub repository; the models' weights follow on first use.

        Args:
            path: the directory, or a Hub repository id.
            revision: Hub branch, tag or commit.
            base, assistants: models to use in place of those the artefact names, after a move for example.
            device, dtype: of all models, in place of what the artefact says; or a device for each model, the base's
                first, with commas between: "cuda:0,cuda:1".
            eager, cache_memory: as of the class.
            trust_code: run the functions that the artefact names as assistants.
            engine: "local" or "vllm"; by default "vllm" where servers are given.
            servers: where base and assistants are served. No file of an artefact decides that.

        Raises:
            ArtefactError: it is missing, half-written or corrupt, a tokenizer is not the one it was made with, or it
                names code that was not trusted.
            ConfigError: servers for the local engine, or none for the other.
            MismatchError: the models do not fit each other.
        """
        check_engine(engine, servers)
        _check_local_options(servers, device=device, dtype=dtype)
        parts = load_parts(
            path,
            revision=revision,
            base=base,
            assistants=assistants,
            device=device,
            dtype=dtype,
            trust_code=trust_code,
            load_adapter=servers is None,
        )
        return cls._of(parts, eager=eager, cache_memory=cache_memory, servers=servers)

    @classmethod
    def _of(cls, parts: Parts, *, eager: bool, cache_memory: str | int | None, servers: Servers | None) -> CoLLM:
        model = cls(
            parts.base,
            parts.assistants,
            parts.head,
            parts.tokenizer,
            template=parts.template,
            calibration=parts.calibration,
            accept_differences=parts.accept_differences,
            training=parts.training,
            eager=eager,
            cache_memory=cache_memory,
            servers=servers,
        )
        model._source = parts.source
        return model

    def save_pretrained(self, path: str | Path) -> None:
        """Write the artefact, replacing what is there at once or not at all.

        A base given as a module is saved with it (a PEFT model as its adapter); one given as a spec is referenced.

        Raises:
            ArtefactError: `path` holds something else than a collaboration, or an assistant has no path to reference.
            LoadError: the base's adapter is not LoRA, so it could not be loaded again.
            WriteError: the disk refused; what was at `path` is untouched.
        """
        save_parts(self._parts, path)

    def save_calibration(self, path: str | Path) -> None:
        """Write the calibration, the default threshold and the model card into an existing artefact."""
        save_calibration(self.calibration, path)

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, commit_message: str = "Add collaboration"
    ) -> str:
        """Upload the artefact to the Hub; returns its address there."""
        return push_to_hub(self._parts, repo_id, private=private, commit_message=commit_message)

    def export_vllm(self, path: str | Path) -> None:
        """Write the base with the head as rows of its output layer, for vLLM (`vllm.export.export_base`).

        Raises:
            ArtefactError: `path` exists.
            ConfigError, UnsupportedModel: no row can hold the head.
            WriteError: the disk refused.
        """
        threshold = default_threshold(self.calibration)
        export_base(self.base, self.head, self.tokenizer, Path(path), default_threshold=threshold)

    @property
    def _parts(self) -> Parts:
        return Parts(
            self.base,
            self.assistants,
            self.head,
            self.tokenizer,
            self.template,
            self.calibration,
            self.accept_differences,
            self.training,
            self._source,
        )

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
            prompts: strings, chats (lists of messages) or lists of token ids, or one of them.
            params: how tokens are drawn; with a seed, prompt i draws with seed + i. Or one for each prompt, as it is.
            threshold: the base keeps a token while its defer prob is at most this; by default the calibrated one.
            budget: a deferral rate to stay within, in place of a threshold; needs a calibration.
            policy: "threshold" (default), another name as `core.named.policy_named` reads it ("joint", "mixture",
                "contrastive:beta=0.5"), or a policy object for all prompts or for each.
            max_batch: most prompts decoded at once.
            lookahead: most tokens that may be drafted ahead of the certain text; 0 for none. The tokens that come out
                are the same.
            max_wait: most steps in which a prompt may wait for others that need the same assistant; 0 for none.
                Neither has an effect across servers, and is refused there.
            on_completion: called with index and completion whenever a prompt is done.

        Raises:
            ConfigError: options that contradict each other or have no effect.
            RequestError: a prompt that cannot be read.
            MismatchError: the models do not fit.
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
        """Continue one prompt, token by token; the texts joined are the completion's text. As `generate` otherwise."""
        (chosen,) = self._policies(policy, threshold, budget, 1)
        self._check_lookahead(lookahead, [chosen])
        if params is not None and params.prompt_logprobs is not None:
            raise ConfigError("prompt_logprobs has no effect on a stream; use generate, or the method prompt_logprobs")
        engine = self.engine(1, lookahead)
        engine.add(self.request(prompt, params or SamplingParams(), chosen))
        return steps(engine)

    @property
    def tokenizers(self) -> list[PreTrainedTokenizerBase]:
        """Of each author, the base first."""
        if self.alignment is None:
            return [self.tokenizer] * (1 + len(self.assistants))
        return [one.tokenizer for one in self.alignment.tokenizers]

    def request(self, prompt: Prompt, params: SamplingParams, policy: Policy) -> Request:
        """What the decoding loop is given for a prompt.

        Raises:
            ConfigError: a seed where nothing is drawn.
            RequestError: a prompt that cannot be read.
        """
        prompt_ids = self.template.encode_prompt(self.tokenizer, prompt)
        return Request(prompt_ids, params, policy, self.assistant_prompts(prompt))

    def assistant_prompts(self, prompt: Prompt) -> list[list[int]]:
        """A prompt in the tokens of each assistant; empty where all models share one tokenizer.

        Raises:
            RequestError: an assistant's template refuses it.
        """
        return [] if self.alignment is None else self.alignment.assistant_prompts(prompt)

    def check_params(self, params: SamplingParams) -> None:
        """Whether requests with these parameters can be decoded; grammars are compiled, and kept for them.

        Raises:
            RequestError: a token that does not exist, or a grammar that cannot be followed.
            ConfigError: a parameter that is not available across servers, or a tokenizer that knows no grammars.
            MissingExtra: a package for grammars is not installed.
        """
        self.backend.check_params(params)

    def prompt_logprobs(
        self, prompt: Prompt, most: int = 0, *, policy: Policy | None = None
    ) -> list[PromptLogprob | None]:
        """Log-probabilities of a prompt's tokens, None for the first: log sum_z P(z) P_z, the trained joint model's.

        Args:
            prompt: as of `generate`.
            most: how many of the most probable tokens to list at each position.
            policy: with `SingleAuthorPolicy` those of this author alone; another changes nothing.

        Raises:
            RequestError: a prompt that cannot be read.
            ConfigError: the collaboration decodes across servers.
            ModelFailure, ToolFailure: an author broke down.
        """
        prompt_ids = self.template.encode_prompt(self.tokenizer, prompt)
        author = policy.writer if isinstance(policy, SingleAuthorPolicy) else None
        if self.alignment is not None and author != BASE:
            raise ConfigError(
                "the models have different tokenizers, so only the base has log-probabilities of these tokens; ask for "
                "those of the base alone (policy 'base')"
            )
        check_prompt(self.runners, self.identity.vocab_size, prompt_ids, room=0)
        return self.backend.prompt_logprobs(prompt_ids, most, author)

    def candidates(self, prompt: Prompt, token_ids: Sequence[int], most: int = 5) -> list[list[Candidates]]:
        """What each author would have written at each token of an answer to a prompt (`decoding.candidates`).

        An assistant with another tokenizer has candidates where a segment begins, and none elsewhere.
        """
        prompt_ids = self.template.encode_prompt(self.tokenizer, prompt)
        if self.alignment is not None:
            prompts = [prompt_ids, *self.assistant_prompts(prompt)]
            return aligned_candidates(self._in_memory.runners, self.alignment, prompts, token_ids, most)
        return self.backend.candidates(prompt_ids, token_ids, most)

    def _policies(
        self, policy: str | Policy | Sequence[Policy] | None, threshold: float | None, budget: float | None, count: int
    ) -> Sequence[Policy]:
        if policy is None or isinstance(policy, str | Policy):
            return [self.policy(policy, threshold, budget)] * count
        _check_alone(threshold, budget)
        if len(policy) != count:
            raise ConfigError(f"{len(policy)} policies came for {count} prompts; give one for each, or one for all")
        return policy

    def policy(
        self, policy: str | Policy | None = None, threshold: float | None = None, budget: float | None = None
    ) -> Policy:
        """The rule that `generate` uses with these options.

        Raises:
            ConfigError: options that contradict each other, an unknown name, or no threshold to be had.
        """
        if policy is None or policy == "threshold":
            return ThresholdPolicy(self.threshold(threshold, budget))
        _check_alone(threshold, budget)
        chosen = policy_named(policy) if isinstance(policy, str) else policy
        if self.alignment is not None:
            check_names_author(chosen, len(self.assistants))
        return chosen

    def threshold(self, threshold: float | None = None, budget: float | None = None) -> float:
        """The threshold that `generate` uses with these options: the given one, else the calibrated one.

        Raises:
            ConfigError: both came, or there is no calibration to take it from.
        """
        if threshold is not None and budget is not None:
            raise ConfigError("threshold and budget both came; a budget becomes a threshold, so give one of them")
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
        """The decoding loop on these models, for requests that come and go; one at a time, and `close` it.

        Args:
            max_batch, lookahead, max_wait: as of `generate`.

        Raises:
            ConfigError: a limit out of range, or one without effect.
            LoadError: a model cannot be loaded, or a server is not there.
            MismatchError: the models do not fit.
        """
        return self.backend.engine(max_batch, lookahead, max_wait)

    @property
    def runners(self) -> Sequence[ModelRunner | ToolRunner | Endpoint]:
        """One for each author, the base first: who does the work, and counts it."""
        return self.backend.runners

    @property
    def members(self) -> list[LanguageModel | ToolModel]:
        """All members in memory and checked against each other, the base first; loaded for this if servers decode."""
        return self._in_memory.members


def _check_alone(threshold: float | None, budget: float | None) -> None:
    if threshold is not None or budget is not None:
        raise ConfigError("threshold and budget have no effect with another policy than 'threshold'; drop them")


def _check_local_options(servers: Servers | None, **options: str | int | None) -> None:
    given = [name for name, value in options.items() if value not in (None, False)]
    if servers is not None and given:
        raise ConfigError(f"{', '.join(given)} has no effect across servers; leave it out, or use engine 'local'")


def _check_count(assistants: Sequence[object], head: DeferralHead) -> None:
    if len(assistants) != head.num_assistants:
        raise MismatchError(
            f"the head chooses among {head.num_assistants} assistants, but {len(assistants)} came; "
            "give one model for each of its outputs"
        )
