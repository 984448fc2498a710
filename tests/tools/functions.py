"""Functions as users write them, good and bad; called in a process of their own."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from typing import Any

CALLS = 0
NOT_A_FUNCTION = 3


def shout(text: str) -> str | None:
    """ "hello =" goes on with " HELLO"."""
    return " " + text[:-2].split()[-1].upper() if text.endswith(" =") and text[:-2].strip() else None


def moody(text: str) -> Any:
    """Does what the last word says."""
    word = text.split()[-1] if text.split() else ""
    if word == "raise":
        raise ValueError("no good")
    if word == "sleep":
        time.sleep(60)
    if word == "backtrack":  # holds the interpreter's lock: no thread could end it
        re.match(r"(a+)+$", "a" * 40 + "b")
    if word == "exit":
        sys.exit(3)
    if word == "die":
        os._exit(7)
    if word == "close":
        os.closerange(3, 64)
        time.sleep(60)
    if word == "stop":  # a moment after its answer it no longer reads
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGSTOP)).start()
        return " fine"
    if word == "number":
        return 42
    if word == "surrogate":
        return "\ud800"
    if word == "print":
        print("noise on standard output")
        return " printed"
    if word == "read":
        return f" {sys.stdin.read()!r}"
    return " fine" if word == "go" else None


def counting(text: str) -> str:
    """How often it was called; no tool should be like this."""
    global CALLS
    CALLS += 1
    return str(CALLS)


def failing(text: str) -> str:
    """Never answers."""
    raise ValueError("always")


def add_words(text: str) -> str | None:
    """ "w3 w4 w5" goes on with w27: after w5 the sum of the two numbers before it, plus 20."""
    numbers = [int(word[1:]) for word in text.split()[-3:] if word[:1] == "w" and word[1:].isdigit()]
    return f" w{numbers[0] + numbers[1] + 20}" if len(numbers) == 3 and text.endswith(" w5") else None


def miles(text: str) -> str | None:
    """A number and a unit after some words."""
    return " 12 miles" if text.endswith(("river", "lo", "c", "r", "small", "town", "it", "what")) else None
