"""A collaboration inside vLLM. The base proposes drafts for vLLM's speculative decoding, and every draft is accepted.

vLLM's model is the assistant. vLLM creates a `Proposer` in each of its workers (`speculative_config`, method
custom_class) and calls `plugin.register` in each of its processes. The code depends on parts of model runner V1 that
`hooks` lists and checks. No file of vLLM is edited. Engines without a `Proposer` are unaffected.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from vllm.distributed import get_tp_group
from vllm.v1.outputs import LogprobsTensors, SamplerOutput

from collm.artefact import load_parts, local_directory
from collm.core.policies import Policy, ThresholdPolicy
from collm.core.sampling import seeded
from collm.engine.decision import Decision, Draw
from collm.engine.runner import ModelRunner
from collm.errors import CollmError, ConfigError, MismatchError
from collm.models.language_model import LanguageModel
from collm.models.members import load_members
from collm.text.guards import TokenizerIdentity
from collm.vllm import FAILED, HEAD, SETTINGS, THRESHOLD, author_token
from collm.vllm.drafting import Drafted, Drafter, policy_of
from collm.vllm.export import head_digest
from collm.vllm.hooks import check_hooks, replaces
from collm.vllm.inline_sampling import sample, wants_authors

T = TypeVar("T")
Entries = list[list[tuple[int, float]]]
"""New tokens of a request: for each, ids with log-probabilities, its own first."""
_LOG = logging.getLogger(__name__)
_NO_TOKEN = -1
"""Padding of sampled token ids, as in vLLM."""


class Proposer:
    """The base in a worker of vLLM.

    With tensor parallelism, the first rank holds the base and decides. It broadcasts its decisions to the other ranks.
    """

    def __init__(self, vllm_config: Any) -> None:
        check_hooks()
        self._config = vllm_config
        self._requests: dict[str, Drafted] = {}
        self._drafted_at = self._sampled_at = 0.0
        _wrap_model_runner()
        if get_tp_group().rank_in_group == 0:
            self._load()

    def load_model(self, *rest: Any) -> None:
        """Do nothing. vLLM calls this after it has loaded the assistant; the base is loaded already."""

    def _load(self) -> None:
        settings = (self._config.additional_config or {}).get(SETTINGS) or {}
        if "collaboration" not in settings:
            wanted = f'{{"{SETTINGS}": {{"collaboration": "DIR"}}}}'
            raise ConfigError(f"additional_config names no collaboration; give --additional-config '{wanted}'")
        device = self._config.device_config.device
        device = f"cuda:{torch.cuda.current_device()}" if device.type == "cuda" else str(device)
        parts = load_parts(local_directory(settings["collaboration"], None), device=device, dequantize=True)
        if len(parts.assistants) != 1:
            raise ConfigError(
                f"{settings['collaboration']} has {len(parts.assistants)} assistants, expected 1 in one engine; use a "
                "server for each model"
            )
        vocab_size = TokenizerIdentity.of(parts.tokenizer).vocab_size
        base = cast(LanguageModel, load_members([parts.base], parts.tokenizer, vocab_size=vocab_size)[0])
        self._vocab_size = base.vocab_size
        longest = self._config.model_config.max_model_len
        if base.max_length is not None and base.max_length < longest:
            raise MismatchError(
                f"the base reads at most {base.max_length} tokens, but requests may have {longest}; start vLLM with "
                f"--max-model-len {base.max_length}"
            )
        runner = ModelRunner(base, cache_memory=settings.get("cache_memory"))
        runner.prepare(self._config.scheduler_config.max_num_seqs)
        slot = runner.open()
        runner.extend({slot: [0]})  # allocates the cache before vLLM measures the free memory
        runner.close(slot)
        self._head = head_digest(parts.head)
        self._default = None if parts.calibration is None else ThresholdPolicy(parts.calibration.best().threshold)
        most = self._config.speculative_config.num_speculative_tokens + 1
        self._drafter = Drafter(runner, parts.head.to(base.device), most=most, draw=self._draw)

    def _draw(self, logits: Tensor, requests: Sequence[Drafted], drafted: Sequence[Sequence[int]]) -> list[Draw]:
        return sample(self._runner.sampler, logits.to(self._runner.device), requests, drafted)

    # After the assistant's pass

    def sample(self, runner: Any, logits: Tensor, spec: Any) -> SamplerOutput:
        """Choose the new tokens of each request: its draft, and the next token, by the base or the assistant.

        Args:
            logits: the assistant's logits before the first and after each draft token, shape (T, V).
            spec: vLLM's metadata, which assigns logits to requests; None if there are no drafts.
        """
        self._runner = runner
        new = self._on_first_rank(lambda: self._new_tokens(logits, spec), None)
        return _output(new, logits.device, logprobs=runner.input_batch.max_num_logprobs is not None)

    def _new_tokens(self, logits: Tensor, spec: Any) -> list[Entries | None]:
        """New tokens for each row of the batch; None for a row that gets no token."""
        batch = self._runner.input_batch
        batch.generators.clear()  # tokens are drawn here; vLLM would rewind generators of rows without a token
        counts = [0] * batch.num_reqs if spec is None else list(spec.num_draft_tokens)
        read = iter([] if spec is None else spec.draft_token_ids.tolist())
        drafts = [list(islice(read, count)) for count in counts]
        is_reading = self._runner.discard_request_mask.np[: batch.num_reqs]
        rows = {row: self._request(row) for row in range(batch.num_reqs) if not is_reading[row]}
        undecided = [one for one in rows.values() if not one.decisions and one.failure is None]
        now, times = time.perf_counter(), self._drafter.times
        self._drafter.decide(undecided)
        final = {row: one.accept(drafts[row]) for row, one in rows.items() if one.failure is None}
        if not undecided and len(rows) == len(counts):
            times.assistant.record(sum(counts) + len(rows), now - self._drafted_at)
            times.saw_round(sum(map(len, final.values())), now - self._sampled_at)
        self._sampled_at = now
        deferred = {row: decisions for row, decisions in final.items() if decisions[-1].choice is None}
        if deferred:
            # the logits of a request are those before its first draft token, and after each
            places = [sum(counts[:row]) + row + len(decisions) - 1 for row, decisions in deferred.items()]
            decided = [(rows[row], decisions) for row, decisions in deferred.items()]
            self._drafter.write("the assistant", decided, logits[places][:, : self._vocab_size])
        new: list[Entries | None] = [None] * batch.num_reqs
        for row, decisions in final.items():
            if rows[row].failure is None:
                new[row] = [_entries(one, with_author=wants_authors(rows[row])) for one in decisions]
        return new

    # Before its next pass

    def propose(self, sampled: Sequence[Sequence[int]], *rest: Any, **options: Any) -> list[list[int]]:
        """Draft tokens for all requests in the batch. vLLM calls this after it has added the tokens from `sample`.
        `sampled` are those of each row, none while the prompt is being read.
        """
        return self._on_first_rank(lambda: self._drafts(sampled), [])

    def _on_first_rank(self, work: Callable[[], list[T]], default: T) -> list[T]:
        """Broadcast the result of `work` on the first rank. If it raises, every request in the batch fails, and the
        result is `default` for each row.
        """
        group, result = get_tp_group(), None
        if group.rank_in_group == 0:
            try:
                result = work()
            except Exception as error:
                _LOG.exception("the collaboration failed")
                result = [default] * self._runner.input_batch.num_reqs
                for row in range(len(result)):
                    self._request(row).failure = error
        return cast("list[T]", result if group.world_size == 1 else group.broadcast_object(result, src=0))

    def _drafts(self, sampled: Sequence[Sequence[int]]) -> list[list[int]]:
        for name in self._requests.keys() - self._runner.requests.keys():
            self._drafter.forget(self._requests.pop(name))
        rows = {row: self._request(row) for row, new in enumerate(sampled) if new}
        rows = {row: one for row, one in rows.items() if one.room > 0}
        self._drafter.draft(list(rows.values()))
        self._drafted_at = time.perf_counter()
        return [rows[row].draft if row in rows and rows[row].failure is None else [] for row in range(len(sampled))]

    # Requests

    def take_failed(self) -> list[str]:
        """Remove the failed requests and return their ids."""
        failed = [name for name, one in self._requests.items() if one.failure is not None]
        for name in failed:
            one = self._requests.pop(name)
            _LOG.error("request %s failed: %s", name, one.failure)
            self._drafter.forget(one)
        return failed

    def _request(self, row: int) -> Drafted:
        """The request in a row of vLLM's batch, with its current text."""
        batch = self._runner.input_batch
        name = batch.req_ids[row]
        state = self._runner.requests[name]
        if name not in self._requests:
            self._requests[name] = self._new_request(state)
        one = self._requests[name]
        one.state = state  # vLLM replaces it when a request continues with a further prompt
        one.text = batch.token_ids_cpu[row, : batch.num_tokens_no_spec[row]]
        output_ids, most = state.output_token_ids, state.sampling_params.max_tokens
        left = self._config.model_config.max_model_len - state.num_tokens
        has_ended = output_ids and output_ids[-1] in one.end_ids
        one.room = 0 if has_ended else min(left, left if most is None else most - len(output_ids))
        return one

    def _new_request(self, state: Any) -> Drafted:
        params, failure = state.sampling_params, None
        policy: Policy | None = self._default
        xargs = params.extra_args or {}
        try:
            if xargs.get(HEAD, self._head) != self._head:
                raise MismatchError(f"the request expects the head {xargs[HEAD]}, but the engine has {self._head}")
            policy = policy_of(xargs) or policy
            if policy is None:
                raise ConfigError(f"the collaboration is not calibrated; give vllm_xargs {{{THRESHOLD!r}: ..}}")
        except CollmError as error:
            failure = error
        generator = None
        if params.seed is not None:
            generator = torch.Generator(device=self._runner.device)
            generator.manual_seed(seeded(params.seed).getrandbits(63))  # of which a CPU's generator uses 32
        return Drafted(
            state,
            policy or ThresholdPolicy(1.0),
            prompt_length=state.num_prompt_tokens,
            temperature=params.temperature,
            end_ids={params.eos_token_id, *(params.stop_token_ids or ())} - {None},
            seed=params.seed,
            generator=generator,
            failure=failure,
        )


def _entries(decision: Decision, *, with_author: bool) -> list[tuple[int, float]]:
    """Token ids with log-probabilities: the new token, its author if wanted, and the most probable ones."""
    draw = cast(Draw, decision.choice)
    own = [(draw.token_id, draw.logprob)]
    if with_author:
        taken = {draw.token_id, *(token_id for token_id, _ in draw.top)}
        log_defer_prob = math.log(decision.defer_prob) if decision.defer_prob > 0 else -math.inf
        own.append((author_token(decision.author, taken), log_defer_prob))
    return [*own, *draw.top]


def _output(new: Sequence[Entries | None], device: torch.device, *, logprobs: bool) -> SamplerOutput:
    """Convert to vLLM's format: tokens (R, n), padded, and log-probabilities of R n tokens. All ranks are 0, because
    those of the base's tokens are unknown.
    """
    fewest = 2 if None in new else 1  # vLLM takes a single column for tokens, without padding
    width = max(fewest, *(len(one or ()) for one in new))
    places = [pairs for one in new for pairs in [*(one or ()), *[[]] * (width - len(one or ()))]]
    columns = max(1, *map(len, places))
    tokens = torch.tensor([pairs[0][0] if pairs else _NO_TOKEN for pairs in places], dtype=torch.int32)
    padded = [[*pairs, *[(0, -math.inf)] * (columns - len(pairs))] for pairs in places]
    ids, values = torch.tensor(padded, dtype=torch.float64).unbind(-1)  # fp64 holds token ids exactly
    found = LogprobsTensors(ids.int(), values.float(), torch.zeros(len(places), dtype=torch.int32))
    return SamplerOutput(tokens.view(len(new), width).to(device), found if logprobs else None)


def _wrap_model_runner() -> None:
    """Patch vLLM's model runner: a `Proposer` chooses new tokens in place of the rejection sampler."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    def proposer_of(runner: Any) -> Proposer | None:
        drafter = getattr(runner, "drafter", None)
        return drafter if isinstance(drafter, Proposer) else None

    @replaces(GPUModelRunner)
    def _sample(original: Any, self: Any, logits: Tensor, spec_decode_metadata: Any) -> SamplerOutput:
        proposer = proposer_of(self)
        given = (self, logits, spec_decode_metadata)
        return original(*given) if proposer is None else proposer.sample(*given)

    @replaces(GPUModelRunner)
    def sample_tokens(original: Any, self: Any, grammar_output: Any) -> Any:
        output = original(self, grammar_output)
        proposer = proposer_of(self)
        failed = proposer.take_failed() if proposer is not None else []
        if failed:
            output.num_nans_in_logits = {**(output.num_nans_in_logits or {}), **dict.fromkeys(failed, FAILED)}
        return output

    @replaces(GPUModelRunner)
    def _input_fits_in_drafter(original: Any, self: Any, metadata: Any) -> bool:
        return proposer_of(self) is not None or original(self, metadata)  # drafts never exceed the context
