"""Whatever a body holds, the server goes on answering others."""

import asyncio
import gc
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from eda.server.bodies import VALUES_PER_CONTAINER, check_json, has_more_values
from eda.server.errors import ApiError
from eda.server.middleware import LONGEST_TURN, Turns
from eda.server.schemas.adapters import CreateAdapterRequest
from eda.server.schemas.generation import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    RequestModel,
)

SIZE = 3_900_000
"""Bytes, just below what the server reads."""
COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
SECONDS_WITHOUT_ANSWER = 0.5


def fill(item: bytes, size: int = SIZE) -> bytes:
    """``item`` again and again, separated by commas."""
    return b",".join([item] * (size // (len(item) + 1)))


def completion(name: str, value: bytes) -> bytes:
    return b'{"model": "base", "max_tokens": 2, "' + name.encode() + b'": ' + value + b"}"


def message(content: bytes) -> bytes:
    return b'{"role": "user", "content": ' + content + b"}"


def chat(messages: bytes) -> bytes:
    return b'{"model": "base", "max_tokens": 2, "messages": [' + messages + b"]}"


def numbered(value: bytes, count: int) -> bytes:
    return b"{" + b",".join(b'"%d":%b' % (place, value) for place in range(count)) + b"}"


PART = b'{"type":"text","text":""}'
BODIES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "empty lists": (COMPLETION, lambda: completion("prompt", b"[" + fill(b"[]") + b"]")),
    "lists of one": (COMPLETION, lambda: completion("prompt", b"[" + fill(b"[1]") + b"]")),
    "texts": (COMPLETION, lambda: completion("prompt", b"[" + fill(b'"a"') + b"]")),
    "token ids": (COMPLETION, lambda: completion("prompt", b"[" + fill(b"1", 520_000) + b"]")),
    "long numbers": (COMPLETION, lambda: completion("prompt", b"[" + fill(b"9" * 4000) + b"]")),
    "deep": (COMPLETION, lambda: b"[" * SIZE),
    "stop strings": (COMPLETION, lambda: completion("stop", b"[" + fill(b'"a"') + b"]")),
    "biases": (COMPLETION, lambda: completion("logit_bias", numbered(b"1", 250_000))),
    "unknown names": (COMPLETION, lambda: numbered(b"1", 250_000)),
    "messages": (CHAT, lambda: chat(fill(message(b'""'), 160_000))),
    "parts": (CHAT, lambda: chat(message(b"[" + fill(PART, 800_000) + b"]"))),
    "metadata": (
        CHAT,
        lambda: chat(message(b'""'))[:-1] + b', "metadata": ' + numbered(b"1", 250_000) + b"}",
    ),
    "words": ("/tokenize", lambda: b'{"prompt": "' + b"the fox " * 100_000 + b'"}'),
    "a long word": ("/tokenize", lambda: b'{"prompt": "' + b"a" * 1_500_000 + b'"}'),
    "ids to read": ("/detokenize", lambda: b'{"tokens": [' + fill(b"9", 520_000) + b"]}"),
    "a form": ("/adapters/upload", lambda: b"a=1&" * (SIZE // 4)),
}


@contextmanager
def watch_health(client: httpx.Client) -> Iterator[list[float]]:
    """Seconds that each question for the health of the server took, from before the block to after it."""
    seconds: list[float] = []
    is_over = threading.Event()

    def ask() -> None:
        while True:
            was_over = is_over.is_set()
            start = time.monotonic()
            assert client.get("/health").status_code == 200
            seconds.append(time.monotonic() - start)
            if was_over:
                return
            time.sleep(0.01)

    with ThreadPoolExecutor(1) as executor:
        asking = executor.submit(ask)
        try:
            yield seconds
        finally:
            is_over.set()
            asking.result()


def post(client: httpx.Client, path: str, body: bytes) -> httpx.Response:
    kind = "application/x-www-form-urlencoded" if path.endswith("upload") else "application/json"
    return client.post(path, content=body, headers={"content-type": kind})


@pytest.fixture(scope="module")
def without_old_garbage() -> Iterator[None]:
    """As `eda serve` does once the models are loaded: else new objects make the collector look at all that there is."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("without_old_garbage")
@pytest.mark.parametrize("name", BODIES)
def test_health_answers_whatever_is_sent(client: httpx.Client, name: str) -> None:
    path, make = BODIES[name]
    body = make()
    for _ in range(2):  # once more if something else may have held the machine
        with ThreadPoolExecutor(3) as executor, watch_health(client) as seconds:
            answers = list(executor.map(lambda _: post(client, path, body), range(3)))
        if max(seconds) < SECONDS_WITHOUT_ANSWER:
            break
    assert max(seconds) < SECONDS_WITHOUT_ANSWER
    for answer in answers:
        assert answer.status_code in (200, 400, 404, 413), answer.text[:500]
        if answer.status_code >= 400:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    if name in ("empty lists", "lists of one", "texts"):
        assert "more than 262144 values" in answers[0].json()["error"]["message"]


async def test_large_bodies_take_turns_that_end() -> None:
    """One that waits for something, such as a slow disk, does not keep the others waiting."""
    turns, is_over = Turns(), asyncio.Event()
    order: list[str] = []

    def app(name: str) -> ASGIApp:
        async def run(scope: Scope, receive: Receive, send: Send) -> None:
            await receive()
            time.sleep(0.05)  # parses
            order.append(name)
            if name == "waits":
                await is_over.wait()
            await send({"type": "http.response.start"})

        return run

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        order.append("sends")

    start = time.monotonic()
    waiting = asyncio.create_task(turns.run(app("waits"), {}, receive, send))
    others = [asyncio.create_task(turns.run(app(name), {}, receive, send)) for name in ("second", "third")]
    beats: list[float] = []
    while not all(task.done() for task in others):
        beats.append(time.monotonic())
        await asyncio.sleep(0.005)
    assert order == ["waits", "second", "sends", "third", "sends"]
    assert time.monotonic() - start < 4 * LONGEST_TURN
    # Between two turns the loop was free: parsing never came twice in a row.
    assert max(after - before for before, after in pairwise(beats)) < 0.1
    is_over.set()
    await waiting


WRONG: list[tuple[type[RequestModel], dict[str, Any]]] = [
    (CompletionRequest, {"prompt": [{}] * 1000}),
    (CompletionRequest, {"prompt": [[{}]] * 1000}),
    (CompletionRequest, {"stop": [{}] * 1000}),
    (CompletionRequest, {"stop_token_ids": [{}] * 60}),
    (CompletionRequest, {"logit_bias": {f"x{place}": 1 for place in range(2000)}}),
    (CompletionRequest, {f"x{place}": 1 for place in range(1000)}),
    (ChatCompletionRequest, {"messages": [{}] * 1000}),
    (ChatCompletionRequest, {"messages": [{"role": "user", "content": [{}] * 1000}]}),
    (ChatCompletionRequest, {"metadata": {str(place): 1 for place in range(1000)}}),
    (DetokenizeRequest, {"tokens": [{}] * 1000}),
    (CreateAdapterRequest, {"data": {"prompts": [{}] * 1000}}),
    (CreateAdapterRequest, {"data": {"prompts": [[{}] * 1000]}}),
]


@pytest.mark.parametrize(("model", "body"), WRONG)
def test_a_thousand_wrong_values_are_not_a_thousand_errors(
    model: type[RequestModel], body: dict[str, Any]
) -> None:
    with pytest.raises(ValidationError) as raised:
        model.model_validate(body)
    assert raised.value.error_count() < 20


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('a,[{"\\}]: ', max_size=6),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.text('a,[{"\\', max_size=4), inner, max_size=4)
    ),
    max_leaves=30,
)


def counts(value: Any) -> tuple[int, int]:
    """Brackets that open and commas; brackets that open alone."""
    if not isinstance(value, list | dict):
        return 0, 0
    inner = [counts(item) for item in (value.values() if isinstance(value, dict) else value)]
    return 1 + max(0, len(inner) - 1) + sum(i[0] for i in inner), 1 + sum(i[1] for i in inner)


@hypothesis_settings(deadline=None, max_examples=300)
@given(value=JSON, is_ascii=st.booleans())
def test_values_are_counted_as_a_parser_finds_them(value: Any, is_ascii: bool) -> None:
    body = json.dumps(value, ensure_ascii=is_ascii).encode()
    num_marks, num_containers = counts(value)
    for limit in {0, num_marks - 1, num_marks, VALUES_PER_CONTAINER * num_containers} - {-1}:
        is_too_much = num_marks > limit or num_containers > limit // VALUES_PER_CONTAINER
        assert has_more_values(body, limit) == is_too_much


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-16", "utf-32"])
def test_other_encodings_cannot_hide_values(encoding: str) -> None:
    """In UTF-16, half of one character looks like a quotation mark."""
    body = ('["\u2200",' + "[]," * 1000 + "[]]").encode(encoding)
    with pytest.raises(ApiError, match="UTF-8"):
        check_json(body, 100)


@pytest.mark.parametrize("body", [b'"' * 10_000, b'"' + b'\\"' * 10_000, b'"\\' * 10_000, b'{"' * 10_000])
def test_strings_that_do_not_end_are_no_trouble(body: bytes) -> None:
    assert has_more_values(body, 100) == (b"{" in body)
