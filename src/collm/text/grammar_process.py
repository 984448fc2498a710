"""The process in which the grammar of a stranger is compiled first, because native code may crash on it.

`grammars.Grammars` starts it as a script, with JSON on stdin. It imports nothing from collm.
"""

from __future__ import annotations

import json
import resource
import sys
import threading

STACK_BYTES = 2 << 20
"""Stack for the compiler. A thread of the server has more, so that what compiles here compiles there."""


def main() -> None:
    """Compile a grammar {"source", "tokenizer", "vocab_size", "memory_bytes", "seconds", "path"}, and exit with 0.

    An invalid grammar exits with 0 too.
    """
    asked = json.load(sys.stdin)
    sys.path[:] = asked["path"]
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (asked["memory_bytes"], asked["memory_bytes"]))
    resource.setrlimit(resource.RLIMIT_CPU, (asked["seconds"], asked["seconds"]))  # also without its parent
    threading.stack_size(STACK_BYTES)
    compiled: list[bool] = []

    def compile_it() -> None:
        from llguidance import LLMatcher, LLTokenizer

        tokenizer = LLTokenizer(asked["tokenizer"], n_vocab=asked["vocab_size"], eos_token=0)
        matcher = LLMatcher(tokenizer, asked["source"], log_level=0)
        if not matcher.is_error():
            matcher.compute_logit_bias()
        compiled.append(True)

    thread = threading.Thread(target=compile_it)
    thread.start()
    thread.join()
    sys.exit(0 if compiled else 1)


if __name__ == "__main__":
    main()
