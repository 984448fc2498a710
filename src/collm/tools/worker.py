"""The process in which a user function runs, with requests on stdin and answers on stdout as JSON lines.

`calls.IsolatedTool` starts it as a script with the name of the function. It imports nothing from collm.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any


def main() -> None:
    """Answer requests {"text", "ends"} with one line per end, until stdin is closed."""
    requests = os.fdopen(os.dup(0), "r", encoding="utf-8")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # keep the function away from the protocol's pipes
    os.dup2(2, 1)
    sys.path[:] = json.loads(requests.readline())
    module, _, name = sys.argv[1].partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
        if not callable(function):
            raise TypeError(f"it is a {type(function).__name__}, expected a function")
    except BaseException as error:
        print(_failed(error), file=replies)
        return
    print("null", file=replies)
    for line in requests:
        request = json.loads(line)
        for end in request["ends"]:
            print(_answer(function, request["text"][:end]), file=replies)


def _answer(function: Any, text: str) -> str:
    try:
        answer = function(text)
        if answer is not None and not isinstance(answer, str):
            return json.dumps({"failed": f"returned {type(answer).__name__}, expected text or None"})
        (answer or "").encode()
        return json.dumps(answer)
    except UnicodeEncodeError as error:
        return json.dumps({"failed": f"returned text that is not valid Unicode ({error})"})
    except BaseException as error:  # including SystemExit, as the process must survive the function
        return _failed(error)


def _failed(error: BaseException) -> str:
    return json.dumps({"failed": f"raised {type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
