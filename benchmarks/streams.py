"""Many streams of a server at once, in a process of its own: requests as JSON on stdin, what came as JSON on stdout.

python -m benchmarks.streams 127.0.0.1 8000 < requests.json

A request is {"body": .., "leave_after": tokens or null}. Nothing but the standard library, so that the client takes as
little of the machine as it can.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any


async def stream(host: str, port: int, request: dict[str, Any]) -> dict[str, Any]:
    """Ask, and read to the end, or leave after so many tokens."""
    start = time.perf_counter()
    found: dict[str, Any] = {"status": 0, "tokens": 0, "ended": False, "error": None, "first_s": None}
    reader, writer = await asyncio.open_connection(host, port)
    body = json.dumps({**request["body"], "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
    found["status"] = int((await reader.readline()).split()[1])
    async for line in reader:
        if not line.startswith(b"data: "):
            continue
        if line.startswith(b"data: [DONE]"):
            found["ended"] = True
            break
        event = json.loads(line[6:])
        if "error" in event:
            found["error"] = event["error"]["code"]
            break
        found["first_s"] = found["first_s"] or time.perf_counter() - start
        found["tokens"] += sum(len(choice["collm"]["token_ids"]) for choice in event["choices"])
        if request["leave_after"] is not None and found["tokens"] >= request["leave_after"]:
            break
    writer.close()
    return found


async def all_of(host: str, port: int, requests: list[dict[str, Any]]) -> dict[str, Any]:
    """All at once, and the seconds they took together."""
    start = time.perf_counter()
    streams = await asyncio.gather(*(stream(host, port, request) for request in requests))
    return {"seconds": time.perf_counter() - start, "streams": streams}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(all_of(sys.argv[1], int(sys.argv[2]), json.load(sys.stdin)))))
