"""The process of an untrusted program, with requests on stdin and replies on stdout as JSON lines.

`isolated` starts it as a script with the task, the limit of its memory and the import path. It imports nothing from
collm.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

OUT_OF_MEMORY = 3
"""Exit status if a task exceeds the memory limit."""
STACK_BYTES = 2 << 20
"""Stack for the compiler. A thread of the server has more, so that what compiles here compiles there."""


def renderer() -> Callable[..., Any]:
    """Render one chat, given the arguments of transformers' `render_jinja_template`."""
    from transformers.utils.chat_template_utils import render_jinja_template

    return lambda **arguments: render_jinja_template(**arguments)[0][0]


def compiler() -> Callable[..., Any]:
    """Compile a grammar. The compiler in the server reports an invalid one."""
    from llguidance import LLMatcher, LLTokenizer

    def compile_grammar(source: str, tokenizer: str, vocab_size: int) -> None:
        matcher = LLMatcher(LLTokenizer(tokenizer, n_vocab=vocab_size, eos_token=0), source, log_level=0)
        if not matcher.is_error():
            matcher.compute_logit_bias()

    threading.stack_size(STACK_BYTES)
    thread = ThreadPoolExecutor(1)
    return lambda **arguments: thread.submit(compile_grammar, **arguments).result()


def main() -> None:
    """Run the task for each request {"seconds", "arguments"} until stdin is closed.

    The kernel enforces both limits, because C code does not return to Python. At its limit, the process ends with
    SIGALRM or `OUT_OF_MEMORY`.
    """
    sys.path[:] = json.loads(sys.argv[3])
    run = {"render": renderer, "compile": compiler}[sys.argv[1]]()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        most = used_bytes + int(sys.argv[2])
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    for line in sys.stdin:
        try:
            request = json.loads(line)
            signal.setitimer(signal.ITIMER_REAL, request["seconds"])
            reply = json.dumps({"result": run(**request["arguments"])})
        except MemoryError:
            os._exit(OUT_OF_MEMORY)
        except Exception as error:
            reply = json.dumps({"failed": f"{error!s:.2000}"})
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(reply, flush=True)


if __name__ == "__main__":
    main()
