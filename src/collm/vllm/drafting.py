"""Drafting by the base inside one vLLM engine.

The base writes until its head defers, or until another pass would not save time. The assistant is the engine's own
model. It must read the base's tokens in any case, so it reads them as a draft. Its logits after the draft give the
deferred token. Therefore every draft is accepted, and nothing is computed twice.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from collm.core.combinations import CombiningPolicy
from collm.core.head import DeferralHead, author_logprobs, defer_probs
from collm.core.named import policy_named
from collm.core.policies import Policy, SingleAuthorPolicy, StepView, ThresholdPolicy
from collm.core.sampling import seeded
from collm.core.types import BASE
from collm.engine.decision import Decision, Draw
from collm.engine.kv_cache import in_pages
from collm.engine.runner import ModelRunner
from collm.engine.speculation import PassTimes
from collm.errors import CollmError, ConfigError, ModelFailure
from collm.text.token_ids import common_prefix
from collm.vllm import POLICY, THRESHOLD, read_threshold

_LOG = logging.getLogger(__name__)
_DECAY = 0.95
"""Factor by which the weight of a round shrinks with each further round."""
_FEW_TOKENS = 4
"""A pass with at most this many tokens in each row is a decoding step. Longer passes read prompts."""


@dataclass(eq=False)
class Drafted:
    """A request in the engine and the base's decisions about it.

    Attributes:
        state: the engine's own state of the request.
        prompt_length: number of prompt tokens; decisions start after them.
        end_ids: tokens after which nothing is drafted.
        seed: seed of the policy's random numbers.
        generator: the engine's random generator of a request with a seed.
        text: the final tokens, prompt and completion; set before the drafter is called. Only needed slices are read.
        room: number of tokens that the request may still generate; set likewise.
        decisions: decisions about the positions after the final tokens, in order; only the last may be a deferral.
        deferred: number of final tokens that the assistant wrote.
        slot: slot in the base's cache; None if the request has none.
    """

    state: Any
    policy: Policy
    prompt_length: int
    temperature: float = 0.0
    end_ids: Collection[int] = ()
    seed: int | None = None
    generator: torch.Generator | None = None
    failure: Exception | None = None
    text: Sequence[int] = ()
    room: int = 0
    decisions: list[Decision] = field(default_factory=list)
    deferred: int = 0
    slot: int | None = None

    def __post_init__(self) -> None:
        self._random = seeded(self.seed)
        self._uniforms: list[float] = []

    @property
    def draft(self) -> list[int]:
        """Tokens for the assistant to read. The last decision is about the position after them."""
        return written(self.decisions)[: len(self.decisions) - 1] if self.decisions else []

    @property
    def is_decided(self) -> bool:
        """Whether there is nothing to decide before the engine's next pass."""
        last = self.decisions[-1] if self.decisions else None
        return last is not None and (last.choice is None or last.choice.token_id in self.end_ids)

    def view(self, author_probs: Sequence[float], defer_prob: float) -> StepView:
        """What the policy sees at the next position. Random numbers are those of `engine.sequence.Sequence.uniform`."""
        position = len(self.text) - self.prompt_length + len(self.decisions)
        while len(self._uniforms) <= position:
            self._uniforms.append(self._random.random())
            self._random.random()  # the number for the token itself
        return StepView(position, self.deferred, author_probs, defer_prob, self.temperature, self._uniforms[position])

    def accept(self, read: Sequence[int]) -> list[Decision]:
        """Remove and return the final decisions: about the draft tokens that the engine read, and the next."""
        count = common_prefix(list(read), self.draft)
        final, self.decisions = self.decisions[: count + 1], self.decisions[count + 1 :]
        self.deferred += final[-1].author != BASE
        return final


@dataclass(eq=False)
class Drafter:
    """Decodes with the base, in batches over all requests. If a request fails, its `failure` is set; others go on.

    Args:
        most: largest number of base passes in one round, at least 1.
        draw: draws one token for each of R requests from logits (R, V). Also takes the tokens of each request that the
            engine's state does not have yet.
    """

    runner: ModelRunner
    head: DeferralHead
    most: int
    draw: Callable[[Tensor, Sequence[Drafted], Sequence[Sequence[int]]], list[Draw]]

    def __post_init__(self) -> None:
        self.times = RoundTimes()
        self._used: dict[int, Drafted] = {}  # slot -> its request, the least recently used first

    def draft(self, requests: Sequence[Drafted]) -> None:
        """Decide about the next positions of each request, at least one for each."""
        while undecided := [
            one
            for one in requests
            if one.failure is None and not one.is_decided and len(one.decisions) < min(self.most, one.room)
        ]:
            drafted = sum(len(one.decisions) for one in requests)
            if all(one.decisions for one in undecided) and not self.times.pays(len(undecided), drafted):
                return
            self.decide(undecided)

    def decide(self, requests: Sequence[Drafted]) -> None:
        """Decide about one position of each request."""
        reading = []
        for one in requests:
            if isinstance(one.policy, SingleAuthorPolicy) and one.policy.writer != BASE:
                one.decisions.append(Decision(1, 1.0, None, None))  # the base does not have to read any token
            else:
                reading.append(one)
        for batch in self._batches(reading):
            try:
                self._decide_batch(batch)
            except Exception as error:
                if not isinstance(error, CollmError):
                    _LOG.exception("a forward pass of the base failed")
                for one in batch:
                    self._fail(one, error)

    @torch.inference_mode()
    def _decide_batch(self, requests: Sequence[Drafted]) -> None:
        self._make_room(requests)
        start = time.perf_counter()
        unseen = dict(map(self._unseen, requests))
        hidden, logits_of = self.runner.extend_hidden(unseen)
        every = logits_of([*range(len(requests))]) if self.head.doubt else None  # else those of a few rows
        states = hidden.to(self.head.weight.device)
        defer_logits = self.head(states) if every is None else self.head.read(states, every)
        probs = torch.cat([author_logprobs(defer_logits).exp(), defer_probs(defer_logits).unsqueeze(-1)], dim=-1)
        is_finite = (probs.isfinite().all(-1) & hidden.isfinite().all(-1).to(probs.device)).tolist()
        for one, (*author_probs, defer_prob), valid in zip(requests, probs.tolist(), is_finite, strict=True):
            if valid:
                author = one.policy.author(one.view(author_probs, defer_prob))
                one.decisions.append(Decision(author, defer_prob, None, None))
            else:
                self._fail(one, ModelFailure(f"{self.runner.name} gave hidden states that are not finite"))
        rows = [row for row, one in enumerate(requests) if one.failure is None and one.decisions[-1].author == BASE]
        if rows:
            logits = logits_of(rows) if every is None else every[rows]
            self.write(self.runner.name, [(requests[row], requests[row].decisions) for row in rows], logits)
        if max(map(len, unseen.values())) <= _FEW_TOKENS:
            self.times.base.record(len(requests), time.perf_counter() - start)

    def write(self, author: str, decided: Sequence[tuple[Drafted, list[Decision]]], logits: Tensor) -> None:
        """Draw the token of each request's last decision from logits (R, V) of the named author."""
        is_valid = logits.amax(-1).isfinite().tolist()  # NaN is the largest, and -inf means a probability of 0
        for (one, _), valid in zip(decided, is_valid, strict=True):
            if not valid:
                self._fail(one, ModelFailure(f"{author} gave logits that are not finite"))
        rows = [row for row, valid in enumerate(is_valid) if valid]
        if rows:
            requests, decisions = zip(*(decided[row] for row in rows), strict=True)
            draws = self.draw(logits[rows], requests, [written(each) for each in decisions])
            for each, drawn in zip(decisions, draws, strict=True):
                each[-1].choice = drawn

    # Slots

    def _unseen(self, one: Drafted) -> tuple[int, list[int]]:
        """The request's slot and the tokens that the base has not read."""
        if one.slot is None:
            one.slot = self.runner.open([*map(int, one.text), *written(one.decisions)])
        self._used.pop(one.slot, None)
        self._used[one.slot] = one
        length = self.runner.length(one.slot)
        return one.slot, [*map(int, one.text[length:]), *written(one.decisions)[max(length - len(one.text), 0) :]]

    def forget(self, one: Drafted) -> None:
        """Close the slot of a request that ended or must be read again."""
        if one.slot is not None:
            self._used.pop(one.slot, None)
            self.runner.close(one.slot, wipe=one.failure is not None)
            one.slot = None

    def _fail(self, one: Drafted, error: Exception) -> None:
        one.failure = error
        self.forget(one)

    def _batches(self, requests: Sequence[Drafted]) -> list[list[Drafted]]:
        """Split the requests into batches that fit into the base's cache."""
        batches: list[list[Drafted]] = []
        left = slots = 0
        for one in requests:
            size = _size(one)
            if size > left or not slots:
                batches.append([])
                left, slots = self.runner.capacity, self.runner.most_slots
            batches[-1].append(one)
            left, slots = left - size, slots - 1
        return batches

    def _make_room(self, batch: Sequence[Drafted]) -> None:
        """Close slots of other requests, the least recently used first, until the batch fits."""
        kept = set(batch)
        lengths = {one: in_pages(self.runner.length(slot)) for slot, one in self._used.items() if one not in kept}
        left = self.runner.capacity - sum(map(_size, batch)) - sum(lengths.values())
        slots = self.runner.most_slots - len(batch) - len(lengths)
        for one, length in lengths.items():
            if left >= 0 and slots >= 0:
                return
            left, slots = left + length, slots + 1
            self.forget(one)


def written(decisions: Sequence[Decision]) -> list[int]:
    """The known tokens of these decisions."""
    return [one.choice.token_id for one in decisions if one.choice is not None]


def _size(one: Drafted) -> int:
    return in_pages(len(one.text) + len(written(one.decisions)))


class RoundTimes:
    """Predicts whether another pass of the base before the assistant's pass saves time.

    A round produces n tokens in s seconds. Another base pass adds m tokens, one for each request in it. It is worth its
    time if m / (seconds of the pass + seconds that m more tokens add to the assistant's pass) > n / s. Times of `base`
    are by the number of requests, and times of `assistant` by the number of tokens.
    """

    def __init__(self) -> None:
        self.base, self.assistant = PassTimes(), PassTimes()
        self._tokens = self._seconds = 0.0

    def saw_round(self, tokens: int, seconds: float) -> None:
        """Record a round, from one assistant pass to the next."""
        self._tokens = _DECAY * self._tokens + tokens
        self._seconds = _DECAY * self._seconds + seconds

    def pays(self, requests: int, drafted: int) -> bool:
        """Whether another base pass for these requests saves time, if the assistant must read so many tokens without
        it; True until there are measurements.
        """
        longer = self.assistant.at(drafted + requests) - self.assistant.at(drafted)
        seconds = self.base.at(requests) + max(longer, 0.0)  # measured times need not be monotone
        return not self._seconds or requests * self._seconds > seconds * self._tokens


def policy_of(xargs: Mapping[str, Any]) -> Policy | None:
    """Read the policy from a request's `vllm_xargs`. Returns None if there is none. Raises a ConfigError if a key is
    unknown, a value is invalid, or one engine cannot follow the policy.
    """
    try:
        threshold = read_threshold(xargs)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if POLICY not in xargs:
        return None if threshold is None else ThresholdPolicy(threshold)
    if threshold is not None:
        raise ConfigError(f"vllm_xargs has both {THRESHOLD} and {POLICY}; give one of them")
    policy = policy_named(str(xargs[POLICY]))
    check_policy(policy)
    return policy


def check_policy(policy: Policy) -> None:
    """Raise a ConfigError if one engine cannot follow a policy."""
    if isinstance(policy, CombiningPolicy) or policy.consults(1) or policy.judge is not None:
        raise ConfigError(
            f"{policy} compares what both authors would write at every token. In one engine the assistant reads "
            "only after the base has decided; use engine 'local'"
        )
    if isinstance(policy, SingleAuthorPolicy) and policy.writer not in (BASE, 1):
        raise ConfigError(
            f"{policy} names author {policy.writer}, expected 0 or 1, because one engine holds one assistant"
        )
