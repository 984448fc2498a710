"""The schema at /openapi.json is true: what it allows is answered, and never with a 5xx."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    status_code_conformance,
)

from tests.serving.conftest import Running

CHECKS: list[Callable[..., Any]] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
]
OPERATIONS = [
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/responses"),
    ("POST", "/v1/collm/candidates"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/tokenizer_info"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{name}"),
    ("GET", "/v1/collm/info"),
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/metrics"),
]


def test_every_operation_is_fuzzed(server: Running) -> None:
    paths = server.client.get("/openapi.json").json()["paths"]
    assert {(method.upper(), path) for path, methods in paths.items() for method in methods} == set(OPERATIONS)


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [
        (*one, mode)
        for one in OPERATIONS
        for mode in schemathesis.GenerationMode
        if one[0] == "POST" or mode.is_positive
    ],
)
def test_answers_are_as_the_schema_says(server: Running, method: str, path: str, mode: Any) -> None:
    document = server.client.get("/openapi.json").json()
    _aim(document)
    cases = schemathesis.openapi.from_dict(document)[path][method].as_strategy(generation_mode=mode)

    @seed(0)
    @settings(
        max_examples=15,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases)
    def check(case: Any) -> None:
        case.call_and_validate(base_url=server.url, checks=CHECKS)

    check()


def _aim(document: dict[str, Any]) -> None:
    """Models that exist, and few tokens, so that what is generated reaches the models."""
    schemas = document["components"]["schemas"]
    for name in ("Completion", "Chat", "Responses", "Candidates", "Tokenize", "Detokenize"):
        properties = schemas[f"{name}Request"]["properties"]
        properties["model"] = {"type": "string", "enum": ["pair", "pair/base", "three"]}
        for limit in {"max_tokens", "max_completion_tokens", "max_output_tokens"} & set(properties):
            properties[limit] = {"type": "integer", "minimum": 1, "maximum": 5}
