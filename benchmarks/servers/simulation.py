"""Discrete-event simulation of many completions at once, on servers that batch concurrent requests.

Simplifications: a prompt is read in one step, however long it is. The cache forgets nothing. The client costs only what
a server's `round_trip_s` contains.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from benchmarks.servers.cost import Call, Job, Server
from collm.errors import ConfigError


@dataclass(frozen=True)
class Outcome:
    """The result of all jobs.

    Attributes:
        seconds: time from the first request to the last answer.
        tokens: number of tokens of all texts.
        s_per_token: mean seconds of a completion, divided by its mean number of tokens.
        requests: number of requests to each server.
        steps: number of tokens that each server generated.
        busy: share of the time during which each server's model was running.
    """

    seconds: float
    tokens: int
    s_per_token: float
    requests: tuple[int, ...]
    steps: tuple[int, ...]
    busy: tuple[float, ...]

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


class _Clock:
    """Runs actions at their times.

    Args:
        cores: number of cores of the machine that all servers share. If more work runs at once, all of it gets equal
            shares of their speed.
    """

    def __init__(self, cores: float) -> None:
        self.now = 0.0
        self._cores = cores
        self._events: list[tuple[float, bool, int, Callable[[], None]]] = []
        self._count = 0
        self._work: list[_Work] = []

    def at(self, seconds: float, action: Callable[[], None], *, last: bool = False) -> None:
        """Run an action at a time. A `last` action runs after all others of that time."""
        self._count += 1
        heappush(self._events, (seconds, last, self._count, action))

    def work(self, seconds: float, action: Callable[[], None]) -> None:
        """Run an action after this many seconds of a core's work, from now on."""
        if self._cores == math.inf:
            self.at(self.now + seconds, action)
        else:
            self._work.append(_Work(seconds, action))

    def run(self) -> None:
        while self._events or self._work:
            if self._work and not (self._events and self._events[0][:2] <= (self._next_end(), False)):
                self._end_work()
            else:
                then, _, _, action = heappop(self._events)
                self._advance_to(then)
                action()

    @property
    def _speed(self) -> float:
        return min(1.0, self._cores / len(self._work))

    def _next_end(self) -> float:
        return self.now + min(one.left_s for one in self._work) / self._speed

    def _end_work(self) -> None:
        ended = min(self._work, key=lambda one: one.left_s)
        self._advance_to(self._next_end())
        self._work.remove(ended)
        ended.action()

    def _advance_to(self, then: float) -> None:
        for one in self._work:
            one.left_s -= (then - self.now) * self._speed
        self.now = then


@dataclass(eq=False)
class _Work:
    left_s: float
    action: Callable[[], None]


@dataclass
class _Sequence:
    call: Call
    left: int
    done: Callable[[], None]


class _Station:
    """A running server. Requests are handled one by one, then share its steps."""

    def __init__(self, server: Server, clock: _Clock) -> None:
        self.server, self.clock = server, clock
        self.requests = self.steps = 0
        self.busy_s = 0.0
        self._arrived: deque[_Sequence] = deque()  # the first one is being handled
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []
        self._stepping = False

    def ask(self, call: Call, done: Callable[[], None]) -> None:
        self.requests += 1
        sequence = _Sequence(call, call.steps, done)
        self.clock.at(self.clock.now + self.server.round_trip_s, lambda: self._arrive(sequence))

    def _arrive(self, sequence: _Sequence) -> None:
        self._arrived.append(sequence)
        if len(self._arrived) == 1:
            self._handle()

    def _handle(self) -> None:
        self.clock.work(self.server.handling(self._arrived[0].call), self._enter)

    def _enter(self) -> None:
        self._waiting.append(self._arrived.popleft())
        if self._arrived:
            self._handle()
        if not self._stepping:
            self._stepping = True
            self.clock.at(self.clock.now, self._step, last=True)

    def _step(self) -> None:
        new = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._room))]
        self._running += new
        self._stepping = bool(self._running)
        if self._stepping:
            began = self.clock.now
            taken = self.server.step(len(self._running)) + sum(self.server.reading(one.call) for one in new)
            self.clock.work(taken, lambda: self._finish_step(began))

    @property
    def _room(self) -> int:
        return self.server.max_batch - len(self._running)

    def _finish_step(self, began: float) -> None:
        self.busy_s += self.clock.now - began
        self.steps += len(self._running)
        for sequence in self._running:
            sequence.left -= 1
        ended = [sequence for sequence in self._running if not sequence.left]
        self._running = [sequence for sequence in self._running if sequence.left]
        for sequence in ended:
            sequence.done()
        self.clock.at(self.clock.now, self._step, last=True)


def simulate(jobs: Sequence[Job], servers: Sequence[Server], concurrency: int, cores: float = math.inf) -> Outcome:
    """Run jobs, at most `concurrency` at once. When one ends, the next begins.

    Args:
        jobs: the completions.
        servers: the servers; `Call.author` is an index into them.
        concurrency: largest number of jobs at once.
        cores: number of cores of the machine that all servers share, where each process takes one. If infinite, the
            servers share nothing.

    Raises:
        ConfigError: there is nothing to do, or `concurrency` or `cores` is below 1.
    """
    sizes = [size for job in jobs for call in job.calls for size in (call.unread, call.steps)]
    if concurrency < 1 or cores < 1 or min(sizes, default=0) < 1:
        raise ConfigError(
            f"got {len(jobs)} completions, {concurrency} at once, on {cores} cores; expected at least one completion "
            "at once, at least one token to read and one to write in each request, and at least one core"
        )
    clock = _Clock(cores)
    stations = [_Station(server, clock) for server in servers]
    waiting, times = deque(jobs), list[float]()

    def begin() -> None:
        if waiting:
            calls, began = iter(waiting.popleft().calls), clock.now
            send_next(calls, began)

    def send_next(calls: Iterator[Call], began: float) -> None:
        call = next(calls, None)
        if call is None:
            times.append(clock.now - began)
            begin()
        else:
            stations[call.author].ask(call, lambda: send_next(calls, began))

    for _ in range(min(concurrency, len(jobs))):
        begin()
    clock.run()
    tokens = sum(job.tokens for job in jobs)
    return Outcome(
        seconds=clock.now,
        tokens=tokens,
        s_per_token=sum(times) / tokens,
        requests=tuple(station.requests for station in stations),
        steps=tuple(station.steps for station in stations),
        busy=tuple(station.busy_s / clock.now for station in stations),
    )
