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
_GAIN = 0.95  # a plan must promise less than this share of the plain cost


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
class Odds:
    """How often guesses about one sequence would have held; observed on every token, whether or not one was made.

    Attributes:
        rate: the token is deferred.
        run: a token is deferred if the one before it was.
        agree: an assistant writes what the base would have written.
        lookup: the text goes on as prompt lookup says, where it says something.
    """

    rate: float = 0.3
    run: float = 0.3
    agree: float = 0.3
    lookup: float = 0.3

    def saw(self, previous: int, author: int, predicted: int | None, token_id: int) -> None:
        """`author` wrote `token_id` after a token of `previous`; lookup had predicted `predicted`, if anything."""
        self.rate = _moved(self.rate, author != 0)
        if previous != 0:
            self.run = _moved(self.run, author == previous)
        if predicted is not None:
            self.lookup = _moved(self.lookup, predicted == token_id)

    def saw_answer(self, agreed: bool) -> None:
        """An assistant was asked and wrote what the base would have written, or did not."""
        self.agree = _moved(self.agree, agreed)

    def copy(self) -> Odds:
        return replace(self)


def _moved(value: float, happened: bool) -> float:
    return value + _MEMORY * (happened - value)


def expected_run(chance: float, length: int) -> float:
    """1 + chance + .. + chance^length: tokens that hold of a certain one and `length` guesses after it."""
    return sum(chance**i for i in range(length + 1))


def lookup_length(odds: Odds, base: PassTimes, active: int, longest: int) -> int:
    """Tokens of a prompt lookup draft: least (T(B) / B + T(B + r) - T(B)) / E[tokens that hold]."""

    def cost(r: int) -> float:
        return (base.at(active) / active + base.at(active + r) - base.at(active)) / expected_run(odds.lookup, r)

    return _cheapest(cost, range(longest + 1))


def guess_depth(odds: Odds, base: PassTimes, assistant: PassTimes, active: int, longest: int) -> int:
    """Deferred positions to gather before one assistant call, the base writing its own guess at all but the last.

    With chance q that a guess is right, a call serves E = 1 + q + .. + q^(r-1) of r positions; what the base wrote
    after the first wrong guess, (r - E) / rate tokens, is lost. Least cost per deferral served.
    """
    rate = max(odds.rate, 0.01)

    def cost(r: int) -> float:
        served = expected_run(odds.agree, r - 1)
        lost = (r - served) / rate * base.at(active) / active
        return (assistant.at(active * r / rate) / active + lost) / served

    return _cheapest(cost, range(1, longest + 1))


def ahead_length(odds: Odds, base: PassTimes, assistant: PassTimes, active: int, longest: int) -> int:
    """Tokens an assistant writes ahead of the base in a run of deferrals, for the base to check in one pass.

    Saves passes of the base and risks one of the assistant for each token ahead that the base rejects.
    """

    def cost(r: int) -> float:
        passes = (1 + r) * assistant.at(active) + base.at(active * (1 + r))
        return passes / expected_run(odds.run, r)

    return _cheapest(cost, range(longest + 1))


def group_size(rate: float, base: PassTimes, assistant: PassTimes, active: int) -> int:
    """How many of B sequences to let wait before an assistant is called.

    A call for w sequences reads w / rate tokens and is followed by as many from the base, in passes of B - w / 2
    sequences on average, since w wait more and more: least T_a(w / rate) * rate / w + T_b(B - w / 2) / (B - w / 2).
    """
    rate = max(rate, 0.01)

    def cost(w: int) -> float:
        writing = active - (w - 1) / 2
        return assistant.at(w / rate) * rate / w + base.at(writing) / writing

    return _cheapest(cost, range(min(max(1, int(rate * active)), active), active + 1))


def _cheapest(cost: Callable[[int], float], plans: range) -> int:
    """The plan of least cost; the first unless another clearly beats it."""
    best = min(plans, key=cost)
    return best if cost(best) < _GAIN * cost(plans[0]) else plans[0]
