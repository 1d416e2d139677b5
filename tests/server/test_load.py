"""Many requests at once: every answer is the one that the request would have got alone."""

import asyncio
import gc
import json
import random
from dataclasses import dataclass
from typing import Any

import httpx
import psutil
import pytest

from tests.server.serving import Parts
from tests.support.backends import proposer_of
from tests.support.family import Family, random_private
from tests.support.oracle import Oracle

MODELS = ("base", "math", "code", "full")
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dog",
    "1",
    "2",
    "3",
    "ä",
    "€",
    "and",
    "so",
    "on",
]


@dataclass
class Mixed:
    """A request and the text that it must get; ``None`` when that is random."""

    path: str
    body: dict[str, Any]
    expected: str | None
    num_tokens: int | None


def mixed_requests(family: Family, oracle: Oracle, count: int, seed: int) -> list[Mixed]:
    """Models, draft modes, lengths, stops, streaming, sampling and chats, all mixed."""
    rng = random.Random(seed)
    requests: list[Mixed] = []
    for index in range(count):
        model = rng.choice(MODELS)
        text = " ".join(rng.choice(WORDS) for _ in range(rng.randrange(1, 40)))
        max_tokens = rng.randrange(1, 32)
        body: dict[str, Any] = {
            "model": model,
            "draft": rng.choice(["private", "private", "shared", "none"]),
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": rng.random() < 0.5,
        }
        if index % 10 == 9:
            body |= {"temperature": 1.0, "top_p": 0.9, "logprobs": 2, "frequency_penalty": 0.5}
            requests.append(Mixed("/v1/completions", body | {"prompt": text}, None, max_tokens))
            continue
        if rng.random() < 0.3:
            path, body["messages"] = "/v1/chat/completions", [{"role": "user", "content": text}]
            ids = family.tokenizer.encode(
                family.tokenizer.render_chat(body["messages"]), add_special_tokens=False
            )
        else:
            path, body["prompt"] = "/v1/completions", text
            ids = family.tokenizer.encode(text)
        tokens = oracle.continuation(model, ids, max_tokens)
        expected: str = family.tokenizer.decode(tokens)
        num_tokens: int | None = max_tokens
        if rng.random() < 0.3 and len(expected) > 4:
            stop = expected[len(expected) // 2 :][:2]
            if "\ufffd" not in stop:
                body["stop"] = stop
                expected, num_tokens = expected[: expected.index(stop)], None
        requests.append(Mixed(path, body, expected, num_tokens))
    return requests


async def text_of(client: httpx.AsyncClient, request: Mixed) -> tuple[str, int]:
    """The text of an answer and its number of tokens."""
    is_chat = "messages" in request.body
    if not request.body["stream"]:
        response = await client.post(request.path, json=request.body)
        assert response.status_code == 200, response.text
        answer = response.json()
        [choice] = answer["choices"]
        return choice["message"]["content"] if is_chat else choice["text"], answer["usage"][
            "completion_tokens"
        ]
    text, usage = "", {}
    body = {**request.body, "stream_options": {"include_usage": True}}
    async with client.stream("POST", request.path, json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line and line != "data: [DONE]":
                chunk = json.loads(line.removeprefix("data: "))
                for choice in chunk["choices"]:
                    text += (choice["delta"].get("content") or "") if is_chat else choice["text"]
                usage = chunk.get("usage", usage)
    return text, usage["completion_tokens"]


def connect(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=None))


async def check_all(url: str, requests: list[Mixed]) -> None:
    async with connect(url) as client:
        answers = await asyncio.gather(*(text_of(client, request) for request in requests))
    for request, (text, count) in zip(requests, answers, strict=True):
        if request.expected is not None:
            assert text == request.expected, request.body
        if request.num_tokens is not None:
            assert count == request.num_tokens, request.body


@pytest.mark.slow
async def test_200_mixed_requests_at_once(url: str, parts: Parts, family: Family, oracle: Oracle) -> None:
    await check_all(url, mixed_requests(family, oracle, 200, seed=1))
    parts.wait_until_idle()


async def test_a_swap_under_load_changes_and_drops_nothing(
    url: str, parts: Parts, family: Family, oracle: Oracle
) -> None:
    requests = [r for r in mixed_requests(family, oracle, 120, seed=2) if r.expected is not None]
    for request in requests:
        request.body["draft"] = "private"
    checking = asyncio.create_task(check_all(url, requests))
    swaps = 0
    while not checking.done():
        for name in ("math", "code", "full"):
            parts.registry.swap(name, random_private(family.draft, seed=100 + swaps))
        swaps += 1
        await asyncio.sleep(0.02)
    await checking
    assert swaps > 5
    async with connect(url) as client:
        answer = await client.post("/v1/completions", json={"model": "math", "prompt": "x", "max_tokens": 2})
    assert answer.json()["metrics"]["adapter_version"] == parts.registry.versions["math"]
    parts.wait_until_idle()


def test_a_request_keeps_the_version_that_it_began_with(
    client: httpx.Client, parts: Parts, family: Family
) -> None:
    before = parts.registry.versions["code"]
    body = {"model": "code", "prompt": "x", "max_tokens": 300, "stream": True, "ignore_eos": True}
    with client.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        parts.registry.swap("code", random_private(family.draft, seed=7))
        chunks = [
            json.loads(line.removeprefix("data: ")) for line in lines if line and not line.endswith("[DONE]")
        ]
    assert chunks[-1]["metrics"]["adapter_version"] == before
    parts.wait_until_idle()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_everything(url: str, parts: Parts, stream: bool) -> None:
    body = {
        "model": "math",
        "prompt": ["x", "y"],
        "n": 2,
        "max_tokens": 450,
        "stream": stream,
        "ignore_eos": True,
    }
    finished = parts.services.metrics
    with httpx.Client(base_url=url, timeout=0.3) as client:
        if stream:
            with client.stream("POST", "/v1/completions", json=body) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/completions", json=body)
    parts.wait_until_idle()
    assert b'finished_reason="abort"' in finished.render()


async def test_clients_that_leave_do_not_disturb_those_that_stay(
    url: str, parts: Parts, family: Family, oracle: Oracle
) -> None:
    staying = mixed_requests(family, oracle, 40, seed=3)

    async def leave(delay: float) -> None:
        body = {"model": "base", "prompt": "zzz", "max_tokens": 400, "ignore_eos": True, "stream": True}
        async with connect(url) as client, client.stream("POST", "/v1/completions", json=body) as response:
            async for _ in response.aiter_lines():
                await asyncio.sleep(delay)
                return

    leaving = [asyncio.create_task(leave(index / 100)) for index in range(20)]
    await check_all(url, staying)
    await asyncio.gather(*leaving)
    parts.wait_until_idle()


async def test_a_draft_that_breaks_costs_speed_and_nothing_else(
    url: str, parts: Parts, family: Family, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    proposer = proposer_of(parts.decoder)
    propose, calls = proposer.propose_chains, 0

    def breaking(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls % 5 == 0:
            raise RuntimeError("bad weights")
        return propose(*arguments)

    monkeypatch.setattr(proposer, "propose_chains", breaking)
    requests = [r for r in mixed_requests(family, oracle, 24, seed=4) if r.expected is not None]
    await check_all(url, requests)
    assert calls >= 5
    parts.wait_until_idle()


@pytest.mark.slow
async def test_memory_is_flat_over_2000_requests(url: str, parts: Parts) -> None:
    body = {"model": "math", "prompt": "the fox", "max_tokens": 2, "temperature": 0, "draft": "shared"}
    plain, streamed = raw_request(body), raw_request({**body, "stream": True, "model": "code", "seed": 1})
    port = int(url.rpartition(":")[2])

    async def send(count: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for index in range(count):
            writer.write(streamed if index % 4 == 0 else plain)
            headers = await reader.readuntil(b"\r\n\r\n")
            assert headers.startswith(b"HTTP/1.1 200 OK"), headers
            if index % 4 == 0:
                events = await reader.readuntil(b"\r\n0\r\n\r\n")
                assert b"data: [DONE]" in events
            else:
                length = next(
                    line for line in headers.lower().split(b"\r\n") if line.startswith(b"content-length")
                )
                answer = await reader.readexactly(int(length.partition(b":")[2]))
                assert json.loads(answer)["usage"]["completion_tokens"] == 2
        writer.close()
        await writer.wait_closed()

    async def send_many(count: int) -> int:
        await asyncio.gather(*(send(count // 20) for _ in range(20)))
        gc.collect()
        return psutil.Process().memory_info().rss

    after_warm_up = await send_many(600)
    after_all = await send_many(1400)
    assert after_all - after_warm_up < 24 * 1024 * 1024
    parts.wait_until_idle()


def raw_request(body: dict[str, Any]) -> bytes:
    """The bytes of a request, without any client library."""
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content
