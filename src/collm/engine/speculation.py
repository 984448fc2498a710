"""Planning of draft lengths and waiting times from measured pass times and acceptance rates.

Plans affect speed only and never change a token. Costs are seconds per output token in the steady state of a simple
throughput model. B is the number of active sequences, T(n) the seconds of a forward pass over n new tokens, and rate
the share of deferred tokens.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from collm.core.types import BASE

_MEMORY = 0.1  # weight of the newest observation
_SETTLED = 3  # observations after which a single slow pass has little weight
_LONGEST = 16  # drafts that are looked at for their cost
_GAIN = 0.9  # a plan must cost less than this share of the default, because the cost model is rough


class PassTimes:
    """T(n) of one model, measured while decoding: moving averages of neighbouring n, with linear interpolation."""

    def __init__(self) -> None:
        self._points: dict[tuple[int, int], tuple[int, float, float]] = {}  # bucket -> observations, tokens, seconds
        self._line: list[tuple[float, float]] = []  # tokens and seconds, in order

    def record(self, tokens: int, seconds: float) -> None:
        """Record a pass over `tokens` new tokens that took `seconds`."""
        length = tokens.bit_length()
        bucket = length, tokens >> max(length - 3, 0)  # four for each power of two
        count, mean_tokens, mean_seconds = self._points.get(bucket, (0, float(tokens), seconds))
        if count < _SETTLED:  # first passes include one-time costs of memory and kernels
            mean_seconds = min(mean_seconds, seconds)
        else:
            mean_seconds += _MEMORY * (min(seconds, 2 * mean_seconds) - mean_seconds)
        mean_tokens += _MEMORY * (tokens - mean_tokens)
        self._points[bucket] = count + 1, mean_tokens, mean_seconds
        self._line = [point[1:] for _, point in sorted(self._points.items())]

    def at(self, tokens: float) -> float:
        """T(tokens). Outside the measured range it is the nearest measurement, so that larger sizes get tried."""
        line = self._line
        if not line:
            return 0.0
        after = bisect_right(line, (tokens, math.inf))
        if after in (0, len(line)):
            return line[max(after - 1, 0)][1]
        (n0, t0), (n1, t1) = line[after - 1], line[after]
        return t0 + (t1 - t0) * (tokens - n0) / (n1 - n0)


@dataclass
class AcceptanceRates:
    """Acceptance rates of draft tokens of one sequence. Every token is observed, whether or not it was drafted.

    Attributes:
        start: rate at which a token is deferred after a token of the base.
        run: rate at which a token is deferred after a token deferred to the same assistant.
        agree: rate at which an assistant writes the token that the base would have written, where the base defers.
        stands: the same where the base writes and a judge or a policy that sees all authors decides.
        judged: number of observations of `stands`. The first ones weigh more.
        lookup: rate at which a token equals the one predicted by prompt lookup.
        previous: the author of the last token.
    """

    start: float = 0.3
    run: float = 0.3
    agree: float = 0.1
    lookup: float = 0.1
    previous: int = BASE
    stands: float = 0.1
    judged: int = 0

    @property
    def rate(self) -> float:
        """Long-run share of deferred tokens, 0.01 to 1."""
        return min(max(self.start / max(self.start + 1 - self.run, 0.01), 0.01), 1.0)

    def observe_token(self, author: int, predicted: int | None, token_id: int) -> None:
        """Observe that `author` wrote `token_id`, where lookup predicted `predicted`."""
        if self.previous == BASE:
            self.start += _MEMORY * ((author != BASE) - self.start)
        else:
            self.run += _MEMORY * ((author == self.previous) - self.run)
        if predicted is not None:
            self.lookup += _MEMORY * ((predicted == token_id) - self.lookup)
        self.previous = author

    def observe_agreement(self, agreed: bool) -> None:
        """Observe whether an assistant wrote the token that the base would have written."""
        self.agree += _MEMORY * (agreed - self.agree)

    def observe_stand(self, stands: bool) -> None:
        """Observe whether a token of the base stood."""
        self.judged += 1
        self.stands += max(_MEMORY, 1 / (self.judged + 1)) * (stands - self.stands)

    def copy(self) -> AcceptanceRates:
        """The rates for a new sequence."""
        return replace(self, previous=BASE)


def expected_run(chance: float, length: int) -> float:
    """1 + chance + .. + chance^length: expected accepted tokens of one final token and `length` drafts after it."""
    return sum(chance**i for i in range(length + 1))


def lookup_length(acceptance: AcceptanceRates, base: PassTimes, assistant: PassTimes, active: int, longest: int) -> int:
    """Choose the length r of a prompt lookup draft.

    With E = E[accepted tokens + 1], minimises (T_b(B) / B + T_b(B + r) - T_b(B) + the assistant's time for the
    r + 1 - E rejected tokens, if one of them is deferred) / E.
    """

    def cost(r: int) -> float:
        accepted = expected_run(acceptance.lookup, r)
        wasted = min(1.0, acceptance.rate * r) * (assistant.at(active + r + 1 - accepted) - assistant.at(active))
        longer = max(0.0, base.at(active + r) - base.at(active))  # measured times need not be monotone
        return (base.at(active) / active + longer + wasted) / accepted

    return _cheapest(cost, range(longest + 1))


def guess_depth(acceptance: AcceptanceRates, base: PassTimes, assistant: PassTimes, active: int, longest: int) -> int:
    """Choose the number r of deferred positions per assistant call; the base drafts its own guess at all but the last.

    If a guess is right with probability q, a call serves E = 1 + q + .. + q^(r-1) of r positions. The
    (r - E) / rate tokens after the first wrong guess are lost. Minimises the cost per served deferral.
    """

    def cost(r: int) -> float:
        served = expected_run(acceptance.agree, r - 1)
        lost = (r - served) / acceptance.rate * base.at(active) / active
        return (assistant.at(active * r / acceptance.rate) / active + lost) / served

    return _cheapest(cost, range(1, longest + 1))


def pays(
    chances: Sequence[float], stands: float, base: PassTimes, assistants: Sequence[PassTimes], active: int
) -> bool:
    """Whether the base should draft one more token before assistants decide about all.

    The assistants then read a token more. It is lost, with the pass of the base, unless all tokens before it stand. If
    they do, it saves what a token costs at the best draft length r: min over r of
    (T_a(r B) / B + (r - E) T_b(B) / B) / E, with E = 1 + .. + stands^(r-1).

    Args:
        chances: the probability that each token of the draft stands.
        stands: the same on average.
        assistants: those that read each token.
    """

    def reading(r: int) -> float:
        return sum(each.at(active * r) for each in assistants) / active

    def cost(r: int) -> float:
        served = expected_run(stands, r - 1)
        return (reading(r) + (r - served) * drafting) / served

    chance, drafting, length = math.prod(chances), base.at(active) / active, len(chances)
    longer = max(0.0, reading(length + 1) - reading(length))  # measured times need not be monotone
    return chance * min(map(cost, range(1, _LONGEST + 1))) > longer + (1 - chance) * drafting


def assistant_draft_length(acceptance: AcceptanceRates, base: PassTimes, assistant: PassTimes, longest: int) -> int:
    """Choose the number of tokens that an assistant drafts in a run of deferrals, for the base to check in one pass.

    A draft saves passes of the base and wastes a pass of the assistant for each rejected token.
    """

    def cost(r: int) -> float:
        passes = (1 + r) * assistant.at(1) + base.at(1 + r)
        return passes / expected_run(acceptance.run, r)

    return _cheapest(cost, range(longest + 1))


def wait_steps(start: float, run: float, base: PassTimes, assistant: PassTimes, active: int, longest: int) -> int:
    """Choose how many further passes the base makes before an assistant is called.

    In a cycle of k passes and a call, sequences that were just served defer with probability `run`, others with
    `start`, and a sequence that defers stops. Minimises (sum over passes of T_b(sequences still writing) +
    T_a(tokens of the cycle)) / tokens of the cycle. The assistant reads each token once.
    """

    def cost(waits: int) -> float:
        served = active * start
        for _ in range(4):  # iterate to the fixed point at which as many sequences are served as deferred
            writing, seconds, tokens = float(active), 0.0, 0.0
            for step in range(waits + 1):
                seconds += base.at(writing)
                deferring = served * run + (writing - served) * start if step == 0 else writing * start
                writing -= deferring
                tokens += writing
            served = active - writing
        return (seconds + assistant.at(tokens + served)) / (tokens + served)

    return _cheapest(cost, range(longest + 1))


def _cheapest(cost: Callable[[int], float], plans: range) -> int:
    """The plan of least cost, or the first plan if no other is clearly better."""
    best = min(plans, key=cost)
    return best if cost(best) < _GAIN * cost(plans[0]) else plans[0]
