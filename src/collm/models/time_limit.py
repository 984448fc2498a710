"""A time limit for Python code of others that runs in this thread, as a chat template does."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

INTERVAL_S = 0.25
"""How often the watch looks: limits are kept to this."""


class TimeIsUp(BaseException):
    """Raised in the limited code; no `except Exception` of it can keep going."""


class _Watch:
    """One thread that interrupts others whose time is up."""

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
        """No more interruptions of this thread; whether one is on its way."""
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
    """Interrupt the block, which does not nest, after so many seconds; between two bytecodes, so not inside a C call.

    Raises:
        TimeoutError: the time was up.
    """
    _WATCH.begin(seconds)
    try:
        try:
            yield
        except TimeIsUp:
            raise
        except BaseException:
            _settle()
            raise
        _settle()
    except TimeIsUp as error:
        raise TimeoutError(f"it took longer than {seconds:g} s") from error


def _settle() -> None:
    """Let an interruption that is on its way arrive here, not in what follows."""
    if _WATCH.end():
        time.sleep(INTERVAL_S)
        raise TimeIsUp
