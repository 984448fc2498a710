"""Compare mathematical answers in a separate process, because simplification may not terminate."""

from __future__ import annotations

import json
import logging
import re
import threading
from importlib.util import find_spec

from collm.errors import ConfigError, ToolFailure
from collm.tools.calls import IsolatedTool
from collm.tools.spec import ToolSpec

logger = logging.getLogger(__name__)

JUDGE = ToolSpec("recipes.paper.math_judge:judge", seconds=10.0)
"""The comparison, with a time limit for each."""

MAX_CHARACTERS = 400
"""Maximum length of an answer. A longer answer is only equal to itself."""

_WORDS = re.compile(r"\\(?:text|mbox)\{([^{}]*)\}")


class Equivalence:
    """Compares answers written in LaTeX or as plain expressions. Calls are thread-safe.

    Raises:
        ConfigError: math-verify is not installed.
        LoadError: on a call, if math-verify cannot be imported.
    """

    def __init__(self) -> None:
        if find_spec("math_verify") is None:
            raise ConfigError("math-verify is not installed; install it with: pip install math-verify")
        self._process: IsolatedTool | None = None
        self._lock = threading.Lock()

    def __call__(self, wanted: str, given: str) -> bool:
        """Whether both answers have the same value. False if math-verify does not finish in time."""
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
    r"""An answer without white space and without \text{..} around words."""
    return "".join(_WORDS.sub(r"\1", answer).split())
