"""The comparison that `equivalence` runs in its process. It imports math-verify and nothing of this package."""

from __future__ import annotations

import json
import logging

from math_verify import parse, verify

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limits are off


def judge(question: str) -> str:
    """Compare a JSON list of the reference and the answer: "equal" or "different"."""
    wanted, given = (parse(f"${answer}$", parsing_timeout=None) for answer in json.loads(question))
    return "equal" if verify(wanted, given, timeout_seconds=None) else "different"
