"""/v1/responses: convert requests to chat requests, and write responses and their events."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from pydantic import ValidationError

from collm.core.types import TokenStep
from collm.serving.errors import APIError, invalid
from collm.serving.schemas import ChatRequest, FlatTool, ResponsesRequest, Sampled
from collm.serving.shapes import Json, Shape, authorship, encoded, sse
from collm.serving.worker import Part

_LOGPROBS = "message.output_text.logprobs"


def as_chat_request(body: ResponsesRequest) -> ChatRequest:
    shared = body.model_dump(include=set(Sampled.model_fields), exclude_unset=True, by_alias=True)
    instructions = [{"role": "system", "content": body.instructions}] if body.instructions else []
    form = body.text and body.text.format
    chat = {
        **shared,
        "messages": [*instructions, *_messages(body.input)],
        "max_tokens": body.max_output_tokens,
        "logprobs": _LOGPROBS in (body.include or ()) or bool(body.top_logprobs),
        "top_logprobs": body.top_logprobs,
        "tools": [_nested(tool) for tool in body.tools or ()] or None,
        "tool_choice": _nested(body.tool_choice) if isinstance(body.tool_choice, FlatTool) else body.tool_choice,
        "parallel_tool_calls": body.parallel_tool_calls,
        "response_format": form and {"type": form.type, "json_schema": form.model_dump(by_alias=True)},
    }
    try:
        return ChatRequest.model_validate(chat)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise invalid(f"{where} is {first['input']!r:.60}: {first['msg']}", "input") from error


def _nested(tool: FlatTool) -> Json:
    return {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}


def _messages(given: str | Sequence[Mapping[str, Any]]) -> Iterator[Json]:
    if isinstance(given, str):
        yield {"role": "user", "content": given}
        return
    items = [{key: value for key, value in item.items() if value is not None} for item in given]
    for kind, group in groupby(enumerate(items), key=lambda placed: placed[1].pop("type", "message")):
        if kind == "function_call":
            yield {"role": "assistant", "content": None, "tool_calls": [_call(item) for _, item in group]}
            continue
        for place, item in group:
            if kind == "function_call_output":
                yield {"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")}
            elif kind == "message":
                yield {key: value for key, value in item.items() if key not in ("id", "status")}
            elif kind != "reasoning":
                expected = "message, function_call or function_call_output"
                raise invalid(f"input[{place}] has type {kind!r:.40}, expected {expected}", f"input[{place}]")


def _call(item: Mapping[str, Any]) -> Json:
    function = {"name": item.get("name"), "arguments": item.get("arguments", "")}
    return {"id": item.get("call_id"), "type": "function", "function": function}


class ResponseShape(Shape):
    """Writes a response: a message, function calls, or both. Its events also build its output items."""

    prefix = "resp_"

    def __init__(self, *arguments: Any, body: ResponsesRequest) -> None:
        super().__init__(*arguments)
        self._body = body
        self._steps: list[TokenStep] = []
        self._pending: list[TokenStep] = []  # whose text is not out yet
        self._logprobs: list[Json] = []
        self._items: list[Json] = []
        self._cut = False
        self._events: list[bytes] = []
        self._count = 0

    def reply(self, parts: Sequence[Part], authors: Sequence[int]) -> bytes:
        for part in parts:
            self.event(part, authors)
        self._close()
        return encoded(self._response(authors))

    def begin(self) -> bytes:
        opened = self._response(None)
        self._emit("response.created", response=opened)
        self._emit("response.in_progress", response=opened)
        return self._taken()

    def event(self, part: Part, authors: Sequence[int]) -> bytes:
        self._steps += part.steps
        self._pending += part.steps
        if self._token_texts:
            self._logprobs += self._token_texts[0].chat_logprobs(part.steps)
        self._cut = part.finish_reason == "length"
        for delta in self.deltas(part):
            if delta.index is None:
                self._write(delta.text)
            elif delta.name:
                call = {"type": "function_call", "call_id": delta.id, "name": delta.name, "arguments": ""}
                self._open({"id": f"fc_{uuid.uuid4().hex}", **call})
            else:
                self._items[-1]["arguments"] += delta.text
                self._emit("response.function_call_arguments.delta", **self._at, delta=delta.text)
        return self._taken()

    def end(self, authors: Sequence[int]) -> bytes:
        if self._pending and self._items and self._items[-1]["type"] == "message":
            self._write("")  # who wrote the end of the text, which may have come alone
        self._close()
        done = self._response(authors)
        self._emit(f"response.{done['status']}", response=done)
        return self._taken()

    def broken_off(self, error: APIError) -> bytes:
        shown = error.content["error"]
        self._emit("error", error=shown, **{key: shown[key] for key in ("code", "message", "param")})
        return self._taken()

    def usage(self, authors: Sequence[int]) -> Json:
        usage = super().usage(authors)
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
            "collm": usage["collm"],
        }

    def _emit(self, kind: str, **fields: Any) -> None:
        self._events.append(sse({"type": kind, "sequence_number": self._count, **fields}, kind))
        self._count += 1

    def _taken(self) -> bytes:
        events, self._events = self._events, []
        return b"".join(events)

    @property
    def _at(self) -> Json:
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}

    def _write(self, text: str) -> None:
        if not self._items or self._items[-1]["type"] != "message":
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            self._open({"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "content": []})
            self._emit("response.content_part.added", **self._at, content_index=0, part=part)
            self._items[-1]["content"].append(part)
        self._items[-1]["content"][0]["text"] += text
        added = {"delta": text, "logprobs": [], "collm": authorship(self._pending)}
        self._pending = []
        self._emit("response.output_text.delta", **self._at, content_index=0, **added)

    def _open(self, item: Json) -> None:
        self._close()
        item["status"] = "in_progress"
        self._items.append(item)
        self._emit("response.output_item.added", output_index=len(self._items) - 1, item=item)

    def _close(self) -> None:
        if not self._items or self._items[-1]["status"] != "in_progress":
            return
        item = self._items[-1]
        item["status"] = "incomplete" if self._cut else "completed"
        if item["type"] == "message":
            [part] = item["content"]
            part["logprobs"], self._logprobs = self._logprobs, []
            at = {**self._at, "content_index": 0}
            self._emit("response.output_text.done", **at, text=part["text"], logprobs=part["logprobs"])
            self._emit("response.content_part.done", **at, part=part)
        else:
            done = {"name": item["name"], "arguments": item["arguments"]}
            self._emit("response.function_call_arguments.done", **self._at, **done)
        self._emit("response.output_item.done", output_index=len(self._items) - 1, item=item)

    def _response(self, authors: Sequence[int] | None) -> Json:
        """The finished response, or without `authors` that at the beginning."""
        body, choice, ended = self._body, self._body.tool_choice, authors is not None
        text = body.text.model_dump(by_alias=True, exclude_none=True) if body.text else {"format": {"type": "text"}}
        cut = ended and self._cut
        return {
            "id": self._head["id"],
            "object": "response",
            "created_at": self._head["created"],
            "status": ("incomplete" if cut else "completed") if ended else "in_progress",
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self._head["model"],
            "output": self._items,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": body.temperature,
            "text": text,
            "tool_choice": choice.model_dump(exclude_none=True) if isinstance(choice, FlatTool) else choice or "auto",
            "tools": [tool.model_dump() for tool in body.tools or ()],
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None if authors is None else self.usage(authors),
            "user": body.user,
            "metadata": body.metadata or {},
            "collm": {**self._head["collm"], **authorship(self._steps)},
        }
