"""The OpenAPI description, fuzzed: no 5xx, nothing that the description does not allow, no error in a foreign shape."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

from eda.server.settings import Settings
from tests.server.serving import Parts, make_parts, serve
from tests.support.family import Family


@pytest.fixture(scope="module")
def fuzzed_parts(family: Family) -> Parts:
    parts = make_parts(family, settings=Settings(max_body_bytes=65536))
    parts.registry.max_model_len = 32  # answers to chats go on to the end of the model
    return parts


@pytest.fixture(scope="module")
def api(fuzzed_parts: Parts) -> Iterator[Any]:
    with serve(fuzzed_parts.services) as url:
        yield schemathesis.openapi.from_url(f"{url}/openapi.json")
        fuzzed_parts.wait_until_idle()


OPERATIONS = [
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{name}"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/version"),
    ("GET", "/metrics"),
]


def test_every_operation_is_fuzzed(api: Any) -> None:
    """Those of administration have tests of their own."""
    described = {(r.ok().method.upper(), r.ok().path) for r in api.get_all_operations()}
    admin = ("/adapters", "/jobs", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")
    assert {operation for operation in described if not operation[1].startswith(admin)} == set(OPERATIONS)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_no_request_breaks_the_server(api: Any, method: str, path: str, mode: GenerationMode) -> None:
    operation = api[path][method]
    if mode is GenerationMode.NEGATIVE and method == "GET":
        pytest.skip("there is nothing to get wrong")

    @settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: schemathesis.Case) -> None:
        send_and_check(case)
        if isinstance(case.body, dict) and "model" in case.body:
            # Nearly every random name is unknown; with a known one the request gets further.
            case.body = copy.deepcopy(case.body) | {"model": "base"}
            send_and_check(case)

    check()


def send_and_check(case: schemathesis.Case) -> None:
    response = case.call(timeout=30)
    assert response.status_code < 500, response.text
    if response.headers.get("content-type") == ["text/event-stream; charset=utf-8"]:
        return
    case.validate_response(response, checks=[content_type_conformance, response_schema_conformance])
    if response.status_code >= 400:
        body = response.json()
        assert set(body) == {"error"}
        assert set(body["error"]) == {"message", "type", "param", "code"}
