"""Client of many concurrent streams, in a separate process. Reads requests from stdin and prints results, both as JSON.

python -m benchmarks.streams 127.0.0.1 8000 < requests.json

A request is {"body": .., "leave_after": tokens or null}. The client uses only the standard library, so that it takes as
little of the machine's time as possible.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any


async def stream(host: str, port: int, request: dict[str, Any]) -> dict[str, Any]:
    """Send a request and read its stream to the end, or disconnect after `leave_after` tokens."""
    start = time.perf_counter()
    result: dict[str, Any] = {"status": 0, "tokens": 0, "ended": False, "error": None, "first_s": None}
    reader, writer = await asyncio.open_connection(host, port)
    body = json.dumps({**request["body"], "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
    result["status"] = int((await reader.readline()).split()[1])
    async for line in reader:
        if not line.startswith(b"data: "):
            continue
        if line.startswith(b"data: [DONE]"):
            result["ended"] = True
            break
        event = json.loads(line[6:])
        if "error" in event:
            result["error"] = event["error"]["code"]
            break
        result["first_s"] = result["first_s"] or time.perf_counter() - start
        result["tokens"] += sum(len(choice["collm"]["token_ids"]) for choice in event["choices"])
        if request["leave_after"] is not None and result["tokens"] >= request["leave_after"]:
            break
    writer.close()
    return result


async def all_of(host: str, port: int, requests: list[dict[str, Any]]) -> dict[str, Any]:
    """Run all streams at once and measure their total time in seconds."""
    start = time.perf_counter()
    streams = await asyncio.gather(*(stream(host, port, request) for request in requests))
    return {"seconds": time.perf_counter() - start, "streams": streams}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(all_of(sys.argv[1], int(sys.argv[2]), json.load(sys.stdin)))))
