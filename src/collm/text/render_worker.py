"""The process in which chat templates are rendered, with requests on stdin and replies on stdout as JSON lines.

`rendering` starts it as a script with the limit of its memory and the import path. It imports nothing from collm.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from pathlib import Path

OUT_OF_MEMORY = 3
"""Exit status if a rendering exceeds the memory limit."""


def main() -> None:
    """Render one chat for each request {"seconds", "arguments"} until stdin is closed.

    The kernel enforces both limits, because C code that a template calls does not return to Python. At its limit, the
    process ends with SIGALRM or `OUT_OF_MEMORY`.
    """
    sys.path[:] = json.loads(sys.argv[2])
    from transformers.utils.chat_template_utils import render_jinja_template

    if sys.platform == "linux":
        used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        most = used_bytes + int(sys.argv[1])
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    for line in sys.stdin:
        try:
            request = json.loads(line)
            signal.setitimer(signal.ITIMER_REAL, request["seconds"])
            (text,), _ = render_jinja_template(**request["arguments"])
            reply = json.dumps({"text": text})
        except MemoryError:
            os._exit(OUT_OF_MEMORY)
        except Exception as error:
            reply = json.dumps({"failed": f"{error!s:.2000}"})
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(reply, flush=True)


if __name__ == "__main__":
    main()
