"""Cost of decoding across servers: the parameters of a server, the requests of one completion, and their time.

A completion of N tokens, of which D are deferred, takes the following time if no other completion uses its servers:

    T = N s_0 + D s_1 + R_0 o_0 + D o_1 + c_0 U_0 + c_1 U_1                                                      (1)

Index 0 stands for the base's server and 1 for the assistant's. For each server,

    s  is a decode step of one sequence: `step_s + step_per_sequence_s`. The base makes one for every token, whoever
       writes it. Where it defers, the step gives the row that names the assistant.
    o  is the cost of a request before its first step: `round_trip_s + handling_s + prefill_s`.
    R  is the number of requests to the base: D + 1, or D if the last token is deferred.
    c  is `prefill_s_per_token`.
    U  is the number of tokens that its requests read, beyond the one token that each step reads in any case.

A prefix cache keeps whole blocks of B tokens, so a request reads the last, partly filled block again. If a server knows
the text up to token m, a request at length n > m reads n - B floor(m / B) tokens. The base resumes one token later (n =
m + 1), so it reads 1 to B tokens, (B + 1) / 2 on average. The assistant reads the text once, over all its requests, and
an equal part of a block again at each request. Larger blocks (16 tokens on most GPUs, 32 to 128 on a CPU) make each
deferral more expensive, by (B - 1) / 2 (c_0 + c_1).

The assistant alone takes N s_1. From (1), without prompts, it is faster above about this deferral rate:

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
    """The parameters of one server. Times are in seconds.

    Attributes:
        round_trip_s: time of any request during which the server can serve others: network, client, scheduling.
        step_s: time of a model step, independent of its content.
        step_per_sequence_s: time of a step for each of its sequences.
        prefill_s_per_token: time of a step for each token that it reads beyond one per sequence.
        prefill_s: time of a step for each request that begins in it.
        handling_s: time of any request during which the server handles no other, because one process speaks HTTP.
        logprob_s: time to write and read one log-probability of an answer, in that process.
        max_batch: largest number of sequences in a step, vLLM's `--max-num-seqs`.
        block_tokens: size of a block of the prefix cache in tokens, vLLM's `--block-size`.

    Raises:
        ConfigError: a value is out of range.
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
                raise ConfigError(f"{name} is {value}, expected a finite number of at least 0")
        if self.max_batch < 1 or self.block_tokens < 1 or self.step(1) == 0:
            raise ConfigError(
                f"a step of one sequence takes {self.step(1)} s, max_batch is {self.max_batch} and block_tokens is "
                f"{self.block_tokens}; expected more than 0 for each"
            )

    def step(self, sequences: int) -> float:
        """Seconds of a decode step with this many sequences."""
        return self.step_s + self.step_per_sequence_s * sequences

    def handling(self, call: Call) -> float:
        """Seconds that a request takes in the process that speaks HTTP."""
        return self.handling_s + self.logprob_s * call.logprobs

    def reading(self, call: Call) -> float:
        """Seconds that a request adds to its first step."""
        return self.prefill_s + self.prefill_s_per_token * (call.unread - 1)


@dataclass(frozen=True)
class Call:
    """One request.

    Attributes:
        author: the author whose server receives it; 0 is the base.
        unread: number of its prompt tokens that are not in the server's cache, at least 1.
        steps: number of tokens that it generates, including a row with which the base defers.
        logprobs: number of log-probabilities in its answer beyond those of its own tokens.
    """

    author: int
    unread: int
    steps: int
    logprobs: int = 0


@dataclass(frozen=True)
class Job:
    """One completion.

    Attributes:
        tokens: number of generated tokens.
        calls: the requests that generate them, one after another.
    """

    tokens: int
    calls: tuple[Call, ...]


class _Caches:
    """The part of a sequence that each server knows."""

    def __init__(self, servers: Sequence[Server]) -> None:
        self._servers, self._known = servers, [0] * len(servers)

    def read(self, author: int, length: int, after: int) -> int:
        """Number of tokens that a server reads for a prompt of `length`. It knows the first `after` tokens once it has
        answered.
        """
        block = self._servers[author].block_tokens
        cached = self._known[author] // block * block  # less than `length`: the prompt has new tokens
        self._known[author] = after
        return length - cached


def collaboration(authors: Sequence[int], prompt_tokens: int, servers: Sequence[Server]) -> Job:
    """The requests of `VllmEngine`: the base continues until it defers, then an assistant writes one token.

    Args:
        authors: the author of each token; 0 is the base.
        prompt_tokens: number of prompt tokens, at least 1. No server knows them.
        servers: servers of the base and the assistants.
    """
    caches, calls = _Caches(servers), []
    start = end = prompt_tokens  # of the base's current request
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
    """One author writes the whole text in one request."""
    return Job(tokens, (Call(author, prompt_tokens, tokens),))


def token_by_token(authors: Sequence[int], prompt_tokens: int, servers: Sequence[Server], vocab_size: int) -> Job:
    """The requests of the code by Co-LLM's authors (clinicalml/co-llm).

    It sends one request to the base for each token, and one to an assistant for each deferred token. Every answer has
    the log-probabilities of the whole vocabulary.
    """
    caches, calls = _Caches(servers), []
    for length, author in enumerate(authors, start=prompt_tokens):
        for called in (BASE, author) if author != BASE else (BASE,):
            calls.append(Call(called, caches.read(called, length, length), 1, vocab_size))
    return Job(len(authors), tuple(calls))


def seconds(job: Job, servers: Sequence[Server]) -> float:
    """Seconds of a completion that no other completion disturbs: equation (1) for any sequence of requests."""
    return sum(
        server.round_trip_s + server.handling(call) + server.reading(call) + call.steps * server.step(1)
        for call in job.calls
        for server in [servers[call.author]]
    )


def calibrated(measured: Mapping[str, Any]) -> Server:
    """Create a server from measurements of it without other load.

    Args:
        measured: the measurements. "round_trip_s" is the time of a request for one token with a prompt of one token,
            from sending it to having read its answer. "step_s_at_batch" maps at least two numbers of concurrent streams
            to the seconds between two tokens of a stream. "prefill_s_per_token" is as in `Server`. The others are
            optional. "requests_per_s" is the number of such requests that it answers per second if many are sent at
            once. Without it, requests do not delay each other outside of steps. "prefill_s", "logprob_s", "max_batch"
            and "block_tokens" are as in `Server`.

    Raises:
        ConfigError: a value is missing, unknown or out of range.
    """
    known = {"round_trip_s", "prefill_s_per_token", "step_s_at_batch", "requests_per_s"}
    optional = {"prefill_s", "logprob_s", "max_batch", "block_tokens"}
    if unknown := sorted(set(measured) - known - optional):
        expected = ", ".join(sorted(known | optional))
        raise ConfigError(f"a server's measurements have the unknown field {unknown[0]!r}, expected any of {expected}")
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
            f"a request for one token takes {once} s, but its step takes {step:g} s; expected the request to take "
            "longer (from sending it to having read its answer). Measure again while nothing else runs"
        )
    outside = max(once - step, 0.0)
    handling = min(per_request, outside)
    others = {name: measured[name] for name in optional & set(measured)}
    return Server(outside - handling, fixed, per_sequence, per_token, handling_s=handling, **others)


def _line(points: Mapping[int, float]) -> tuple[float, float]:
    """Fit a line a + b n to the points by least squares. Returns a and b, neither below 0."""
    if len(points) < 2:
        raise ConfigError(f"step_s_at_batch holds {len(points)} numbers of streams, expected at least two")
    mean_n, mean_s = sum(points) / len(points), sum(points.values()) / len(points)
    slope = sum((n - mean_n) * s for n, s in points.items()) / sum((n - mean_n) ** 2 for n in points)
    if slope <= 0:
        return mean_s, 0.0
    if mean_s < slope * mean_n:
        return 0.0, sum(n * s for n, s in points.items()) / sum(n * n for n in points)
    return mean_s - slope * mean_n, slope
