"""Whether two mathematical answers are equal, asked in a process of its own: simplifying may take forever."""

from __future__ import annotations

import json
import logging
import re
import threading
from importlib.util import find_spec

from collm.errors import MissingExtra, ToolFailure
from collm.tools.calls import IsolatedTool
from collm.tools.spec import ToolSpec

logger = logging.getLogger(__name__)

JUDGE = ToolSpec("collm.evaluation.tasks.math_judge:judge", seconds=10.0)
"""What compares; the seconds limit one comparison."""

MAX_CHARACTERS = 400
"""No answer is longer; what is, is equal to nothing but itself."""

_WORDS = re.compile(r"\\(?:text|mbox)\{([^{}]*)\}")


class Equivalence:
    """Compares answers written in LaTeX or as plain expressions; from any thread.

    Raises:
        MissingExtra: math-verify is not installed.
        LoadError: when called, it cannot be imported.
    """

    def __init__(self) -> None:
        if find_spec("math_verify") is None:
            raise MissingExtra("math-verify", "eval")
        self._process: IsolatedTool | None = None
        self._lock = threading.Lock()

    def __call__(self, wanted: str, given: str) -> bool:
        """Whether both have the same value; False where math-verify finds no answer in time."""
        if _spelled(wanted) == _spelled(given):
            return True
        if max(len(wanted), len(given)) > MAX_CHARACTERS:
            return False
        question = json.dumps([wanted, given])
        with self._lock:
            self._process = self._process or IsolatedTool(JUDGE)
            (answer,) = self._process.answers(question, [len(question)])
        if isinstance(answer, ToolFailure):
            logger.warning("%r and %r could not be compared, so they count as different: %s", wanted, given, answer)
        return answer == "equal"


def _spelled(answer: str) -> str:
    r"""An answer without white space and without the \text{..} around words."""
    return "".join(_WORDS.sub(r"\1", answer).split())
