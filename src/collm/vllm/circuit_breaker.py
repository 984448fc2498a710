"""Who failed again and again is left alone for a while."""

from __future__ import annotations

import time
from collections.abc import Callable

TRIPS_AFTER, COOLS_S = 3, 10.0


class CircuitBreaker:
    """After three failed calls in a row, calls fail at once for ten seconds; then one alone tries again.

    Args:
        clock: seconds.

    Attributes:
        failures: calls in a row that failed.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.failures = 0
        self._clock = clock
        self._open_until = 0.0

    @property
    def tripped(self) -> bool:
        """Whether a call that is let through is a trial."""
        return self.failures >= TRIPS_AFTER

    def shut_s(self) -> float:
        """Seconds for which calls must fail at once; 0 lets this one through, and keeps others out while it tries."""
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
