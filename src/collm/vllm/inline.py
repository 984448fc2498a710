"""The collaboration inside vLLM: its speculative decoding with the base as the proposer, and every draft accepted.

vLLM's model is the assistant. vLLM makes a `Proposer` in each of its workers (`speculative_config`, method
custom_class), and calls `plugin.register` in each of its processes. This is written for model runner V1 of the version
in `TESTED`. No file of vLLM is edited, and engines without `Proposer` are left alone.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from itertools import islice
from typing import Any, TypeVar, cast

import torch
import vllm
from torch import Tensor
from vllm.distributed import get_tp_group
from vllm.v1.outputs import LogprobsTensors, SamplerOutput

from collm import artefact
from collm.core.calibration import Calibration
from collm.core.head import DeferralHead
from collm.core.policies import Policy, ThresholdPolicy
from collm.decoding.draws import Draw
from collm.errors import CollmError, ConfigError, MismatchError, ModelFailure
from collm.models.guards import TokenizerIdentity
from collm.models.language_model import LanguageModel
from collm.models.loading import load_tokenizer
from collm.models.members import load_members
from collm.models.runner import ModelRunner
from collm.vllm import AUTHORS, FAILED, HEAD, SETTINGS, THRESHOLD, author_token
from collm.vllm.drafting import Decision, Drafted, Drafter, policy_of
from collm.vllm.export_manifest import head_digest
from collm.vllm.inline_sampling import Asking, sample

T = TypeVar("T")
TESTED = "0.32"
"""The version of vLLM whose insides this was made for."""
_LOG = logging.getLogger(__name__)
_NO_TOKEN = -1
"""Padding of sampled tokens, as vLLM's."""


class Proposer:
    """The base in a worker of vLLM.

    With tensor parallelism the first rank holds the base and decides, and the others are told.

    Raises:
        ConfigError: vLLM has another version than this was made for, or `additional_config` names no collaboration, or
            one of several assistants.
        MismatchError: the base reads less than vLLM lets requests have.
        ArtefactError, LoadError: as of `CoLLM.from_pretrained`.
    """

    def __init__(self, vllm_config: Any) -> None:
        check_version(vllm.__version__)
        self._config = vllm_config
        self._device = _device_of(vllm_config)
        self._requests: dict[str, Drafted] = {}
        self._is_step = False
        self._num_given = 0
        self._drafted_at = self._began_at = 0.0
        _wrap_model_runner()
        if get_tp_group().rank_in_group == 0:
            self._load()

    def load_model(self, *rest: Any) -> None:
        """Called by vLLM when it has loaded the assistant; the base is there already."""

    def _load(self) -> None:
        settings = (self._config.additional_config or {}).get(SETTINGS) or {}
        if "collaboration" not in settings:
            wanted = f'{{"{SETTINGS}": {{"collaboration": "DIR"}}}}'
            raise ConfigError(f"additional_config names no collaboration; give --additional-config '{wanted}'")
        base, head, calibration = _loaded(settings["collaboration"], self._device)
        self._vocab_size = base.vocab_size
        longest = self._config.model_config.max_model_len
        if base.max_length is not None and base.max_length < longest:
            raise MismatchError(
                f"the base reads {base.max_length} tokens, and requests may have {longest}; start vLLM with "
                f"--max-model-len {base.max_length}"
            )
        runner = ModelRunner(base, cache_memory=settings.get("cache_memory"))
        runner.prepare(self._config.scheduler_config.max_num_seqs)
        runner.close(_read_a_token(runner))  # the cache takes its memory before vLLM measures what is left
        self._head = head_digest(head)
        self._default = None if calibration is None else ThresholdPolicy(calibration.best().threshold)
        most = self._config.speculative_config.num_speculative_tokens + 1
        self._drafter = Drafter(runner, head.to(base.device), most=most)

    # After the assistant's pass

    def sample(self, runner: Any, logits: Tensor, spec: Any) -> SamplerOutput:
        """What each request gets: its draft, and the token after it, which is the base's or the assistant's.

        Args:
            runner: vLLM's.
            logits: of the assistant, after each drafted token and before the first, shape (T, V).
            spec: which of them belong to whom; None without drafts.
        """
        self._runner = runner
        given = _told(lambda: self._safely(lambda: self._given(logits, spec), None))
        return _output(given, logits.device, logprobs=runner.input_batch.max_num_logprobs is not None)

    def _given(self, logits: Tensor, spec: Any) -> list[Given | None]:
        """Of each row; None of one that gets nothing."""
        batch = self._runner.input_batch
        batch.generators.clear()  # draws are made here, and vLLM would turn back those of rows without a token
        counts = [0] * batch.num_reqs if spec is None else list(spec.num_draft_tokens)
        read = iter([] if spec is None else spec.draft_token_ids.tolist())
        drafts = [list(islice(read, count)) for count in counts]
        is_reading = self._runner.discard_request_mask.np[: batch.num_reqs]
        rows = [(row, self._request(row)) for row in range(batch.num_reqs) if not is_reading[row]]
        undecided = [(row, one) for row, one in rows if not one.decisions and one.failure is None]
        self._note_pass(sum(counts) + len(rows), is_step=not undecided and len(rows) == len(counts))
        self._drafter.decide([one for _, one in undecided], self._texts(undecided), self._draw)
        given: list[Given | None] = [None] * batch.num_reqs
        for row, one in rows:
            if one.failure is None:
                given[row] = Given(one.settle(drafts[row]), _wants_authors(one))
        self._ask([(row, one) for row, one in rows if one.failure is None], given, logits, spec)
        self._num_given = sum(len(one.decisions) for one in given if one is not None)
        return given

    def _ask(self, rows: Rows, given: list[Given | None], logits: Tensor, spec: Any) -> None:
        """Draw the tokens that the base left to the assistant."""
        asked = [(row, one) for row, one in rows if cast(Given, given[row]).decisions[-1].draw is None]
        if not asked:
            return
        places = [_place(spec, row, len(cast(Given, given[row]).decisions) - 1) for row, _ in asked]
        said = logits[places][:, : self._vocab_size]
        broken = said.isnan().any(-1).tolist()
        for (row, one), is_broken in zip(asked, broken, strict=True):
            if is_broken:
                one.failure = ModelFailure("the assistant gave logits that are not finite")
                given[row] = None
        sound = [place for place, is_broken in enumerate(broken) if not is_broken]
        asking = [self._asking(asked[place][1], cast(Given, given[asked[place][0]]).tokens) for place in sound]
        for place, drawn in zip(sound, sample(self._runner.sampler, said[sound], asking) if sound else [], strict=True):
            decisions = cast(Given, given[asked[place][0]]).decisions
            decisions[-1] = replace(decisions[-1], draw=drawn)

    def _draw(self, logits: Tensor, requests: Sequence[Drafted]) -> list[Draw]:
        """Tokens of the base."""
        asking = [self._asking(one, one.written) for one in requests]
        return sample(self._runner.sampler, logits.to(self._runner.device), asking)

    def _asking(self, one: Drafted, drafted: Sequence[int]) -> Asking:
        state: State = one.request
        params = state.cached.sampling_params
        top = params.num_logprobs
        if top and _wants_authors(one):
            top -= 1
        return Asking(state.cached, [*state.cached.output_token_ids, *drafted], state.generator, top)

    # Before its next pass

    def propose(self, sampled: Sequence[Sequence[int]], *rest: Any, **options: Any) -> list[list[int]]:
        """Drafts of all requests in the batch; called by vLLM when what `sample` gave has been added to them.

        Args:
            sampled: the new tokens of each row; none where a prompt is still being read.
        """
        return _told(lambda: self._safely(lambda: self._drafts(sampled), []))

    def _safely(self, work: Callable[[], list[T]], nothing: T) -> list[T]:
        """What was made for each row; nothing where that broke down, and then its request fails."""
        try:
            return work()
        except Exception as error:
            _LOG.exception("the collaboration broke down")
            for row in range(self._runner.input_batch.num_reqs):
                self._request(row).failure = error
            return [nothing] * self._runner.input_batch.num_reqs

    def _drafts(self, sampled: Sequence[Sequence[int]]) -> list[list[int]]:
        self._note_round()
        self._forget_ended()
        rows = [(row, self._request(row)) for row, new in enumerate(sampled) if new]
        room = {one: self._room(one) for _, one in rows}
        rows = [(row, one) for row, one in rows if room[one] > 0]
        self._drafter.draft(self._texts(rows), room, self._draw)
        drafts: list[list[int]] = [[] for _ in sampled]
        for row, one in rows:
            if one.failure is None:
                drafts[row] = one.draft
        self._drafted_at = time.perf_counter()
        return drafts

    def _room(self, one: Drafted) -> int:
        """Tokens that a request may still get; 0 if it has ended."""
        cached = one.request.cached
        if cached.output_token_ids and cached.output_token_ids[-1] in one.end_ids:
            return 0
        left = self._config.model_config.max_model_len - cached.num_tokens
        most = cached.sampling_params.max_tokens
        return int(left if most is None else min(left, most - len(cached.output_token_ids)))

    # Requests

    def take_failed(self) -> list[str]:
        """The requests that cannot go on, once."""
        failed = [name for name, one in self._requests.items() if one.failure is not None]
        for name in failed:
            one = self._requests.pop(name)
            _LOG.error("request %s failed: %s", name, one.failure)
            self._drafter.forget(one)
        return failed

    def _request(self, row: int) -> Drafted:
        name = self._runner.input_batch.req_ids[row]
        cached = self._runner.requests[name]
        if name not in self._requests:
            self._requests[name] = self._new_request(cached)
        one = self._requests[name]
        one.request.cached = cached  # vLLM makes another when a request goes on with a further prompt
        return one

    def _new_request(self, cached: Any) -> Drafted:
        params, failure = cached.sampling_params, None
        policy: Policy = ThresholdPolicy(1.0)
        try:
            policy = self._policy(params.extra_args or {})
        except CollmError as error:
            failure = error
        generator = None
        if params.seed is not None:
            generator = torch.Generator(device=self._runner.device).manual_seed(params.seed)
        end_ids = {params.eos_token_id, *(params.stop_token_ids or ())} - {None}
        state = State(cached, generator)
        return Drafted(
            state, policy, cached.num_prompt_tokens, params.temperature, end_ids, params.seed, failure=failure
        )

    def _policy(self, given: dict[str, Any]) -> Policy:
        if given.get(HEAD, self._head) != self._head:
            raise MismatchError(f"the engine holds the head {self._head}, and {given[HEAD]} was asked for")
        policy = policy_of(given) or self._default
        if policy is None:
            raise ConfigError(f"the collaboration is not calibrated; give vllm_xargs {{{THRESHOLD!r}: ..}}")
        return policy

    def _texts(self, rows: Rows) -> dict[Drafted, Any]:
        batch = self._runner.input_batch
        return {one: batch.token_ids_cpu[row, : batch.num_tokens_no_spec[row]] for row, one in rows}

    def _forget_ended(self) -> None:
        for name in [name for name in self._requests if name not in self._runner.requests]:
            self._drafter.forget(self._requests.pop(name))

    # Times

    def _note_pass(self, tokens: int, *, is_step: bool) -> None:
        """The assistant has read so many tokens since the drafts were made."""
        self._is_step = is_step
        if is_step:
            self._drafter.pace.saw_reading(tokens, time.perf_counter() - self._drafted_at)

    def _note_round(self) -> None:
        now = time.perf_counter()
        if self._is_step:
            self._drafter.pace.saw_round(self._num_given, now - self._began_at)
        self._began_at = now


@dataclass
class State:
    """What vLLM knows of a request, and the generator of one with a seed."""

    cached: Any
    generator: torch.Generator | None


Rows = Sequence[tuple[int, Drafted]]
"""Requests with their rows in vLLM's batch."""


@dataclass(frozen=True)
class Given:
    """What a request gets; with `authors` the log-probabilities beside its tokens say who wrote them."""

    decisions: list[Decision]
    authors: bool

    @property
    def tokens(self) -> list[int]:
        return [one.draw.token_id for one in self.decisions if one.draw is not None]

    @property
    def logprobs(self) -> list[list[tuple[int, float]]]:
        """For each token its log-probability, and those beside it."""
        return [
            [(draw.token_id, draw.logprob), *([_author(one, draw)] if self.authors else []), *draw.top]
            for one in self.decisions
            if (draw := one.draw) is not None
        ]


def _author(decision: Decision, draw: Draw) -> tuple[int, float]:
    taken = {draw.token_id, *(token_id for token_id, _ in draw.top)}
    defer_prob = decision.defer_prob
    return author_token(decision.author, taken), math.log(defer_prob) if defer_prob > 0 else -math.inf


def _wants_authors(one: Drafted) -> bool:
    return bool((one.request.cached.sampling_params.extra_args or {}).get(AUTHORS))


def _place(spec: Any, row: int, count: int) -> int:
    """Which of the assistant's logits follow the first `count` tokens of a row's draft."""
    if spec is None:
        return row
    if count == spec.num_draft_tokens[row]:
        return int(spec.bonus_logits_indices[row])
    return int(spec.target_logits_indices[sum(spec.num_draft_tokens[:row]) + count])


def _output(given: Sequence[Given | None], device: torch.device, *, logprobs: bool) -> SamplerOutput:
    """As vLLM wants it: tokens (R, n), padded, and log-probabilities at R n places."""
    fewest = 2 if None in given else 1  # what is not padded gets a token
    width = max(fewest, *(len(one.decisions) for one in given if one is not None), 1)
    tokens = torch.full((len(given), width), _NO_TOKEN, dtype=torch.int32)
    for row, one in enumerate(given):
        if one is not None:
            tokens[row, : len(one.decisions)] = torch.tensor(one.tokens)
    return SamplerOutput(tokens.to(device), _logprobs(given, width) if logprobs else None)


def _logprobs(given: Sequence[Given | None], width: int) -> LogprobsTensors:
    """Of `width` places for each row; ranks are not known of what the base wrote, and 0 for all."""
    listed = [one.logprobs if one is not None else [] for one in given]
    columns = max((len(place) for of_row in listed for place in of_row), default=1)
    ids = torch.zeros(len(given), width, columns, dtype=torch.int32)
    values = torch.full(ids.shape, -math.inf)
    for row, of_row in enumerate(listed):
        for place, pairs in enumerate(of_row):
            ids[row, place, : len(pairs)] = torch.tensor([token_id for token_id, _ in pairs])
            values[row, place, : len(pairs)] = torch.tensor([value for _, value in pairs])
    ranks = torch.zeros(len(given) * width, dtype=torch.int32)
    return LogprobsTensors(ids.flatten(0, 1), values.flatten(0, 1), ranks)


def _told(decide: Callable[[], T]) -> T:
    """What the first rank of a tensor-parallel group decides."""
    group = get_tp_group()
    if group.world_size == 1:
        return decide()
    return cast(T, group.broadcast_object(decide() if group.rank_in_group == 0 else None, src=0))


def _read_a_token(runner: ModelRunner) -> int:
    slot = runner.open()
    runner.extend({slot: [0]})
    return slot


def _device_of(config: Any) -> str:
    device = config.device_config.device
    return f"cuda:{torch.cuda.current_device()}" if device.type == "cuda" else str(device)


def check_version(version: str) -> None:
    """Raise a ConfigError for another vLLM than this was made for."""
    if not version.startswith(f"{TESTED}."):
        raise ConfigError(
            f"this is vLLM {version}, and one engine was made for {TESTED}: it relies on vLLM's insides, which change; "
            f"install 'vllm=={TESTED}.*', or serve base and assistant by servers of their own"
        )


def _loaded(path: str, device: str) -> tuple[LanguageModel, DeferralHead, Calibration | None]:
    """Of a collaboration all but the assistant."""
    directory = artefact.local_directory(path, None)
    manifest = artefact.read_manifest(directory)
    artefact.check_contained(directory)
    if len(manifest.assistants) != 1:
        raise ConfigError(f"one engine holds one assistant, {path} has {len(manifest.assistants)}")
    spec = replace(artefact.base_of(manifest, directory), device=device)
    tokenizer = load_tokenizer(spec)
    identity = TokenizerIdentity.of(tokenizer)
    artefact.check_tokenizer(identity, manifest, directory)
    member = artefact.with_adapter(spec, manifest, directory)
    (base,) = load_members([member], tokenizer, vocab_size=identity.vocab_size)
    head = artefact.read_head(directory, manifest.head)
    return cast(LanguageModel, base), head, artefact.read_calibration(directory)


def _wrap_model_runner() -> None:
    """Have vLLM's model runner ask a `Proposer` for what requests get, in place of its rejection sampler."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    if getattr(GPUModelRunner, "collm", False):
        return
    ordinary_sample, ordinary_tokens = GPUModelRunner._sample, GPUModelRunner.sample_tokens
    ordinary_fits = GPUModelRunner._input_fits_in_drafter

    def proposer_of(runner: Any) -> Proposer | None:
        drafter = getattr(runner, "drafter", None)
        return drafter if isinstance(drafter, Proposer) else None

    @wraps(ordinary_sample)
    def _sample(self: Any, logits: Tensor, spec_decode_metadata: Any) -> SamplerOutput:
        proposer = proposer_of(self)
        if proposer is None:
            return ordinary_sample(self, logits, spec_decode_metadata)
        return proposer.sample(self, logits, spec_decode_metadata)

    @wraps(ordinary_tokens)
    def sample_tokens(self: Any, grammar_output: Any) -> Any:
        output = ordinary_tokens(self, grammar_output)
        proposer = proposer_of(self)
        failed = proposer.take_failed() if proposer is not None else []
        if failed:
            output.num_nans_in_logits = {**(output.num_nans_in_logits or {}), **dict.fromkeys(failed, FAILED)}
        return output

    @wraps(ordinary_fits)
    def _input_fits_in_drafter(self: Any, metadata: Any) -> bool:
        return proposer_of(self) is not None or ordinary_fits(self, metadata)  # drafts end where the context does

    GPUModelRunner._sample, GPUModelRunner.sample_tokens = _sample, sample_tokens
    GPUModelRunner._input_fits_in_drafter = _input_fits_in_drafter
    GPUModelRunner.collm = True
