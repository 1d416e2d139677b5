"""Every error is OpenAI's shape and names what is wrong."""

import json
from typing import Any

import httpx
import pytest

from eda.server.app import create_app
from tests.server.serving import make_parts
from tests.support.family import Family

COMPLETION = {"model": "base", "prompt": "x", "max_tokens": 2}
CHAT = {"model": "base", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}


def refuse(client: httpx.Client, path: str, body: Any, status: int = 400) -> dict[str, Any]:
    return error_of(client.post(path, json=body), status)


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    error: dict[str, Any] = body["error"]
    return error


@pytest.mark.parametrize(
    "name", ["best_of", "suffix", "guided_json", "response_format", "Temperature", "use_beam_search"]
)
def test_unknown_parameters_are_refused_by_name(client: httpx.Client, name: str) -> None:
    error = refuse(client, "/v1/completions", {**COMPLETION, name: 2})
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")
    assert name in error["message"]


NEUTRAL: list[dict[str, Any]] = [
    {"best_of": 1},
    {"best_of": 2, "n": 2},
    {"suffix": ""},
    {"echo": None, "draft": None, "ignore_eos": None, "min_tokens": None, "priority": None, "user": None},
    {"stop": []},
    {"logit_bias": {}},
    {"stream_options": {"include_usage": False}},
    {"user": "me", "safety_identifier": "me", "prompt_cache_key": "mine"},
]
NEUTRAL_IN_CHATS: list[dict[str, Any]] = [
    {"response_format": {"type": "text"}},
    {"tools": [], "tool_choice": "none"},
    {"tool_choice": "auto", "parallel_tool_calls": True},
    {"functions": [], "function_call": "none"},
    {"store": False, "metadata": {}},
    {"metadata": {"project": "x"}},
    {"service_tier": "auto"},
    {"service_tier": "default"},
    {"modalities": ["text"]},
    {"top_logprobs": 0},
    {"logprobs": False, "top_logprobs": 0},
    {"reasoning_effort": "none", "verbosity": "medium"},
    {"stream_options": {"include_usage": False, "include_obfuscation": False}},
]
NEUTRAL_IN_MESSAGES: list[dict[str, Any]] = [
    {"name": "me"},
    {"tool_calls": [], "annotations": [], "refusal": None, "audio": None, "function_call": None},
    {"cache_control": {"type": "ephemeral"}},
    {"content": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}, "annotations": []}]},
]


@pytest.mark.parametrize("change", NEUTRAL)
def test_values_that_ask_for_nothing_are_taken(client: httpx.Client, change: dict[str, Any]) -> None:
    body = {**COMPLETION, "seed": 1, "n": change.get("n")}
    usual = client.post("/v1/completions", json=body).json()
    answer = client.post("/v1/completions", json={**body, **change})
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"] == usual["choices"]


@pytest.mark.parametrize("change", NEUTRAL_IN_CHATS + [{"messages": [m]} for m in NEUTRAL_IN_MESSAGES])
def test_chats_take_values_that_ask_for_nothing(client: httpx.Client, change: dict[str, Any]) -> None:
    body = {**CHAT, "seed": 1}
    usual = client.post("/v1/chat/completions", json=body).json()
    messages = [{"role": "user", "content": "x"} | message for message in change.get("messages", [{}])]
    answer = client.post("/v1/chat/completions", json={**body, **change, "messages": messages})
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"] == usual["choices"]


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("response_format", {"type": "json_object"}, '{"type": "text"}'),
        ("tools", [{"type": "function", "function": {"name": "f"}}], "[]"),
        ("tool_choice", "required", '"none" or "auto"'),
        ("store", True, "false"),
        ("store", 0, "false"),
        ("service_tier", "priority", '"auto" or "default"'),
        ("modalities", ["text", "audio"], '["text"]'),
        ("reasoning_effort", "high", '"none"'),
        ("audio", {"voice": "x"}, "not supported"),
    ],
)
def test_values_that_would_change_the_answer_are_refused(
    client: httpx.Client, name: str, value: Any, wanted: str
) -> None:
    error = refuse(client, "/v1/chat/completions", {**CHAT, name: value})
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")
    assert wanted in error["message"]


def test_a_message_with_a_call_is_refused_by_its_place(client: httpx.Client) -> None:
    messages = [CHAT["messages"][0], {"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]  # type: ignore[index]
    error = refuse(client, "/v1/chat/completions", {**CHAT, "messages": messages})
    assert (error["param"], error["code"]) == ("messages[1].tool_calls", "unsupported_parameter")


@pytest.mark.parametrize("name", ["tools", "tool_choice", "response_format", "audio", "store", "functions"])
def test_unsupported_chat_parameters_are_refused_unless_null(client: httpx.Client, name: str) -> None:
    assert refuse(client, "/v1/chat/completions", {**CHAT, name: {}})["param"] == name
    assert client.post("/v1/chat/completions", json={**CHAT, name: None}).status_code == 200


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"n": 0}, "n"),
        ({"n": 65}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 512}, "max_tokens"),
        ({"min_tokens": 3}, "min_tokens"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"stop_token_ids": [9999]}, "stop_token_ids"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"logit_bias": {"9999": 1}}, "logit_bias"),
        ({"logprobs": 21}, "logprobs"),
        ({"draft": "best"}, "draft"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [400]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"model": None}, "model"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"chunks": 1}}, "stream_options.chunks"),
        ({"echo": True, "logprobs": 1}, "echo"),
    ],
)
def test_wrong_values_name_their_parameter(client: httpx.Client, change: dict[str, Any], param: str) -> None:
    error = refuse(client, "/v1/completions", {**COMPLETION, **change})
    assert error["type"] == "invalid_request_error"
    assert error["code"]
    assert (error["param"] or "").startswith(param), error


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"prompt": [1, "a"]}, "prompt[1]", "valid integer; got 'a'"),
        ({"prompt": ["a", 1]}, "prompt[1]", "valid string; got 1"),
        ({"prompt": [[]]}, "prompt[0]", "at least 1 item"),
        ({"prompt": {"a": 1}}, "prompt", "a valid string or a valid list; got an object"),
        ({"stop": ["x", ""]}, "stop[1]", "at least 1 character; got ''"),
        ({"stop": 3}, "stop", "a valid string or a valid list; got 3"),
        ({"n": 65}, "n", "1 prompts with n 65 make 65 completions; a request may ask for 64"),
        ({"prompt": ["x"] * 65}, "prompt", "make 65 completions"),
        ({"temperature": 3}, "temperature", "less than or equal to 2; got 3"),
    ],
)
def test_where_several_forms_are_possible_the_closest_is_explained(
    client: httpx.Client, change: dict[str, Any], param: str, message: str
) -> None:
    error = refuse(client, "/v1/completions", {**COMPLETION, **change})
    assert error["param"] == param
    assert message in error["message"]


HALF_A_PAIR = "\ud800"


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("/v1/completions", {"prompt": HALF_A_PAIR}),
        ("/v1/completions", {"prompt": ["x", HALF_A_PAIR]}),
        ("/v1/completions", {"stop": HALF_A_PAIR}),
        ("/v1/completions", {"model": HALF_A_PAIR}),
        ("/v1/completions", {HALF_A_PAIR: 1}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": HALF_A_PAIR}]}),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": HALF_A_PAIR}]}]},
        ),
        ("/tokenize", {"prompt": HALF_A_PAIR}),
    ],
)
def test_text_that_is_no_unicode(client: httpx.Client, path: str, change: dict[str, Any]) -> None:
    """JSON can spell half of a surrogate pair; no tokenizer can read it."""
    usual = {"/v1/completions": COMPLETION, "/v1/chat/completions": CHAT}.get(path, {})
    body = json.dumps({**usual, **change})
    response = client.post(path, content=body, headers={"content-type": "application/json"})
    assert "unicode string" in error_of(response, 400)["message"]


@pytest.mark.parametrize(
    "change",
    [
        {"messages": []},
        {"messages": [{"role": "tool", "content": "x"}]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"messages": [{"role": "user", "content": "x", "name": "m" * 513}]},
        {"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]},
        {"metadata": {"x": 1}},
        {"top_logprobs": 2},
        {"logprobs": True, "top_logprobs": 21},
    ],
)
def test_wrong_chats(client: httpx.Client, change: dict[str, Any]) -> None:
    refuse(client, "/v1/chat/completions", {**CHAT, **change})


def test_a_part_that_is_no_text_is_named(client: httpx.Client) -> None:
    parts = [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "x"}}]
    error = refuse(client, "/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": parts}]})
    assert error["param"] == "messages[0].content[1].type"
    assert "'text'; got 'image_url'" in error["message"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'"x"', b"\xff\xfe", b'{"model": NaN}', b"[" * 5000])
def test_bodies_that_are_no_object(client: httpx.Client, content: bytes) -> None:
    response = client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    error_of(response, 400)


def test_a_body_of_another_kind(client: httpx.Client) -> None:
    """What curl sends without ``-H``."""
    error = error_of(client.post("/v1/completions", data={"model": "base"}), 400)
    assert "Content-Type: application/json" in error["message"]


def test_large_bodies(client: httpx.Client) -> None:
    large = b'{"prompt": "' + b"x" * (4 * 1024 * 1024) + b'"}'
    assert error_of(client.post("/v1/completions", content=large), 413)["code"] == "body_too_large"
    parts = (large[start : start + 65536] for start in range(0, len(large), 65536))
    assert error_of(client.post("/v1/completions", content=parts), 413)["code"] == "body_too_large"


def test_a_long_prompt_is_refused_before_it_is_tokenized(client: httpx.Client) -> None:
    error = refuse(client, "/v1/completions", {**COMPLETION, "prompt": "x" * 3_000_000})
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")


def test_unknown_models_paths_and_methods(client: httpx.Client) -> None:
    assert refuse(client, "/v1/completions", {**COMPLETION, "model": "x"}, 404)["code"] == "model_not_found"
    assert refuse(client, "/tokenize", {"model": "x", "prompt": "y"}, 404)["code"] == "model_not_found"
    assert error_of(client.get("/v1/models/x"), 404)["code"] == "model_not_found"
    assert error_of(client.get("/v1/nothing"), 404)["code"] == "not_found"
    response = client.get("/v1/completions")
    assert error_of(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"


def test_every_answer_has_a_request_id(client: httpx.Client) -> None:
    answers = [
        client.get("/version"),
        client.get("/nothing"),
        client.post("/v1/completions", json=COMPLETION),
    ]
    assert len({answer.headers["x-request-id"] for answer in answers}) == 3


async def test_an_unexpected_error_tells_nothing_of_the_inside(family: Family) -> None:
    parts = make_parts(family)
    parts.registry.model_names = lambda: [1 / 0]  # type: ignore[method-assign,assignment,list-item]
    transport = httpx.ASGITransport(create_app(parts.services), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        error = error_of(await client.get("/v1/models"), 500)
    assert (error["type"], error["code"]) == ("server_error", "internal_error")
    assert "division" not in error["message"]
