"""/v1/responses: convert requests to chat requests, and write responses and their events."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from collm.core.types import TokenStep
from collm.serving.errors import APIError, invalid
from collm.serving.parsing import ToolChoice
from collm.serving.schemas import ChatRequest, FlatName, FlatTool, InputItem, ResponsesRequest, Sampled
from collm.serving.shapes import AssistantMessage, Extras, Json, Part, Shape, encoded, sse
from collm.text.tool_calls import Delta

_LOGPROBS = "message.output_text.logprobs"


def as_chat_request(body: ResponsesRequest) -> ChatRequest:
    """Convert a request to one of /v1/chat/completions.

    Raises:
        APIError: an input item that is no message, function call or function result.
    """
    shared = body.model_dump(include=set(Sampled.model_fields), exclude_unset=True, by_alias=True)
    messages = [{"role": "system", "content": body.instructions}] if body.instructions else []
    form = body.text.format.model_dump(by_alias=True, exclude_none=True) if body.text and body.text.format else None
    chat = {
        **shared,
        "messages": [*messages, *_messages(body.input)],
        "max_tokens": body.max_output_tokens,
        "logprobs": _LOGPROBS in (body.include or ()) or bool(body.top_logprobs),
        "top_logprobs": body.top_logprobs,
        "tools": [_nested(tool) for tool in body.tools or ()] or None,
        "tool_choice": _nested(body.tool_choice) if isinstance(body.tool_choice, FlatName) else body.tool_choice,
        "parallel_tool_calls": body.parallel_tool_calls,
        "response_format": form and {"type": form.pop("type"), "json_schema": form or None},
    }
    try:
        return ChatRequest.model_validate(chat)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise invalid(f"{where} is {first['input']!r:.60}: {first['msg']}", "input") from error


def _nested(tool: FlatTool | FlatName) -> Json:
    return {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}


def _messages(given: str | Sequence[InputItem]) -> Iterator[Json]:
    if isinstance(given, str):
        yield {"role": "user", "content": given}
        return
    calls: list[Json] = []
    for place, one in enumerate(given):
        item = one.model_dump(exclude_none=True)
        kind = item.pop("type", "message")
        if kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments", "")}
            calls.append({"id": item.get("call_id"), "type": "function", "function": function})
            continue
        if calls:
            yield {"role": "assistant", "content": None, "tool_calls": calls}
            calls = []
        if kind == "function_call_output":
            yield {"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")}
        elif kind == "message":
            yield {key: value for key, value in item.items() if key not in ("id", "status")}
        elif kind != "reasoning":
            message = f"input[{place}] has type {kind!r:.40}, expected message, function_call or function_call_output"
            raise invalid(message, f"input[{place}]")
    if calls:
        yield {"role": "assistant", "content": None, "tool_calls": calls}


class ResponseShape(Shape):
    """Writes a response: a message, function calls, or both.

    Args:
        body: the request, whose parameters the response has.
        calls: the functions that can be called.
    """

    prefix = "resp"

    def __init__(
        self,
        model: str,
        author_names: Sequence[str],
        extras: Extras,
        body: ResponsesRequest,
        calls: ToolChoice | None,
    ) -> None:
        super().__init__(model, author_names, extras)
        self._model = model
        self._id, self._created = f"resp_{uuid.uuid4().hex}", int(time.time())
        self._body = body
        self._said = AssistantMessage(calls)
        self._steps: list[TokenStep] = []
        self._pending: list[TokenStep] = []  # whose text is not out yet
        self._logprobs: list[Json] = []
        self._items: list[Json] = []
        self._finished: str | None = None
        self._sent = 0

    # In one piece

    def reply(self, parts: Sequence[Part], usage: Json) -> bytes:
        for part in parts:
            for _ in self._events(part):
                pass
        for _ in self._closing():
            pass
        return encoded(self._response(usage))

    # As a stream

    def begin(self) -> bytes:
        opened = self._response(None)
        return self._send("response.created", response=opened) + self._send("response.in_progress", response=opened)

    def event(self, part: Part, usage: Json | None) -> bytes:
        return b"".join(self._send(kind, **fields) for kind, fields in self._events(part))

    def end(self, usage: Json) -> bytes:
        closing = b"".join(self._send(kind, **fields) for kind, fields in self._closing())
        done = self._response(usage)
        return closing + self._send(f"response.{done['status']}", response=done)

    def broken_off(self, failure: APIError) -> bytes:
        error = failure.content["error"]
        return self._send("error", error=error, **{key: error[key] for key in ("code", "message", "param")})

    def _send(self, kind: str, **fields: Any) -> bytes:
        event = {"type": kind, "sequence_number": self._sent, **fields}
        self._sent += 1
        return sse(event, kind)

    # Events; they also build the output items

    def _events(self, part: Part) -> Iterator[tuple[str, Json]]:
        self._steps += part.steps
        self._pending += part.steps
        if self.extras.spellers:
            self._logprobs += self.extras.spellers[0].chat_logprobs(part.steps)
        self._finished = part.finish_reason or self._finished
        for delta in self._said.add(part):
            if delta.index is None:
                yield from self._write(delta)
            else:
                yield from self._call(delta)

    def _write(self, delta: Delta) -> Iterator[tuple[str, Json]]:
        if not self._items or self._items[-1]["type"] != "message":
            yield from self._closing()
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            item = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "content": [part]}
            yield from self._open(item, {**item, "content": []})
            yield "response.content_part.added", {**self._at, "content_index": 0, "part": dict(part)}
        self._items[-1]["content"][0]["text"] += delta.text
        said = {"delta": delta.text, "logprobs": [], "collm": Part(0, self._pending).authorship}
        self._pending = []
        yield "response.output_text.delta", {**self._at, "content_index": 0, **said}

    def _call(self, delta: Delta) -> Iterator[tuple[str, Json]]:
        if delta.name:
            yield from self._closing()
            call = {"type": "function_call", "call_id": delta.id, "name": delta.name, "arguments": ""}
            item = {"id": f"fc_{uuid.uuid4().hex}", **call}
            yield from self._open(item, dict(item))
        else:
            self._items[-1]["arguments"] += delta.text
            yield "response.function_call_arguments.delta", {**self._at, "delta": delta.text}

    def _open(self, item: Json, shown: Json) -> Iterator[tuple[str, Json]]:
        item["status"] = "in_progress"
        self._items.append(item)
        added = {**shown, "status": "in_progress"}
        yield "response.output_item.added", {"output_index": len(self._items) - 1, "item": added}

    def _closing(self) -> Iterator[tuple[str, Json]]:
        """Close the open item, if there is one."""
        if not self._items or self._items[-1]["status"] != "in_progress":
            return
        item = self._items[-1]
        item["status"] = "incomplete" if self._finished == "length" else "completed"
        if item["type"] == "message":
            part = item["content"][0]
            part["logprobs"], self._logprobs = self._logprobs, []
            at = {**self._at, "content_index": 0}
            yield "response.output_text.done", {**at, "text": part["text"], "logprobs": part["logprobs"]}
            yield "response.content_part.done", {**at, "part": part}
        else:
            named = {"name": item["name"], "arguments": item["arguments"]}
            yield "response.function_call_arguments.done", {**self._at, **named}
        yield "response.output_item.done", {"output_index": len(self._items) - 1, "item": item}

    @property
    def _at(self) -> Json:
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}

    def _response(self, usage: Json | None) -> Json:
        """The current response. A finished response has usage."""
        cut = self._finished == "length"
        asked, choice, done = self._body, self._body.tool_choice, "incomplete" if cut else "completed"
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": "in_progress" if usage is None else done,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if usage is not None and cut else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "model": self._model,
            "output": [] if usage is None else self._items,
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": asked.temperature,
            "text": asked.text.model_dump(by_alias=True, exclude_none=True) if asked.text else _PLAIN,
            "tool_choice": choice.model_dump() if isinstance(choice, FlatName) else choice or "auto",
            "tools": [tool.model_dump() for tool in asked.tools or ()],
            "top_p": asked.top_p,
            "truncation": "disabled",
            "usage": usage and _usage(usage),
            "user": asked.user,
            "metadata": asked.metadata or {},
            "collm": {"author_names": list(self.author_names), **Part(0, self._steps).authorship},
        }


_PLAIN = {"format": {"type": "text"}}


def _usage(usage: Mapping[str, Any]) -> Json:
    """Usage in the form of /v1/responses."""
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
        "collm": usage["collm"],
    }
