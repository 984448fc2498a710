"""The base inside one engine: it drafts until its head defers, or until another pass of it would not pay.

The assistant is the engine's own model. Its pass over a draft is the reading that it needs anyway, and what it says
after the draft is the deferred token. So every draft is accepted, and nothing is computed twice.
"""

from __future__ import annotations

import logging
import random
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
from collm.core.types import BASE
from collm.decoding.draws import Draw
from collm.errors import CollmError, ConfigError, ModelFailure
from collm.models.kv_cache import in_pages
from collm.models.runner import ModelRunner, common_prefix
from collm.vllm import OF_ONE_ENGINE, POLICY, PREFIX, THRESHOLD

_KNOWN = (THRESHOLD, *OF_ONE_ENGINE)
_LOG = logging.getLogger(__name__)
_DECAY = 0.95
"""What a measurement of long ago is worth after each further one."""
_SPREAD = 1e-3
"""Passes of nearly one size say nothing about the price of a token."""
_FEW_TOKENS = 4
"""A pass of so many tokens in each row is a step; longer ones read prompts."""


@dataclass(frozen=True)
class Decision:
    """Who writes one position.

    Attributes:
        defer_prob: 1 - P(Z = 0) there.
        author: as the policy decided.
        draw: what the author writes; None while the assistant has not been asked.
    """

    defer_prob: float
    author: int
    draw: Draw | None = None


@dataclass(eq=False)
class Drafted:
    """A request of the engine, as the base sees it.

    Attributes:
        request: the engine's own.
        policy: names the author of each position; it may not consult the assistant.
        prompt_length: tokens before the first that is decided about.
        temperature: of the request.
        end_ids: tokens after which nothing is drafted.
        seed: of the policy's draws.
        decisions: about the positions after the certain text, in order; only the last may be a deferral.
        deferred: how many certain tokens are the assistant's.
        slot: of the base's cache; None while it holds nothing.
        failure: why the request cannot go on.
    """

    request: Any
    policy: Policy
    prompt_length: int
    temperature: float = 0.0
    end_ids: Collection[int] = ()
    seed: int | None = None
    decisions: list[Decision] = field(default_factory=list)
    deferred: int = 0
    slot: int | None = None
    failure: Exception | None = None

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._uniforms: list[float] = []

    @property
    def written(self) -> list[int]:
        """The tokens that the base wrote after the certain text."""
        return [one.draw.token_id for one in self.decisions if one.draw is not None]

    @property
    def draft(self) -> list[int]:
        """Those that the assistant is to read; the last decision says what follows them."""
        return self.written[: len(self.decisions) - 1] if self.decisions else []

    @property
    def is_decided(self) -> bool:
        """Nothing is to be decided before the engine's next pass."""
        last = self.decisions[-1] if self.decisions else None
        return last is not None and (last.draw is None or last.draw.token_id in self.end_ids)

    def uniform(self, position: int) -> float:
        """The draw from [0, 1) that belongs to a position's author, as `decoding.sequence.Sequence.uniform`."""
        while len(self._uniforms) <= position:
            self._uniforms.append(self._random.random())
            self._random.random()  # the token's own
        return self._uniforms[position]

    def settle(self, read: Sequence[int]) -> list[Decision]:
        """What has become certain: the decisions about the tokens that the assistant has read, and the one after them.

        Args:
            read: what the engine took for a draft; of another text the common beginning counts.
        """
        count = common_prefix(list(read), self.draft)
        settled, self.decisions = self.decisions[: count + 1], self.decisions[count + 1 :]
        self.deferred += settled[-1].author != BASE
        return settled


Texts = Mapping[Drafted, Sequence[int]]
"""The certain tokens of requests, prompt and completion; a slice of one is read, not all of it."""

DrawTokens = Callable[[Tensor, Sequence[Drafted]], list[Draw]]
"""Draws a token for each of R requests from logits (R, V)."""


class Drafter:
    """Lets the base write, in batches over all requests.

    Args:
        runner: of the base.
        head: of the collaboration.
        most: passes of the base in one round, at least 1.
    """

    def __init__(self, runner: ModelRunner, head: DeferralHead, *, most: int) -> None:
        self.runner = runner
        self.head = head
        self.most = most
        self.pace = Pace()
        self._used: dict[int, Drafted] = {}  # slot -> whose it is, the longest unused first

    def draft(self, texts: Texts, room: Mapping[Drafted, int], draw: DrawTokens) -> None:
        """Decide about the next positions of each request, at least about one.

        A request that cannot go on has a `failure` then; the others are not touched by it.

        Args:
            texts: the certain tokens of each request.
            room: how many tokens it may still get.
            draw: draws the base's tokens.
        """
        while open_ := [one for one in texts if self._is_open(one, room[one])]:
            if all(one.decisions for one in open_) and not self.pace.pays(len(open_)):
                return
            self.decide(open_, texts, draw)

    def _is_open(self, one: Drafted, room: int) -> bool:
        return one.failure is None and not one.is_decided and len(one.decisions) < min(self.most, room)

    def decide(self, requests: Sequence[Drafted], texts: Texts, draw: DrawTokens) -> None:
        """Decide about one position of each request, as `draft` does."""
        asked = [one for one in requests if not _always_defers(one.policy)]
        for one in requests:
            if one not in asked:
                one.decisions.append(Decision(1.0, 1))
        for part in self._parts(asked, texts):
            try:
                self._make_room(part, texts)
                self._decide_part(part, texts, draw)
            except Exception as error:
                if not isinstance(error, CollmError):
                    _LOG.exception("a pass of the base broke down")
                for one in part:
                    self._fail(one, error)

    @torch.inference_mode()
    def _decide_part(self, requests: Sequence[Drafted], texts: Texts, draw: DrawTokens) -> None:
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
            author = self._author(one, texts[one], author_probs, defer_prob)
            if author == BASE:
                writing.append((row, one, defer_prob))
            else:
                one.decisions.append(Decision(defer_prob, author))
        if writing:
            self._write(writing, logits_of([row for row, *_ in writing]), draw)
        if max(map(len, unseen.values())) <= _FEW_TOKENS:
            self.pace.saw_pass(len(requests), time.perf_counter() - start)

    def _write(self, writing: Sequence[tuple[int, Drafted, float]], logits: Tensor, draw: DrawTokens) -> None:
        """Let the base write one token of each request, from logits (R, V)."""
        is_finite = logits.isfinite().all(-1).tolist()
        for (_, one, _), is_sound in zip(writing, is_finite, strict=True):
            if not is_sound:
                self._fail(one, ModelFailure(f"{self.runner.name} gave logits that are not finite"))
        sound = [place for place, is_sound in enumerate(is_finite) if is_sound]
        draws = draw(logits[sound], [writing[place][1] for place in sound]) if sound else []
        for place, drawn in zip(sound, draws, strict=True):
            _, one, defer_prob = writing[place]
            one.decisions.append(Decision(defer_prob, BASE, drawn))

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

    def _author(self, one: Drafted, text: Sequence[int], author_probs: Sequence[float], defer_prob: float) -> int:
        position = len(text) - one.prompt_length + len(one.decisions)
        view = StepView(position, one.deferred, author_probs, defer_prob, one.temperature, one.uniform(position))
        return one.policy.author(view)

    # Slots

    def forget(self, one: Drafted) -> None:
        """The request has ended, or must be read anew."""
        if one.slot is not None:
            self._used.pop(one.slot, None)
            self.runner.close(one.slot, wipe=one.failure is not None)
            one.slot = None

    def _fail(self, one: Drafted, error: Exception) -> None:
        one.failure = error
        self.forget(one)

    def _parts(self, requests: Sequence[Drafted], texts: Texts) -> list[list[Drafted]]:
        """The requests in as many passes as the base's cache needs."""
        parts: list[list[Drafted]] = []
        left = slots = 0
        for one in requests:
            size = self._size(one, texts)
            if size > left or not slots:
                parts.append([])
                left, slots = self.runner.capacity, self.runner.most_slots
            parts[-1].append(one)
            left, slots = left - size, slots - 1
        return parts

    def _make_room(self, part: Sequence[Drafted], texts: Texts) -> None:
        """Close the slots of others, the longest unused first, until these fit."""
        others = [one for one in self._used.values() if one not in part]
        left = self.runner.capacity - sum(self._size(one, texts) for one in part)
        left -= sum(in_pages(self.runner.length(one.slot)) for one in others if one.slot is not None)
        slots = self.runner.most_slots - len(part) - len(others)
        for one in others:
            if left >= 0 and slots >= 0:
                return
            assert one.slot is not None
            left, slots = left + in_pages(self.runner.length(one.slot)), slots + 1
            self.forget(one)

    def _size(self, one: Drafted, texts: Texts) -> int:
        return in_pages(len(texts[one]) + len(one.written))


class Pace:
    """Measures whether another pass of the base pays before the assistant's.

    A round that gives n tokens in s seconds is worth prolonging by a pass that gives m tokens, one for each request
    that takes part, if m / (seconds of the pass + m b) > n / s, where b is what a further token costs in the
    assistant's pass (Dinkelbach 1967). All of it is measured while the engine runs.
    """

    def __init__(self) -> None:
        self._passes: dict[int, float] = {}  # requests, rounded up to a power of two -> seconds
        self._tokens = self._seconds = 0.0
        self._sums = [0.0] * 5  # weights, tokens, tokens squared, seconds, tokens times seconds

    def saw_pass(self, requests: int, seconds: float) -> None:
        """A pass of the base, one step for each request."""
        size = _rounded(requests)
        self._passes[size] = _DECAY * self._passes.get(size, seconds) + (1 - _DECAY) * seconds

    def saw_reading(self, tokens: int, seconds: float) -> None:
        """A pass of the assistant over so many tokens of drafts."""
        new = [1.0, tokens, tokens**2, seconds, tokens * seconds]
        self._sums = [_DECAY * old + one for old, one in zip(self._sums, new, strict=True)]

    def saw_round(self, tokens: int, seconds: float) -> None:
        """A whole round, from one pass of the assistant to the next."""
        self._tokens = _DECAY * self._tokens + tokens
        self._seconds = _DECAY * self._seconds + seconds

    @property
    def seconds_per_token(self) -> float:
        """What a further token costs in the assistant's pass: the slope of its times, by least squares.

        A slow pass among passes of nearly one size says little about it. It is never taken for more than the share of
        a token in all passes.
        """
        weight, tokens, squares, seconds, products = self._sums
        spread = weight * squares - tokens**2
        if spread <= _SPREAD * squares:
            return 0.0
        return min(max((weight * products - tokens * seconds) / spread, 0.0), seconds / tokens)

    def pays(self, requests: int) -> bool:
        """Whether to let the base go on with so many requests; True until that is known."""
        seconds = self._passes.get(_rounded(requests))
        if seconds is None or not self._seconds:
            return True
        return requests * self._seconds > (seconds + requests * self.seconds_per_token) * self._tokens


def _rounded(requests: int) -> int:
    return 1 << (requests - 1).bit_length()


def _always_defers(policy: Policy) -> bool:
    """The base need not even read."""
    return isinstance(policy, SingleAuthorPolicy) and policy.writer != BASE


def policy_of(given: Mapping[str, Any]) -> Policy | None:
    """What a request's `vllm_xargs` say of the rule; None if nothing.

    Raises:
        ConfigError: an unknown name or a value that means nothing, or a rule that one engine cannot follow.
    """
    unknown = sorted(name for name in given if name.startswith(PREFIX) and name not in _KNOWN)
    if unknown:
        raise ConfigError(f"vllm_xargs has {unknown[0]!r}, expected of {', '.join(_KNOWN)} some")
    if THRESHOLD in given and POLICY in given:
        raise ConfigError(f"{THRESHOLD} and {POLICY} both came; give one of them")
    if THRESHOLD in given:
        threshold = given[THRESHOLD]
        if isinstance(threshold, bool) or not isinstance(threshold, int | float):
            raise ConfigError(f"{THRESHOLD} is {threshold!r}, expected a number from -1 to 1")
        return ThresholdPolicy(threshold)
    if POLICY not in given:
        return None
    policy = policy_named(str(given[POLICY]))
    check_policy(policy)
    return policy


def check_policy(policy: Policy) -> None:
    """Raise a ConfigError for a policy that one engine cannot follow."""
    if isinstance(policy, CombiningPolicy) or policy.consults(1):
        raise ConfigError(
            f"{policy} compares what both authors would write at every token, and in one engine the assistant reads "
            "only after the base has decided; use engine 'local'"
        )
    if isinstance(policy, SingleAuthorPolicy) and policy.writer not in (BASE, 1):
        raise ConfigError(f"{policy} names author {policy.writer}, expected 0 or 1: one engine holds one assistant")
