"""Fuzzed requests, by the OpenAPI document and beside it: no response has a status of 500 or above."""

from collections.abc import Callable
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import (
    content_type_conformance,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
)

EXAMPLES = 60
CALM = list(HealthCheck)
CHECKS: list[Any] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def fuzzed(thinking) -> Callable[[str, str, GenerationMode], None]:
    """Sends requests to one operation."""
    schema = schemathesis.openapi.from_url(f"{thinking.url}/openapi.json")

    def fuzz(path: str, method: str, mode: GenerationMode) -> None:
        @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=CALM)
        @given(schema[path][method].as_strategy(generation_mode=mode))
        def send(case: Any) -> None:
            if isinstance(case.body, dict) and "model" in case.body:
                case.body["model"] = "tiny"  # which no document can know
            response = case.call(timeout=30)
            case.validate_response(response, checks=CHECKS)
            if response.status_code >= 400:
                assert response.json()["error"]["message"]

        send()
        thinking.wait_until_empty()

    return fuzz


OPERATIONS = [
    ("/v1/chat/completions", "POST"),
    ("/v1/completions", "POST"),
    ("/v1/embeddings", "POST"),
    ("/v1/models", "GET"),
    ("/v1/models/{model}", "GET"),
    ("/tokenize", "POST"),
    ("/detokenize", "POST"),
    ("/health", "GET"),
    ("/stats", "GET"),
    ("/timeline", "GET"),
]


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_requests_of_the_document(path: str, method: str, fuzzed) -> None:
    fuzzed(path, method, GenerationMode.POSITIVE)


@pytest.mark.parametrize(("path", "method"), [each for each in OPERATIONS if each[1] == "POST"])
def test_requests_beside_the_document(path: str, method: str, fuzzed) -> None:
    fuzzed(path, method, GenerationMode.NEGATIVE)


@pytest.mark.parametrize(
    ("path", "prompt"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
        ("/v1/completions", {"prompt": "Hi"}),
    ],
)
def test_a_stream_is_what_the_document_says(path: str, prompt: dict[str, Any], thinking) -> None:
    """Of the requests above few ask for a stream, and fewer get one."""
    schema = schemathesis.openapi.from_url(f"{thinking.url}/openapi.json")
    case = schema[path]["POST"].Case(body={"model": "tiny", "stream": True, "max_tokens": 4, **prompt})
    response = case.call(timeout=30)
    assert response.headers["content-type"][0].startswith("text/event-stream")
    case.validate_response(response, checks=CHECKS)


def test_the_document_names_all_there_is(thinking) -> None:
    document = thinking.get("/openapi.json").json()
    there = {(path, method.upper()) for path, methods in document["paths"].items() for method in methods}
    assert there == {*OPERATIONS, ("/ready", "GET"), ("/metrics", "GET")}
