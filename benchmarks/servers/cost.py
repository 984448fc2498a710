"""What decoding across servers costs: what a server is made of, the requests of one completion, and their time.

One completion of N tokens, D of them deferred, with no other at its servers, takes

    T = N s_0 + D s_1 + R_0 o_0 + D o_1 + c_0 U_0 + c_1 U_1                                                      (1)

where 0 is the base's server and 1 the assistant's, and of each server

    s  a decode step of one sequence: `step_s + step_per_sequence_s`. The base takes one for every token, whoever writes
       it: where it defers, its step gives the row that says so.
    o  what a request costs before its first step: `round_trip_s + handling_s + prefill_s`.
    R  requests to the base: D + 1, or D if the last token is deferred.
    c  `prefill_s_per_token`.
    U  tokens that its requests read beyond the one that each step reads anyway.

A prefix cache keeps whole blocks of B tokens, so a request reads the last, partly filled block again. With the text up
to token m known to a server, a request at length n > m reads n - B floor(m / B) tokens. The base resumes one token
later (n = m + 1): 1 to B of them, (B + 1) / 2 on average. The assistant reads, over all its requests, the text once,
and as much of a block again at each. Larger blocks (16 on most GPUs, 32 to 128 on a CPU) make each deferral dearer, by
(B - 1) / 2 (c_0 + c_1).

From (1), leaving out prompts, the assistant alone, N s_1, is faster from about this deferral rate on:

    (s_1 - s_0 - c_1) / (s_1 + o_0 + o_1 + (B - 1) / 2 (c_0 + c_1))                                              (2)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from collm.core.types import BASE
from collm.errors import ConfigError


@dataclass(frozen=True)
class Server:
    """One server, in seconds.

    Attributes:
        round_trip_s: of any request, while its server may serve others: wire, client, scheduling.
        step_s: of a step of the model, whatever is in it.
        step_per_sequence_s: of a step, for each sequence in it.
        prefill_s_per_token: of a step, for each token that it reads beyond one per sequence.
        prefill_s: of a step, for each request that begins in it.
        handling_s: of any request, while its server lets no other in: one process speaks HTTP.
        logprob_s: to write and read one log-probability of an answer, in that process.
        max_batch: most sequences of a step, vLLM's `--max-num-seqs`.
        block_tokens: of a block of its prefix cache, vLLM's `--block-size`.

    Raises:
        ConfigError: a value out of range.
    """

    round_trip_s: float
    step_s: float
    step_per_sequence_s: float = 0.0
    prefill_s_per_token: float = 0.0
    prefill_s: float = 0.0
    handling_s: float = 0.0
    logprob_s: float = 0.0
    max_batch: int = 256
    block_tokens: int = 16

    def __post_init__(self) -> None:
        for name, value in ((field.name, getattr(self, field.name)) for field in fields(self)):
            if not 0 <= value < math.inf:
                raise ConfigError(f"{name} is {value}, expected seconds or a number of at least 0")
        if self.max_batch < 1 or self.block_tokens < 1 or self.step(1) == 0:
            raise ConfigError(
                f"a step of one sequence takes {self.step(1)} s, of {self.max_batch} at most, and a block of the cache "
                f"holds {self.block_tokens} tokens; expected more than 0 of each"
            )

    def step(self, sequences: int) -> float:
        """Seconds of a decode step."""
        return self.step_s + self.step_per_sequence_s * sequences

    def handling(self, call: Call) -> float:
        """Seconds of a request in the process that speaks HTTP."""
        return self.handling_s + self.logprob_s * call.logprobs

    def reading(self, call: Call) -> float:
        """Seconds that a request adds to its first step."""
        return self.prefill_s + self.prefill_s_per_token * (call.unread - 1)


@dataclass(frozen=True)
class Call:
    """One request.

    Attributes:
        author: whose server it goes to, 0 the base's.
        unread: tokens of its prompt that the server's cache does not hold, at least 1.
        steps: tokens that it generates, among them the row by which a base defers.
        logprobs: log-probabilities that its answer holds beyond its tokens' own.
    """

    author: int
    unread: int
    steps: int
    logprobs: int = 0


@dataclass(frozen=True)
class Job:
    """One completion: the tokens of its text, and the requests that make it, one after the other."""

    tokens: int
    calls: tuple[Call, ...]


class _Caches:
    """What each server knows of a sequence."""

    def __init__(self, servers: Sequence[Server]) -> None:
        self._servers, self._known = servers, [0] * len(servers)

    def read(self, author: int, length: int, after: int) -> int:
        """Tokens that a prompt of `length` makes a server read, which knows the first `after` when it has answered."""
        block = self._servers[author].block_tokens
        kept = self._known[author] // block * block  # a prompt is longer than what is known
        self._known[author] = after
        return length - kept


def collaboration(authors: Sequence[int], prompt_tokens: int, servers: Sequence[Server]) -> Job:
    """As `VllmEngine` asks: the base goes on until it defers, then an assistant writes one token.

    Args:
        authors: who writes each token, 0 the base.
        prompt_tokens: at least 1; no server knows them.
        servers: of the base and the assistants.
    """
    caches, calls = _Caches(servers), []
    start = end = prompt_tokens  # of what the base is being asked to continue
    for author in authors:
        if author != BASE:
            calls.append(Call(BASE, caches.read(BASE, start, end), end - start + 1))
            calls.append(Call(author, caches.read(author, end, end), 1))
            start = end + 1
        end += 1
    if end > start:
        calls.append(Call(BASE, caches.read(BASE, start, end), end - start))
    return Job(len(authors), tuple(calls))


def alone(author: int, tokens: int, prompt_tokens: int) -> Job:
    """One author writes everything, in one request."""
    return Job(tokens, (Call(author, prompt_tokens, tokens),))


def token_by_token(authors: Sequence[int], prompt_tokens: int, servers: Sequence[Server], vocab_size: int) -> Job:
    """As the code of Co-LLM's authors asks (clinicalml/co-llm): one request to the base for each token, and one to an
    assistant for each that is deferred, each answered with the log-probabilities of the whole vocabulary."""
    caches, calls = _Caches(servers), []
    for length, author in enumerate(authors, start=prompt_tokens):
        for asked in (BASE, author) if author != BASE else (BASE,):
            calls.append(Call(asked, caches.read(asked, length, length), 1, vocab_size))
    return Job(len(authors), tuple(calls))


def seconds(job: Job, servers: Sequence[Server]) -> float:
    """Time of a completion that has its servers to itself: equation (1), whoever is asked for what."""
    return sum(
        server.round_trip_s + server.handling(call) + server.reading(call) + call.steps * server.step(1)
        for call in job.calls
        for server in [servers[call.author]]
    )


def calibrated(measured: Mapping[str, Any]) -> Server:
    """A server from what was measured of it alone.

    Args:
        measured: "round_trip_s", of one request for one token whose prompt is one token, from sending it to having read
            its answer; "step_s_at_batch", seconds between two tokens of a stream, by how many streams there are at once
            (at least two numbers); "prefill_s_per_token". Where known also "requests_per_s", how many such requests it
            answers when asked many at once (otherwise requests do not hinder each other outside of steps); "prefill_s",
            "logprob_s", "max_batch" and "block_tokens" as of `Server`.

    Raises:
        ConfigError: something is missing, unknown or out of range.
    """
    known = {"round_trip_s", "prefill_s_per_token", "step_s_at_batch", "requests_per_s"}
    kept = {"prefill_s", "logprob_s", "max_batch", "block_tokens"}
    if unknown := sorted(set(measured) - known - kept):
        raise ConfigError(f"a server's measurements hold {unknown[0]!r}, expected {', '.join(sorted(known | kept))}")
    try:
        points = {int(size): float(value) for size, value in measured["step_s_at_batch"].items()}
        once, per_token = float(measured["round_trip_s"]), float(measured["prefill_s_per_token"])
        per_request = 1 / float(measured["requests_per_s"]) if "requests_per_s" in measured else 0.0
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise ConfigError(
            f"a server's measurements cannot be read ({type(error).__name__}: {error}); expected numbers above 0 for "
            "round_trip_s and prefill_s_per_token, and seconds by number of streams for step_s_at_batch"
        ) from error
    fixed, per_sequence = _line(points)
    step = fixed + per_sequence
    if once < step * (1 - 1e-9):
        raise ConfigError(
            f"a request for one token takes {once} s and a step in it {step:g} s; expected the whole to take longer, "
            "from sending the request to having read its answer: measure again while nothing else runs"
        )
    outside = max(once - step, 0.0)
    handling = min(per_request, outside)
    given = {name: measured[name] for name in kept & set(measured)}
    return Server(outside - handling, fixed, per_sequence, per_token, handling_s=handling, **given)


def _line(points: Mapping[int, float]) -> tuple[float, float]:
    """a and b, neither below 0, of the line a + b n that is nearest to the points by least squares."""
    if len(points) < 2:
        raise ConfigError(f"step_s_at_batch holds {len(points)} numbers of streams, expected at least two")
    mean_n, mean_s = sum(points) / len(points), sum(points.values()) / len(points)
    slope = sum((n - mean_n) * s for n, s in points.items()) / sum((n - mean_n) ** 2 for n in points)
    if slope <= 0:
        return mean_s, 0.0
    if mean_s < slope * mean_n:
        return 0.0, sum(n * s for n, s in points.items()) / sum(n * n for n in points)
    return mean_s - slope * mean_n, slope
