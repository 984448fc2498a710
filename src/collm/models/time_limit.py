"""Time limit for untrusted Python code in the current thread, such as chat templates."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

INTERVAL_S = 0.25
"""Interval at which deadlines are checked, and so the precision of limits."""


class TimeIsUp(BaseException):
    """Raised in the limited code. A BaseException, so that `except Exception` does not catch it."""


class _Watch:
    """A daemon thread that interrupts other threads after their deadlines."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._deadlines: dict[int, float] = {}
        self._thread: threading.Thread | None = None

    def begin(self, seconds: float) -> None:
        with self._lock:
            self._deadlines[threading.get_ident()] = time.monotonic() + seconds
            if self._thread is None or not self._thread.is_alive():  # also after a fork
                self._thread = threading.Thread(target=self._run, name="collm-time-limit", daemon=True)
                self._thread.start()

    def end(self) -> bool:
        """Cancel the deadline of this thread. Returns whether an interruption is pending."""
        with self._lock:
            return self._deadlines.pop(threading.get_ident(), None) is None

    def _run(self) -> None:
        while True:
            time.sleep(INTERVAL_S)
            with self._lock:
                now = time.monotonic()
                for thread in [one for one, deadline in self._deadlines.items() if deadline < now]:
                    del self._deadlines[thread]
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(TimeIsUp))


_WATCH = _Watch()


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Interrupt the block after `seconds`. Blocks do not nest, and calls of C code are not interrupted.

    Raises:
        TimeoutError: the block took longer.
    """
    _WATCH.begin(seconds)
    try:
        try:
            yield
        except TimeIsUp:
            raise
        except BaseException:
            _absorb_interruption()
            raise
        _absorb_interruption()
    except TimeIsUp as error:
        raise TimeoutError(f"it took longer than {seconds:g} s") from error


def _absorb_interruption() -> None:
    """Wait for a pending interruption, so that it does not hit later code."""
    if _WATCH.end():
        time.sleep(INTERVAL_S)
        raise TimeIsUp
