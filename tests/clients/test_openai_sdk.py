"""OpenAI's own library against a live server: chats, tools, structured answers, responses, streams."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, Field

from tests.clients.conftest import BYTES, CALL, CLOCK, QUESTION, WEATHER
from tests.serving.conftest import Running

CALLER: dict[str, Any] = {
    "model": "caller",
    "messages": QUESTION,
    "tools": [WEATHER],
    "max_tokens": len(BYTES.encode(CALL)),
    "extra_body": {"collm": {"threshold": -1}},
}


class Answer(BaseModel):
    """What a structured answer is."""

    verdict: Literal["yes", "no"]
    score: int = Field(ge=0, le=9)


def is_weather(arguments: str) -> bool:
    found = json.loads(arguments)
    return found["city"] in ("Paris", "Oslo") and 1 <= found["days"] <= 9 and len(found) == 2


def test_sampling_is_meant_by_asking_for_it(client: openai.OpenAI) -> None:
    def texts(**options: Any) -> list[str]:
        reply = client.completions.create(model="pair", prompt="the", max_tokens=12, **options)
        return [choice.text for choice in reply.choices]

    greedy = texts()
    assert texts(temperature=0, top_p=0.5, seed=3) == greedy
    assert texts(top_p=0.0) == greedy
    assert texts(top_p=0.9, seed=3) == texts(top_p=0.9, seed=3, temperature=1) != greedy
    assert texts(extra_body={"top_k": -1}) == greedy
    assert len(set(texts(n=3, seed=1))) == 3


def test_messages_of_every_role_are_rendered(client: openai.OpenAI, speaking: Running) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    messages: list[Any] = [
        {"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]},
        {"role": "user", "content": "the cat?", "name": "ada"},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
        {"role": "assistant", "content": None, "refusal": "no"},
        {"role": "user", "content": "why?"},
    ]
    reply = client.chat.completions.create(model="pair", messages=messages, max_tokens=4)
    assert reply.usage is not None
    rendered = speaking.post("/tokenize", model="pair", messages=messages).json()["tokens"]
    text = speaking.post("/detokenize", model="pair", tokens=rendered).json()["prompt"]
    assert text == (
        "<system>be brief<user>the cat?<assistant><tool_call>\n"
        '{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><tool>rain<assistant>no<user>why?<assistant>'
    )
    assert reply.usage.prompt_tokens == len(rendered)


@pytest.mark.parametrize("name", ["pair", "pair/base", "pair/assistant"])
def test_structured_answers_are_parsed(client: openai.OpenAI, name: str) -> None:
    asked: dict[str, Any] = {"model": name, "messages": QUESTION, "temperature": 1, "seed": 2}
    reply = client.chat.completions.parse(**asked, response_format=Answer)
    assert isinstance(reply.choices[0].message.parsed, Answer)
    with client.chat.completions.stream(**asked, response_format=Answer) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == reply.choices[0].message.parsed
    for form in ({"type": "json_object"}, {"type": "text"}):
        asked = {"model": name, "messages": QUESTION, "max_tokens": 200, "logit_bias": {"92": 5}}
        plain = client.chat.completions.create(**asked, response_format=form)
        if form["type"] == "json_object" and plain.choices[0].finish_reason == "stop":
            assert isinstance(json.loads(plain.choices[0].message.content), dict)


def test_the_ways_of_vllm_to_say_what_a_text_is(client: openai.OpenAI) -> None:
    def text(**form: Any) -> str:
        body = {"structured_outputs": form}
        return client.completions.create(model="pair", prompt="x", max_tokens=50, extra_body=body).choices[0].text

    assert text(choice=["red", "green"]) in ("red", "green")
    assert len(text(regex="[0-9]{4}")) == 4
    assert text(grammar='root ::= "a" ("b" | "c")') in ("ab", "ac")
    assert Answer.model_validate_json(text(json=Answer.model_json_schema()))


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
@pytest.mark.parametrize("parallel", [True, False])
def test_a_call_that_must_come_satisfies_its_schema(client: openai.OpenAI, choice: Any, parallel: bool) -> None:
    asked: dict[str, Any] = {
        "model": "pair",
        "messages": QUESTION,
        "tools": [WEATHER, CLOCK] if choice != "required" else [WEATHER],
        "tool_choice": choice,
        "parallel_tool_calls": parallel,
        "temperature": 1,
        "seed": 5,
        "max_tokens": 300,
    }
    reply = client.chat.completions.create(**asked)
    calls = reply.choices[0].message.tool_calls
    assert reply.choices[0].finish_reason in ("tool_calls", "length")
    assert reply.choices[0].message.content is None
    if not parallel or choice != "required":
        assert len(calls) == 1
        assert reply.choices[0].finish_reason == "tool_calls"
    assert calls[0].function.name == "weather"
    assert is_weather(calls[0].function.arguments)

    pieces: dict[int, list[str]] = {}
    for chunk in client.chat.completions.create(**asked, stream=True):
        for call in chunk.choices[0].delta.tool_calls or []:
            if call.id:
                assert call.function.name == "weather"
                pieces[call.index] = []
            pieces[call.index].append(call.function.arguments or "")
        finish = chunk.choices[0].finish_reason
    assert ["".join(one) for one in pieces.values()] == [call.function.arguments for call in calls]
    assert finish == reply.choices[0].finish_reason


def test_calls_are_told_from_text_whole_and_streamed(client: openai.OpenAI) -> None:
    plain = client.chat.completions.create(**{**CALLER, "tools": openai.NOT_GIVEN})
    reply = client.chat.completions.create(**CALLER)
    message = reply.choices[0].message
    assert [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls] == [
        ("weather", {"city": "Oslo", "days": 2})
    ]
    assert message.content == "so: "
    assert "<tool_call>" in plain.choices[0].message.content
    content, arguments = "", ""
    for chunk in client.chat.completions.create(**CALLER, stream=True):
        content += chunk.choices[0].delta.content or ""
        for call in chunk.choices[0].delta.tool_calls or []:
            arguments += call.function.arguments
    assert (content, arguments) == (message.content, message.tool_calls[0].function.arguments)
    none = client.chat.completions.create(**CALLER, tool_choice="none")
    assert none.choices[0].message.content == plain.choices[0].message.content


def test_responses_say_what_chats_say(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(model="pair", messages=QUESTION, max_tokens=12)
    for asked in ("the cat?", [{"role": "user", "content": [{"type": "input_text", "text": "the cat?"}]}]):
        reply = client.responses.create(model="pair", input=asked, max_output_tokens=12)  # type: ignore[arg-type]
        assert reply.output_text == chat.choices[0].message.content
        assert reply.status == ("incomplete" if chat.choices[0].finish_reason == "length" else "completed")
        assert reply.usage is not None
        assert reply.usage.total_tokens == chat.usage.total_tokens  # type: ignore[union-attr]
    more: dict[str, Any] = {"instructions": "be brief", "store": True, "reasoning": {"effort": "low"}}
    begun = client.responses.create(model="pair", input="the cat?", max_output_tokens=4, **more)
    system: list[Any] = [{"role": "system", "content": "be brief"}, *QUESTION]
    same = client.chat.completions.create(model="pair", messages=system, max_tokens=4)
    assert begun.output_text == same.choices[0].message.content


def test_responses_are_streamed_as_events(client: openai.OpenAI) -> None:
    whole = client.responses.create(model="pair", input="the cat?", max_output_tokens=12)
    events = list(client.responses.create(model="pair", input="the cat?", max_output_tokens=12, stream=True))
    kinds = [event.type for event in events]
    kinds = [kind.removeprefix("response.") for kind in kinds]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(event.delta for event in deltas) == whole.output_text
    assert events[-1].response.output_text == whole.output_text  # type: ignore[union-attr]
    assert events[-1].response.collm["authors"] == whole.collm["authors"]  # type: ignore[union-attr, attr-defined]


def test_responses_are_parsed_and_call_functions(client: openai.OpenAI) -> None:
    parsed = client.responses.parse(
        model="pair", input="the cat?", text_format=Answer, temperature=1, extra_body={"seed": 1}
    )
    assert isinstance(parsed.output_parsed, Answer)
    flat = {"type": "function", "strict": True, **WEATHER["function"]}
    asked: dict[str, Any] = {"model": "pair", "input": "the cat?", "tools": [flat], "tool_choice": "required",
                             "parallel_tool_calls": False}  # fmt: skip
    reply = client.responses.create(**asked)
    (call,) = reply.output
    assert call.type == "function_call"
    assert is_weather(call.arguments)
    with client.responses.stream(**asked) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert "response.function_call_arguments.delta" in kinds
    assert [(one.name, one.arguments) for one in final.output] == [(call.name, call.arguments)]  # type: ignore[union-attr]
    history: list[Any] = [
        *QUESTION,
        {"type": "function_call", "call_id": call.call_id, "name": call.name, "arguments": call.arguments},
        {"type": "function_call_output", "call_id": call.call_id, "output": "rain"},
    ]
    followed = client.responses.create(model="pair", input=history, max_output_tokens=3)
    assert followed.usage is not None
    assert followed.usage.output_tokens == 3


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"previous_response_id": "resp_1"}, "send the whole conversation"),
        ({"background": True}, "answers are not kept"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "expected message, function_call"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input_image"),
        ({"tools": [{"type": "web_search"}]}, "function"),
    ],
)
def test_what_responses_do_not_have_says_so(speaking: Running, wrong: dict[str, Any], said: str) -> None:
    reply = speaking.post("/v1/responses", **{"model": "pair", "input": "the", **wrong})
    assert reply.status_code == 400
    assert said in reply.json()["error"]["message"]


def test_chats_go_on_with_a_message(client: openai.OpenAI, speaking: Running) -> None:
    begun: list[Any] = [*QUESTION, {"role": "assistant", "content": "the mat"}]
    extra = {"continue_final_message": True, "add_generation_prompt": False}
    reply = client.chat.completions.create(model="pair", messages=begun, max_tokens=6, extra_body=extra)
    same = client.completions.create(model="pair", prompt="<user>the cat?<assistant>the mat", max_tokens=6)
    assert reply.choices[0].message.content == same.choices[0].text
