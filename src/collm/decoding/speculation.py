"""When work pays: how long passes take, how often guesses hold, and what follows for drafts and groups.

Nothing here can change a token; it decides only what is read together. Costs are seconds per token of output, in the
steady state of a simple throughput model. Letters: B active sequences, T(n) seconds of a forward pass over n new
tokens, rate the share of tokens that are deferred.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace

_MEMORY = 0.1  # weight of the newest observation
_SETTLED = 3  # observations after which one slow pass no longer counts for much
_GAIN = 0.9  # a plan must promise less than this share of the plain cost: its model is rough


class PassTimes:
    """T(n) of one model, learnt while decoding: a running mean around each power of two, straight lines between."""

    def __init__(self) -> None:
        self._points: dict[int, tuple[int, float, float]] = {}  # bucket -> observations, tokens, seconds
        self._line: list[tuple[float, float]] = []  # tokens and seconds, in order

    def record(self, tokens: int, seconds: float) -> None:
        """One pass over `tokens` new tokens took `seconds`."""
        bucket = tokens.bit_length()
        count, mean_tokens, mean_seconds = self._points.get(bucket, (0, float(tokens), seconds))
        if count < _SETTLED:  # first passes also pay for memory and kernels that are made once
            mean_seconds = min(mean_seconds, seconds)
        else:
            mean_seconds += _MEMORY * (min(seconds, 2 * mean_seconds) - mean_seconds)
        mean_tokens += _MEMORY * (tokens - mean_tokens)
        self._points[bucket] = count + 1, mean_tokens, mean_seconds
        self._line = [point[1:] for _, point in sorted(self._points.items())]

    def at(self, tokens: float) -> float:
        """T(tokens); beyond what was seen, as the nearest that was: untried sizes look cheap, and so get tried."""
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
    """How often guesses about one sequence would have held; observed on every token, whether or not one was made.

    Attributes:
        start: a token is deferred if the one before it was the base's.
        run: a token is deferred if the one before it was deferred to the same assistant.
        agree: an assistant writes what the base would have written.
        lookup: the text goes on as prompt lookup says, where it says something.
    """

    start: float = 0.3
    run: float = 0.3
    agree: float = 0.1
    lookup: float = 0.1

    @property
    def rate(self) -> float:
        """Share of tokens that are deferred in the long run, 0.01 to 1."""
        return min(max(self.start / max(self.start + 1 - self.run, 0.01), 0.01), 1.0)

    def saw(self, previous: int, author: int, predicted: int | None, token_id: int) -> None:
        """`author` wrote `token_id` after a token of `previous`; lookup had predicted `predicted`, if anything."""
        if previous == 0:
            self.start = _moved(self.start, author != 0)
        else:
            self.run = _moved(self.run, author == previous)
        if predicted is not None:
            self.lookup = _moved(self.lookup, predicted == token_id)

    def saw_answer(self, agreed: bool) -> None:
        """An assistant was asked and wrote what the base would have written, or did not."""
        self.agree = _moved(self.agree, agreed)

    def copy(self) -> AcceptanceRates:
        return replace(self)


def _moved(value: float, happened: bool) -> float:
    return value + _MEMORY * (happened - value)


def expected_run(chance: float, length: int) -> float:
    """1 + chance + .. + chance^length: tokens that hold of a certain one and `length` guesses after it."""
    return sum(chance**i for i in range(length + 1))


def lookup_length(acceptance: AcceptanceRates, base: PassTimes, assistant: PassTimes, active: int, longest: int) -> int:
    """Tokens of a prompt lookup draft.

    With E = E[tokens that hold], one more than the guesses that do: least (T_b(B) / B + T_b(B + r) - T_b(B) + what an
    assistant spends on the r + 1 - E tokens that do not, if some position among them is deferred) / E.
    """

    def cost(r: int) -> float:
        holding = expected_run(acceptance.lookup, r)
        wasted = min(1.0, acceptance.rate * r) * (assistant.at(active + r + 1 - holding) - assistant.at(active))
        longer = max(0.0, base.at(active + r) - base.at(active))  # measured, so not always monotone
        return (base.at(active) / active + longer + wasted) / holding

    return _cheapest(cost, range(longest + 1))


def guess_depth(acceptance: AcceptanceRates, base: PassTimes, assistant: PassTimes, active: int, longest: int) -> int:
    """Deferred positions to gather before one assistant call, the base writing its own guess at all but the last.

    With chance q that a guess is right, a call serves E = 1 + q + .. + q^(r-1) of r positions; what was written and
    read after the first wrong guess, (r - E) / rate tokens, is lost. Least cost per deferral served.
    """

    def cost(r: int) -> float:
        served = expected_run(acceptance.agree, r - 1)
        lost = (r - served) / acceptance.rate * base.at(active) / active
        return (assistant.at(active * r / acceptance.rate) / active + lost) / served

    return _cheapest(cost, range(1, longest + 1))


def ahead_length(acceptance: AcceptanceRates, base: PassTimes, assistant: PassTimes, longest: int) -> int:
    """Tokens an assistant writes ahead in one sequence's run of deferrals, for the base to check in one pass.

    Saves passes of the base and risks one of the assistant for each token ahead that the base rejects.
    """

    def cost(r: int) -> float:
        passes = (1 + r) * assistant.at(1) + base.at(1 + r)
        return passes / expected_run(acceptance.run, r)

    return _cheapest(cost, range(longest + 1))


def run_length(start: float, first: float, further: float, host: float, longest: int) -> int:
    """Tokens that the base reads on with, each its own argmax, before the host looks at what it said.

    A step takes the host's time once, the first pass and a further one for each token. Whatever follows a deferral is
    lost: of B sequences B (1 - start)^i still write at pass i. Least seconds per token kept.
    """

    def cost(r: int) -> float:
        return (host + first + r * further) / expected_run(1 - start, r)

    return _cheapest(cost, range(max(longest, 0) + 1))


def wait_steps(start: float, run: float, base: PassTimes, assistant: PassTimes, active: int, longest: int) -> int:
    """Further passes of the base, in which fewer and fewer sequences write, to make before an assistant is called.

    In a cycle of k passes and a call, sequences that were just served defer with chance `run`, others with `start`;
    those that defer stop. Least (sum over passes of T_b(sequences still writing) + T_a(tokens of the cycle)) / tokens
    of the cycle, each token being read by the assistant once.
    """

    def cost(waits: int) -> float:
        served = active * start
        for _ in range(4):  # to the fixed point: as many are served as deferred
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
    """The plan of least cost; the first unless another clearly beats it."""
    best = min(plans, key=cost)
    return best if cost(best) < _GAIN * cost(plans[0]) else plans[0]
