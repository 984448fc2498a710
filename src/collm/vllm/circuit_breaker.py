"""A circuit breaker, which blocks calls after repeated failures."""

from __future__ import annotations

import time
from collections.abc import Callable

TRIPS_AFTER, COOLS_S = 3, 10.0


class CircuitBreaker:
    """Blocks calls for ten seconds after three failures in a row, then admits one trial call.

    Args:
        clock: returns the time in seconds.

    Attributes:
        failures: number of failures in a row.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.failures = 0
        self._clock = clock
        self._open_until = 0.0

    @property
    def tripped(self) -> bool:
        """Whether an admitted call is a trial call."""
        return self.failures >= TRIPS_AFTER

    def shut_s(self) -> float:
        """Return for how many seconds calls are blocked. 0 admits one call.

        An admitted trial call blocks further calls while it runs, for ten seconds at most.
        """
        if not self.tripped:
            return 0.0
        left = self._open_until - self._clock()
        if left <= 0:
            self._open_until = self._clock() + COOLS_S
        return max(left, 0.0)

    def failed(self) -> None:
        self.failures += 1
        self._open_until = self._clock() + COOLS_S

    def succeeded(self) -> None:
        self.failures = 0
