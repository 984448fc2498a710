"""Many completions at once: a discrete-event simulation of servers that batch what runs at the same time.

What it leaves out: a prompt is read in one step, however long it is; the cache forgets nothing; completions meet only
at their servers, so processes on one machine do not slow each other down.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush

from collm.errors import ConfigError
from collm.vllm.cost import Call, Job, Server, alone, collaboration, placed


@dataclass(frozen=True)
class Outcome:
    """What became of all jobs.

    Attributes:
        seconds: from the first request to the last answer.
        tokens: of all texts.
        s_per_token: mean seconds of a completion over its mean tokens.
        requests: to each server.
        steps: tokens that each server generated.
        busy: share of the time in which each server's model was at work.
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
    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, bool, int, Callable[[], None]]] = []
        self._count = 0

    def at(self, seconds: float, action: Callable[[], None], *, last: bool = False) -> None:
        """Do something then; `last` after all else of that moment."""
        self._count += 1
        heappush(self._events, (seconds, last, self._count, action))

    def run(self) -> None:
        while self._events:
            self.now, _, _, action = heappop(self._events)
            action()


@dataclass
class _Sequence:
    call: Call
    left: int
    done: Callable[[], None]


class _Station:
    """A server at work: requests pass its front one by one, then share its steps."""

    def __init__(self, server: Server, clock: _Clock) -> None:
        self.server, self.clock = server, clock
        self.requests = self.steps = 0
        self.busy_s = 0.0
        self._front_free = 0.0
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []
        self._stepping = False

    def ask(self, call: Call, done: Callable[[], None]) -> None:
        self.requests += 1
        arrives = self.clock.now + self.server.round_trip_s
        self._front_free = max(arrives, self._front_free) + self.server.handling(call)
        self.clock.at(self._front_free, lambda: self._enter(_Sequence(call, call.steps, done)))

    def _enter(self, sequence: _Sequence) -> None:
        self._waiting.append(sequence)
        if not self._stepping:
            self._stepping = True
            self.clock.at(self.clock.now, self._step, last=True)

    def _step(self) -> None:
        new = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._room))]
        self._running += new
        self._stepping = bool(self._running)
        if self._stepping:
            taken = self.server.step(len(self._running)) + sum(self.server.reading(one.call) for one in new)
            self.busy_s += taken
            self.clock.at(self.clock.now + taken, self._stepped)

    @property
    def _room(self) -> int:
        return self.server.max_batch - len(self._running)

    def _stepped(self) -> None:
        self.steps += len(self._running)
        for sequence in self._running:
            sequence.left -= 1
        ended = [sequence for sequence in self._running if not sequence.left]
        self._running = [sequence for sequence in self._running if sequence.left]
        for sequence in ended:
            sequence.done()
        self.clock.at(self.clock.now, self._step, last=True)


def simulate(jobs: Sequence[Job], servers: Sequence[Server], concurrency: int) -> Outcome:
    """Run jobs, so many at once; the next begins when one ends.

    Raises:
        ConfigError: nothing to do, or nothing at once.
    """
    steps = [call.steps for job in jobs for call in job.calls]
    if concurrency < 1 or min(steps, default=0) < 1:
        raise ConfigError(
            f"{len(jobs)} completions came, {concurrency} at once; expected at least one at once, with at least a token"
        )
    clock = _Clock()
    stations = [_Station(server, clock) for server in servers]
    waiting, times = deque(jobs), list[float]()

    def begin() -> None:
        if waiting:
            calls, began = iter(waiting.popleft().calls), clock.now
            go_on(calls, began)

    def go_on(calls: Iterator[Call], began: float) -> None:
        call = next(calls, None)
        if call is None:
            times.append(clock.now - began)
            begin()
        else:
            stations[call.author].ask(call, lambda: go_on(calls, began))

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


@dataclass(frozen=True)
class Workload:
    """What is asked of a collaboration with one assistant.

    Attributes:
        completions, concurrency: how many texts, and how many of them at once.
        tokens, prompt_tokens: of each, all of one length.
        rate: deferral rate.
        run: mean length of a run of deferrals; None: each token is deferred on its own.
    """

    completions: int
    tokens: int
    prompt_tokens: int
    concurrency: int
    rate: float
    run: float | None = None
    seed: int = 0

    def texts(self) -> list[list[int]]:
        """Authors of each text.

        Raises:
            ConfigError: the rate is none, or leaves no room for runs of this length.
        """
        if not 0 <= self.rate <= 1 or (self.run is not None and self.run < 1):
            raise ConfigError(f"rate is {self.rate} and run {self.run}, expected a share and a length of at least 1")
        rng, total = random.Random(self.seed), self.completions * self.tokens
        deferrals = round(self.rate * total)
        if self.run is None:
            deferred = set(rng.sample(range(total), deferrals))
            authors = [int(position in deferred) for position in range(total)]
        else:
            authors = placed(total, deferrals, max(round(deferrals / self.run), bool(deferrals)), rng)
        return [authors[at : at + self.tokens] for at in range(0, total, self.tokens)]

    def together(self, base: Server, assistant: Server) -> Outcome:
        """Of the collaboration."""
        servers = [base, assistant]
        jobs = [collaboration(authors, self.prompt_tokens, servers) for authors in self.texts()]
        return simulate(jobs, servers, self.concurrency)

    def by(self, author: int, base: Server, assistant: Server) -> Outcome:
        """Of one model that writes everything."""
        jobs = [alone(author, self.tokens, self.prompt_tokens)] * self.completions
        return simulate(jobs, [base, assistant], self.concurrency)


@dataclass(frozen=True)
class Verdict:
    """From which deferral rate on, if any, the assistant alone is faster than the collaboration.

    Attributes:
        rate: to a hundredth; 0: always, None: never.
        concurrency: completions at once.
    """

    rate: float | None
    concurrency: int

    def __str__(self) -> str:
        at_once = "One completion at a time" if self.concurrency == 1 else f"{self.concurrency} completions at once"
        if self.rate is None:
            return f"{at_once}: the collaboration is faster than the assistant alone at every deferral rate."
        if self.rate == 0:
            return f"{at_once}: the assistant alone is faster than the collaboration at every deferral rate."
        return (
            f"{at_once}: the assistant alone is faster from a deferral rate of {self.rate:.2f} on, the collaboration "
            "below it."
        )


def verdict(workload: Workload, base: Server, assistant: Server) -> Verdict:
    """Where the assistant alone begins to win, its rate by halving; the workload's own rate does not matter."""
    goal = workload.by(1, base, assistant).seconds

    def loses(hundredths: int) -> bool:
        return replace(workload, rate=hundredths / 100).together(base, assistant).seconds > goal

    wins, lost = 0, 100
    if loses(wins):
        return Verdict(0.0, workload.concurrency)
    if not loses(lost):
        return Verdict(None, workload.concurrency)
    while lost - wins > 1:
        middle = (wins + lost) // 2
        wins, lost = (wins, middle) if loses(middle) else (middle, lost)
    return Verdict(lost / 100, workload.concurrency)
