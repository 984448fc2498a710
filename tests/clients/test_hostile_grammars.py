"""Grammars of clients that would crash the compiler, or keep it busy, cost their request and nothing else."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from typing import Any

import pytest

from collm.core.params import StructuredOutputs
from collm.errors import RequestError
from collm.text import grammars, isolated
from collm.text.grammars import Grammars
from tests.clients.conftest import BYTES, QUESTION
from tests.serving.conftest import Running


def chain(depth: int, wrap: Any = lambda inner: inner) -> dict[str, Any]:
    """A schema whose definitions refer to each other."""
    definitions = {f"d{i}": wrap({"$ref": f"#/$defs/d{i + 1}"}) for i in range(depth)}
    return {"$ref": "#/$defs/d0", "$defs": {**definitions, f"d{depth}": {"type": "string"}}}


def rules(depth: int, name: str) -> str:
    """A Lark grammar whose rules or terminals refer to each other."""
    chained = "\n".join(f"{name}{i}: {name}{i + 1}" for i in range(depth))
    return f'start: {name}0\n{chained}\n{name}{depth}: "x"'


DEADLY: dict[str, dict[str, Any]] = {
    "references": {"json": chain(2600)},
    "references within the bound": {"json": chain(900)},
    "references through allOf": {"json": chain(900, lambda inner: {"allOf": [inner]})},
    "references through items": {"json": chain(900, lambda inner: {"type": "array", "items": inner})},
    "references through anyOf": {"json": chain(900, lambda inner: {"anyOf": [inner, {"type": "null"}]})},
    "references as text": {"json": json.dumps(chain(900)).replace("$ref", "\\u0024ref")},
    "rules": {"grammar": rules(10_000, "r")},
    "rules within the bound": {"grammar": rules(1990, "r")},
    "terminals": {"grammar": rules(10_000, "R")},
    "terminals within the bound": {"grammar": rules(1990, "R")},
    "properties that take long": {"json": {"type": "object", "properties": {f"p{i}": {} for i in range(16_000)}}},
    "bytes": {"regex": "a" * 300_000},
    "alternatives": {"grammar": "start: " + "|".join(['"a"'] * 20_002)},
    "nesting of GBNF": {"grammar": 'root ::= "a" | ' + "(" * 5000 + '"b"' + ")" * 5000},
    "nesting of JSON": {"json": "[" * 50_000 + "]" * 50_000},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DEADLY)
def test_a_deadly_grammar_costs_its_request(name: str, speaking: Running) -> None:
    start = time.monotonic()
    reply = speaking.post("/v1/completions", model="pair", prompt="x", max_tokens=2, structured_outputs=DEADLY[name])
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == "structured_outputs"
    assert len(reply.text) < 1000
    assert time.monotonic() - start < 10  # generous: at most 5
    assert speaking.client.get("/ready").status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize("depth", [2600, 900])
def test_every_source_of_a_grammar_is_checked(depth: int, speaking: Running) -> None:
    deadly = chain(depth)
    parameters = {"type": "object", "properties": {"x": deadly}, "$defs": deadly["$defs"]}
    function = {"name": "f", "parameters": parameters}
    required = [{"type": "function", "function": function}], [{"type": "function", **function}]
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": deadly}}
    flat = {"format": {"type": "json_schema", "name": "a", "schema": deadly}}
    chat, response = ("/v1/chat/completions", {"messages": QUESTION}), ("/v1/responses", {"input": "x"})
    for (path, body), more in [
        (chat, {"response_format": form}),
        (chat, {"tools": required[0], "tool_choice": "required"}),
        (response, {"text": flat}),
        (response, {"tools": required[1], "tool_choice": "required"}),
    ]:
        reply = speaking.post(path, model="pair", **body, **more)
        assert reply.status_code == 400, reply.text
        assert speaking.client.get("/ready").status_code == 200


def test_a_large_schema_is_compiled(speaking: Running) -> None:
    """What people send stays far from the bounds."""
    properties = {f"field_{i}": {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/part"}]} for i in range(100)}
    schema = {"type": "object", "properties": properties, "$defs": {"part": {"enum": [f"e{i}" for i in range(500)]}}}
    asked = {"model": "pair", "prompt": "x", "max_tokens": 2, "structured_outputs": {"json": schema}}
    reply = speaking.post("/v1/completions", **asked)
    assert reply.status_code == 200, reply.text


def test_the_check_knows_the_special_tokens_and_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = Grammars(BYTES, len(BYTES), [BYTES.eos_token_id])
    source = StructuredOutputs(grammar=f'start: "a" <eos> <[{BYTES.eos_token_id}]>')
    assert compiler.compile(source, trusted=False).allows(BYTES("a").input_ids) == 1
    monkeypatch.setattr(isolated, "run", lambda *_, **__: pytest.fail("it was compiled again"))
    compiler.compile(source, trusted=False)


def test_time_and_memory_of_the_check_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = Grammars(BYTES, len(BYTES), [BYTES.eos_token_id])
    monkeypatch.setattr(grammars, "COMPILE_S", 1e-4)
    with pytest.raises(RequestError, match=r"cannot be compiled within 0.0001 s, 1024 MiB"):
        compiler.compile(StructuredOutputs(regex="ab"), trusted=False)
    monkeypatch.setattr(grammars, "COMPILE_S", 60.0)
    monkeypatch.setattr(grammars, "COMPILE_BYTES", 16 << 20)
    with pytest.raises(RequestError, match="use a simpler one"):
        compiler.compile(StructuredOutputs(choice=[f"choice {i}" for i in range(15_000)]), trusted=False)
    compiler.compile(StructuredOutputs(choice=[f"choice {i}" for i in range(15_000)]))  # one of ours


@pytest.mark.slow
def test_an_ambiguous_grammar_ends_its_text_before_it_holds_up_others(speaking: Running) -> None:
    grammar = 'start: s\ns: s s | "a" | s s s |'
    asked = {"model": "pair", "prompt": "x", "max_tokens": 400, "ignore_eos": True}
    endless = {"logit_bias": {str(BYTES.eos_token_id): -100}, "structured_outputs": {"grammar": grammar}}
    reply = speaking.post("/v1/completions", **asked, **endless)
    assert reply.status_code == 400
    assert re.search(r"Current row has 10\d\d items; max is 1000", reply.json()["error"]["message"])


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_no_generated_grammar_ends_the_process() -> None:
    command = [sys.executable, "-m", "tests.text.grammar_fuzz"]
    running = [subprocess.Popen([*command, seed, "1000"], stdout=subprocess.PIPE, text=True) for seed in ("1", "2")]
    for one in running:
        output, _ = one.communicate()
        assert one.returncode == 0
        found = json.loads(output)
        assert min(found["compiled"], found["refused"]) > 100
        assert re.match(r"\d", str(found["slowest_s"]))
