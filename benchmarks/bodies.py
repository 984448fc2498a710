"""A client that sends bodies of the largest size and of many shapes, while another of its threads asks /health.

`benchmarks.serve` starts it as `python -m benchmarks.bodies HOST PORT`. Prints JSON: for each shape the status, the
seconds until the answer, and the longest wait for /health meanwhile.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import Any

import httpx

MAX_BODY = 4 << 20
_CHAT = '{"model": "pair", "max_tokens": 1, "messages": [{"role": "user", "content": "w5"}], '


def _filled(head: str, item: str, end: str) -> str:
    """Items between a head and an end, as many as fit."""
    return (head + item * ((MAX_BODY - len(head) - len(end)) // len(item)))[:-1] + end


def _keys(count: int) -> str:
    return ",".join(f'"k{i}":1' for i in range(count))


_PROMPT, _CHATS = "/v1/completions", "/v1/chat/completions"
_MESSAGE, _PART = '{"role":"user","content":"x"},', '{"type":"text"},'
BODIES = {
    "lists": (_PROMPT, _filled('{"model": "pair", "prompt": [', "[],", "]}")),
    "lists within the limit": (_PROMPT, '{"model": "pair", "prompt": [' + "[]," * 130_000 + "[]]}"),
    "token lists within the limit": (_PROMPT, '{"model": "pair", "prompt": [' + "[1]," * 130_000 + "[1]]}"),
    "numbers": (_PROMPT, _filled('{"model": "pair", "prompt": [', "1,", "]}")),
    "texts": (_PROMPT, _filled('{"model": "pair", "prompt": [', '"a",', "]}")),
    "one text": (_PROMPT, _filled('{"model": "pair", "prompt": "', "w5 ", '"}')),
    "nested lists": (_PROMPT, '{"model": "pair", "prompt": ' + "[" * 100_000 + "]" * 100_000 + "}"),
    "a long number": (_PROMPT, _filled('{"model": "pair", "seed": ', "9", "9}")),
    "stop tokens": (_CHATS, _filled(_CHAT + '"stop_token_ids": [', '"x",', "]}")),
    "allowed tokens": (_CHATS, _filled(_CHAT + '"allowed_token_ids": [', "5,", "]}")),
    "bad words": (_CHATS, _filled(_CHAT + '"bad_words": [', '"w6",', "]}")),
    "messages": (_CHATS, '{"model": "pair", "messages": [' + _MESSAGE * 60_000 + "1]}"),
    "content": (_CHATS, '{"model": "pair", "messages": [{"role": "user", "content": [' + _PART * 60_000 + "1]}]}"),
    "biases": (_CHATS, _CHAT + f'"logit_bias": {{{_keys(130_000)}}}}}'),
    "unknown keys": (_CHATS, _CHAT + _keys(130_000) + "}"),
    "unknown options": (_CHATS, _CHAT + f'"collm": {{{_keys(130_000)}}}}}'),
    "template variables": (_CHATS, _CHAT + f'"chat_template_kwargs": {{{_keys(130_000)}}}}}'),
    "choices": (_CHATS, _filled(_CHAT + '"structured_outputs": {"choice": [', '"c",', "]}}")),
    "tokens to spell": ("/detokenize", _filled('{"model": "pair", "tokens": [', "5,", "]}")),
}
"""Shape -> path and body of at most `MAX_BODY` bytes."""


def send(url: str, shape: str) -> dict[str, Any]:
    """Send one body and ask /health meanwhile."""
    path, body = BODIES[shape]
    done, waits = threading.Event(), [0.0]

    def look() -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            while not done.is_set():
                start = time.perf_counter()
                client.get("/health").raise_for_status()
                waits.append(time.perf_counter() - start)

    looking = threading.Thread(target=look)
    looking.start()
    with httpx.Client(base_url=url, timeout=60) as client:
        start = time.perf_counter()
        reply = client.post(path, content=body, headers={"Content-Type": "application/json"})
        seconds = time.perf_counter() - start
    done.set()
    looking.join()
    found = {"status": reply.status_code, "seconds": seconds, "longest_health_s": max(waits)}
    return {"shape": shape, **found, "reply_bytes": len(reply.content)}


if __name__ == "__main__":
    print(json.dumps([send(f"http://{sys.argv[1]}:{sys.argv[2]}", shape) for shape in BODIES]))
