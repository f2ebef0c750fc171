"""Whatever the schema allows, and what it does not: no status of 500 and above."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode

from eyespot.inference import Assistant
from eyespot.serving.engine import Engine
from eyespot.serving.gate import CHAT
from eyespot.serving.limits import Limits
from eyespot.serving.metrics import Metrics
from eyespot.serving.server import make_app
from served import NAME

LIMITS = Limits(max_tokens=8, max_prompt_tokens=100)


@pytest.fixture(scope="module")
def schema(assistant: Assistant) -> Iterator[Any]:
    metrics = Metrics()
    with Engine(assistant, NAME, LIMITS, metrics) as engine:
        yield schemathesis.openapi.from_asgi("/openapi.json", make_app([engine], LIMITS, metrics, page=False))


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [("POST", CHAT, GenerationMode.POSITIVE), ("POST", CHAT, GenerationMode.NEGATIVE),
     *(("GET", path, GenerationMode.POSITIVE) for path in ("/v1/models", "/health", "/metrics"))],
)  # fmt: skip
def test_no_question_breaks_the_server(schema: Any, method: str, path: str, mode: GenerationMode) -> None:
    seen = set()

    @settings(max_examples=60 if path == CHAT else 3, deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(schema[path][method].as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = NAME  # else every example ends at the name
        response = case.call()
        seen.add(response.status_code)
        assert response.status_code < 500, response.text
        if response.status_code >= 400:
            assert response.json()["error"]["message"]

    check()
    if path == CHAT:
        assert 400 in seen
