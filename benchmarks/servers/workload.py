"""Workloads of a collaboration, and the deferral rate from which its assistant alone is faster."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

from benchmarks.servers.cost import Server, alone, collaboration
from benchmarks.servers.simulation import Outcome, simulate
from collm.core.types import BASE
from collm.errors import ConfigError


def scattered(tokens: int, deferrals: int, runs: int, rng: random.Random) -> list[int]:
    """Authors of a text with this many tokens, deferrals and runs of deferrals, at random positions.

    Raises:
        ConfigError: there is no such text.
    """
    kept = tokens - deferrals
    if not 0 <= deferrals <= tokens or not bool(deferrals) <= runs <= min(deferrals, kept + 1):
        raise ConfigError(
            f"{tokens} tokens cannot hold {deferrals} deferrals in {runs} runs; expected at most as many deferrals as "
            "tokens, a token in each run and one of the base between two runs"
        )
    between = sorted(rng.sample(range(kept + 1), runs))  # number of the base's tokens before each run
    ends = [0, *sorted(rng.sample(range(1, deferrals), runs - 1)), deferrals] if runs else [0]
    authors: list[int] = []
    for index, before in enumerate(between):
        authors += [BASE] * (before - (between[index - 1] if index else 0)) + [1] * (ends[index + 1] - ends[index])
    return authors + [BASE] * (tokens - len(authors))


@dataclass(frozen=True)
class Workload:
    """The requests to a collaboration with one assistant.

    Attributes:
        completions, concurrency: number of texts, and how many of them are generated at once.
        tokens, prompt_tokens: generated tokens and prompt tokens of each text.
        rate: deferral rate.
        run: mean length of a run of deferrals. If None, each token is deferred independently.
        cores: as in `simulate`.
        seed: seed of the random positions.
    """

    completions: int
    tokens: int
    prompt_tokens: int
    concurrency: int
    rate: float
    run: float | None = None
    cores: float = math.inf
    seed: int = 0

    def texts(self) -> list[list[int]]:
        """Authors of each text.

        Raises:
            ConfigError: the rate is not a share, or leaves no room for runs of this length.
        """
        if not 0 <= self.rate <= 1 or (self.run is not None and self.run < 1):
            raise ConfigError(f"rate is {self.rate} and run {self.run}, expected a share and a length of at least 1")
        rng, total = random.Random(self.seed), self.completions * self.tokens
        deferrals = round(self.rate * total)
        if self.run is None:
            deferred = set(rng.sample(range(total), deferrals))
            authors = [int(position in deferred) for position in range(total)]
        else:
            authors = scattered(total, deferrals, max(round(deferrals / self.run), bool(deferrals)), rng)
        return [authors[at : at + self.tokens] for at in range(0, total, self.tokens)]

    def together(self, base: Server, assistant: Server) -> Outcome:
        """Simulate the collaboration."""
        servers = [base, assistant]
        jobs = [collaboration(authors, self.prompt_tokens, servers) for authors in self.texts()]
        return simulate(jobs, servers, self.concurrency, self.cores)

    def by(self, author: int, base: Server, assistant: Server) -> Outcome:
        """Simulate one model that writes everything."""
        jobs = [alone(author, self.tokens, self.prompt_tokens)] * self.completions
        return simulate(jobs, [base, assistant], self.concurrency, self.cores)


@dataclass(frozen=True)
class Verdict:
    """The deferral rate from which the assistant alone is faster than the collaboration.

    Attributes:
        rate: the rate, to a hundredth. 0 if the assistant alone is always faster, None if it never is.
        concurrency: number of completions at once.
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
    """Find the deferral rate from which the assistant alone is faster, by bisection. The workload's own rate is
    ignored.
    """
    alone_s = workload.by(1, base, assistant).seconds

    def loses(hundredths: int) -> bool:
        return replace(workload, rate=hundredths / 100).together(base, assistant).seconds > alone_s

    wins, lost = 0, 100
    if loses(wins):
        return Verdict(0.0, workload.concurrency)
    if not loses(lost):
        return Verdict(None, workload.concurrency)
    while lost - wins > 1:
        middle = (wins + lost) // 2
        wins, lost = (wins, middle) if loses(middle) else (middle, lost)
    return Verdict(lost / 100, workload.concurrency)
