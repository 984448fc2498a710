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
from collm.core.head import DeferralHead
from collm.core.named import policy_named
from collm.core.objective import author_logprobs, defer_probs
from collm.core.policies import Policy, SingleAuthorPolicy, StepView, ThresholdPolicy
from collm.core.sampling import seeded
from collm.core.types import BASE
from collm.engine.kv_cache import in_pages
from collm.engine.runner import ModelRunner
from collm.engine.sequence import Draw
from collm.errors import CollmError, ConfigError, ModelFailure
from collm.text.token_ids import common_prefix
from collm.vllm import OF_ONE_ENGINE, POLICY, PREFIX, THRESHOLD

_KNOWN_KEYS = (THRESHOLD, *OF_ONE_ENGINE)
_LOG = logging.getLogger(__name__)
_DECAY = 0.95
"""Factor by which the weight of a measurement shrinks with each further measurement."""
_SPREAD = 1e-3
"""Least relative variance of pass sizes from which the time per token can be estimated."""
_FEW_TOKENS = 4
"""A pass with at most this many tokens in each row is a decoding step. Longer passes read prompts."""


@dataclass(frozen=True)
class DraftDecision:
    """The decision about one position.

    Attributes:
        defer_prob: 1 - P(Z = 0).
        author: the author that the policy chose.
        draw: the author's token; None until the assistant has been asked.
    """

    defer_prob: float
    author: int
    draw: Draw | None = None


@dataclass(eq=False)
class Drafted:
    """A request in the engine and the base's decisions about it.

    Attributes:
        request: the engine's own object for the request.
        policy: chooses the author of each position; must not consult the assistant.
        prompt_length: number of prompt tokens; decisions start after them.
        temperature: the request's temperature.
        end_ids: tokens after which nothing is drafted.
        seed: seed of the policy's random numbers.
        decisions: decisions about the positions after the final tokens, in order; only the last may be a deferral.
        deferred: number of final tokens that the assistant wrote.
        slot: slot in the base's cache; None if the request has none.
        failure: the error that ended the request; None if there was none.
    """

    request: Any
    policy: Policy
    prompt_length: int
    temperature: float = 0.0
    end_ids: Collection[int] = ()
    seed: int | None = None
    decisions: list[DraftDecision] = field(default_factory=list)
    deferred: int = 0
    slot: int | None = None
    failure: Exception | None = None

    def __post_init__(self) -> None:
        self._random = seeded(self.seed)
        self._uniforms: list[float] = []

    @property
    def written(self) -> list[int]:
        """Tokens that the base wrote after the final tokens."""
        return [one.draw.token_id for one in self.decisions if one.draw is not None]

    @property
    def draft(self) -> list[int]:
        """Tokens for the assistant to read. The last decision is about the position after them."""
        return self.written[: len(self.decisions) - 1] if self.decisions else []

    @property
    def is_decided(self) -> bool:
        """Whether there is nothing to decide before the engine's next pass."""
        last = self.decisions[-1] if self.decisions else None
        return last is not None and (last.draw is None or last.draw.token_id in self.end_ids)

    def uniform(self, position: int) -> float:
        """The random number in [0, 1) for a position's author, as in `engine.sequence.Sequence.uniform`."""
        while len(self._uniforms) <= position:
            self._uniforms.append(self._random.random())
            self._random.random()  # the number for the token itself
        return self._uniforms[position]

    def accept(self, read: Sequence[int]) -> list[DraftDecision]:
        """Remove and return the decisions that became final.

        These are the decisions about tokens that the assistant has read, and the next one.

        Args:
            read: draft tokens that the engine read. If they differ from the draft, only the common prefix counts.
        """
        count = common_prefix(list(read), self.draft)
        settled, self.decisions = self.decisions[: count + 1], self.decisions[count + 1 :]
        self.deferred += settled[-1].author != BASE
        return settled


Texts = Mapping[Drafted, Sequence[int]]
"""Final tokens of each request, prompt and completion. Only the needed slices are read."""

DrawTokens = Callable[[Tensor, Sequence[Drafted]], list[Draw]]
"""Draws one token for each of R requests from logits (R, V)."""


class Drafter:
    """Decodes with the base, in batches over all requests.

    Args:
        runner: runner of the base.
        head: the deferral head.
        most: largest number of base passes in one round, at least 1.
    """

    def __init__(self, runner: ModelRunner, head: DeferralHead, *, most: int) -> None:
        self.runner = runner
        self.head = head
        self.most = most
        self.times = RoundTimes()
        self._used: dict[int, Drafted] = {}  # slot -> its request, the least recently used first

    def draft(self, texts: Texts, room: Mapping[Drafted, int], draw: DrawTokens) -> None:
        """Decide about the next positions of each request, at least one for each.

        If a request fails, its `failure` is set. Other requests are unaffected.

        Args:
            texts: final tokens of each request.
            room: number of tokens that each request may still generate.
            draw: draws the base's tokens.
        """
        while undecided := [
            one
            for one in texts
            if one.failure is None and not one.is_decided and len(one.decisions) < min(self.most, room[one])
        ]:
            if all(one.decisions for one in undecided) and not self.times.pays(len(undecided)):
                return
            self.decide(undecided, texts, draw)

    def decide(self, requests: Sequence[Drafted], texts: Texts, draw: DrawTokens) -> None:
        """Decide about one position of each request. Failures are handled as in `draft`."""
        reading = []
        for one in requests:
            if isinstance(one.policy, SingleAuthorPolicy) and one.policy.writer != BASE:
                one.decisions.append(DraftDecision(1.0, 1))  # the base does not have to read any token
            else:
                reading.append(one)
        for batch in self._batches(reading, texts):
            try:
                self._make_room(batch, texts)
                self._decide_batch(batch, texts, draw)
            except Exception as error:
                if not isinstance(error, CollmError):
                    _LOG.exception("a forward pass of the base failed")
                for one in batch:
                    self._fail(one, error)

    @torch.inference_mode()
    def _decide_batch(self, requests: Sequence[Drafted], texts: Texts, draw: DrawTokens) -> None:
        start = time.perf_counter()
        unseen = {self._slot(one, texts[one]): self._unseen(one, texts[one]) for one in requests}
        hidden, logits_of = self.runner.extend_hidden(unseen)
        defer_logits = self.head(hidden.to(self.head.weight.device))
        probs = torch.cat([author_logprobs(defer_logits).exp(), defer_probs(defer_logits).unsqueeze(-1)], dim=-1)
        is_finite = (probs.isfinite().all(-1) & hidden.isfinite().all(-1).to(probs.device)).tolist()
        writing: list[tuple[int, Drafted, float]] = []
        for row, (one, (*author_probs, defer_prob)) in enumerate(zip(requests, probs.tolist(), strict=True)):
            if not is_finite[row]:
                self._fail(one, ModelFailure(f"{self.runner.name} gave hidden states that are not finite"))
                continue
            position = len(texts[one]) - one.prompt_length + len(one.decisions)
            view = StepView(position, one.deferred, author_probs, defer_prob, one.temperature, one.uniform(position))
            author = one.policy.author(view)
            if author == BASE:
                writing.append((row, one, defer_prob))
            else:
                one.decisions.append(DraftDecision(defer_prob, author))
        if writing:
            self._write(writing, logits_of([row for row, *_ in writing]), draw)
        if max(map(len, unseen.values())) <= _FEW_TOKENS:
            self.times.saw_pass(len(requests), time.perf_counter() - start)

    def _write(self, writing: Sequence[tuple[int, Drafted, float]], logits: Tensor, draw: DrawTokens) -> None:
        """Let the base write one token of each request, from logits (R, V)."""
        is_finite = logits.isfinite().all(-1).tolist()
        for (_, one, _), is_valid in zip(writing, is_finite, strict=True):
            if not is_valid:
                self._fail(one, ModelFailure(f"{self.runner.name} gave logits that are not finite"))
        valid = [row for row, is_valid in enumerate(is_finite) if is_valid]
        draws = draw(logits[valid], [writing[row][1] for row in valid]) if valid else []
        for row, drawn in zip(valid, draws, strict=True):
            _, one, defer_prob = writing[row]
            one.decisions.append(DraftDecision(defer_prob, BASE, drawn))

    def _slot(self, one: Drafted, text: Sequence[int]) -> int:
        if one.slot is None:
            one.slot = self.runner.open([*map(int, text), *one.written])
        self._used.pop(one.slot, None)
        self._used[one.slot] = one
        return one.slot

    def _unseen(self, one: Drafted, text: Sequence[int]) -> list[int]:
        assert one.slot is not None
        length = self.runner.length(one.slot)
        return [*map(int, text[length:]), *one.written[max(length - len(text), 0) :]]

    # Slots

    def forget(self, one: Drafted) -> None:
        """Close the slot of a request that ended or must be read again."""
        if one.slot is not None:
            self._used.pop(one.slot, None)
            self.runner.close(one.slot, wipe=one.failure is not None)
            one.slot = None

    def _fail(self, one: Drafted, error: Exception) -> None:
        one.failure = error
        self.forget(one)

    def _batches(self, requests: Sequence[Drafted], texts: Texts) -> list[list[Drafted]]:
        """Split the requests into batches that fit into the base's cache."""
        batches: list[list[Drafted]] = []
        left = slots = 0
        for one in requests:
            size = self._size(one, texts)
            if size > left or not slots:
                batches.append([])
                left, slots = self.runner.capacity, self.runner.most_slots
            batches[-1].append(one)
            left, slots = left - size, slots - 1
        return batches

    def _make_room(self, batch: Sequence[Drafted], texts: Texts) -> None:
        """Close slots of other requests, the least recently used first, until the batch fits."""
        others = [one for one in self._used.values() if one not in batch]
        left = self.runner.capacity - sum(self._size(one, texts) for one in batch)
        left -= sum(in_pages(self.runner.length(one.slot)) for one in others if one.slot is not None)
        slots = self.runner.most_slots - len(batch) - len(others)
        for one in others:
            if left >= 0 and slots >= 0:
                return
            assert one.slot is not None
            left, slots = left + in_pages(self.runner.length(one.slot)), slots + 1
            self.forget(one)

    def _size(self, one: Drafted, texts: Texts) -> int:
        return in_pages(len(texts[one]) + len(one.written))


class RoundTimes:
    """Predicts whether another pass of the base before the assistant's pass saves time.

    A round produces n tokens in s seconds. Another base pass adds m tokens, one for each request in it. It is worth its
    time if m / (seconds of the pass + m b) > n / s. Here b is the time that one more token adds to the assistant's pass
    (Dinkelbach 1967). All values are measured while the engine runs.
    """

    def __init__(self) -> None:
        self._passes: dict[int, float] = {}  # requests, rounded up to a power of two -> seconds
        self._tokens = self._seconds = 0.0
        self._sums = [0.0] * 5  # weights, tokens, tokens squared, seconds, tokens times seconds

    def saw_pass(self, requests: int, seconds: float) -> None:
        """Record a base pass that made one step for each request."""
        size = _rounded(requests)
        self._passes[size] = _DECAY * self._passes.get(size, seconds) + (1 - _DECAY) * seconds

    def saw_reading(self, tokens: int, seconds: float) -> None:
        """Record an assistant pass over this many draft tokens."""
        new = [1.0, tokens, tokens**2, seconds, tokens * seconds]
        self._sums = [_DECAY * old + one for old, one in zip(self._sums, new, strict=True)]

    def saw_round(self, tokens: int, seconds: float) -> None:
        """Record a round, from one assistant pass to the next."""
        self._tokens = _DECAY * self._tokens + tokens
        self._seconds = _DECAY * self._seconds + seconds

    @property
    def seconds_per_token(self) -> float:
        """Time that one more token adds to the assistant's pass: the least-squares slope of its pass times.

        If all passes have nearly the same size, a single slow pass distorts the slope. So the slope is limited to the
        mean time per token of all passes.
        """
        weight, tokens, squares, seconds, products = self._sums
        spread = weight * squares - tokens**2
        if spread <= _SPREAD * squares:
            return 0.0
        return min(max((weight * products - tokens * seconds) / spread, 0.0), seconds / tokens)

    def pays(self, requests: int) -> bool:
        """Whether another base pass for this many requests saves time. True until there are measurements."""
        seconds = self._passes.get(_rounded(requests))
        if seconds is None or not self._seconds:
            return True
        return requests * self._seconds > (seconds + requests * self.seconds_per_token) * self._tokens


def _rounded(requests: int) -> int:
    return 1 << (requests - 1).bit_length()


def policy_of(xargs: Mapping[str, Any]) -> Policy | None:
    """Read the policy from a request's `vllm_xargs`. Returns None if there is none.

    Raises:
        ConfigError: a key is unknown, a value is invalid, or one engine cannot follow the policy.
    """
    unknown = sorted(name for name in xargs if name.startswith(PREFIX) and name not in _KNOWN_KEYS)
    if unknown:
        raise ConfigError(f"vllm_xargs has the unknown key {unknown[0]!r}, expected any of {', '.join(_KNOWN_KEYS)}")
    if THRESHOLD in xargs and POLICY in xargs:
        raise ConfigError(f"vllm_xargs has both {THRESHOLD} and {POLICY}; give one of them")
    if THRESHOLD in xargs:
        threshold = xargs[THRESHOLD]
        if isinstance(threshold, bool) or not isinstance(threshold, int | float):
            raise ConfigError(f"{THRESHOLD} is {threshold!r}, expected a number from -1 to 1")
        return ThresholdPolicy(threshold)
    if POLICY not in xargs:
        return None
    policy = policy_named(str(xargs[POLICY]))
    check_policy(policy)
    return policy


def check_policy(policy: Policy) -> None:
    """Raise a ConfigError if one engine cannot follow a policy."""
    if isinstance(policy, CombiningPolicy) or policy.consults(1):
        raise ConfigError(
            f"{policy} compares what both authors would write at every token. In one engine the assistant reads "
            "only after the base has decided; use engine 'local'"
        )
    if isinstance(policy, SingleAuthorPolicy) and policy.writer not in (BASE, 1):
        raise ConfigError(
            f"{policy} names author {policy.writer}, expected 0 or 1, because one engine holds one assistant"
        )
