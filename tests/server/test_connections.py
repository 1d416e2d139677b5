"""Connections that do not get on are ended, and there is a limit on their number."""

import asyncio
import contextlib
import json
import os
import resource
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from eda.server.app import create_app
from eda.server.connections import FEWEST_CONNECTIONS, OTHER_DESCRIPTORS, ServerConfig, room_for_connections
from eda.server.graceful_server import GracefulServer
from eda.server.settings import Settings
from tests.server.serving import Parts, make_parts, serve
from tests.support.family import Family

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
LIMITS = Settings(head_seconds=0.4, body_seconds=0.6, unread_seconds=0.6, max_connections=12)


@pytest.fixture(scope="module")
def bounded_parts(family: Family) -> Parts:
    return make_parts(family, settings=LIMITS)


@pytest.fixture(scope="module")
def bounded(bounded_parts: Parts) -> Iterator[str]:
    with serve(bounded_parts.services) as url:
        yield url


@contextlib.contextmanager
def connection(url: str, *, receive_buffer: int | None = None) -> Iterator[socket.socket]:
    with socket.socket() as sock:
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.settimeout(5)
        sock.connect(("127.0.0.1", httpx.URL(url).port))
        yield sock


def answer_of(sock: socket.socket, drip: bytes = b"") -> bytes:
    """What comes until the server closes; ``drip`` is sent again and again in the meantime."""
    received = b""
    sock.settimeout(0.05)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        with contextlib.suppress(TimeoutError):
            try:
                if drip:
                    sock.sendall(drip)
                piece = sock.recv(65536)
            except ConnectionError:
                return received
            if not piece:
                return received
            received += piece
    raise AssertionError("the server keeps the connection")


@pytest.mark.parametrize(
    ("begin", "drip"), [(b"", b""), (b"POST /v1", b""), (HEAD, b"X-More: 1\r\n"), (b"", b"x")]
)
def test_a_head_that_does_not_arrive(bounded: str, begin: bytes, drip: bytes) -> None:
    with connection(bounded) as sock:
        sock.sendall(begin)
        answer_of(sock, drip)


def test_the_next_head_has_a_limit_too(bounded: str) -> None:
    with connection(bounded) as sock:
        sock.sendall(b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert answer_of(sock, b"G").startswith(b"HTTP/1.1 200")


def test_a_connection_that_is_used_stays(bounded: str) -> None:
    with httpx.Client(base_url=bounded) as client:
        for _ in range(12):
            response = client.get("/version")
            time.sleep(0.1)  # together three times head_seconds
        stream = response.extensions["network_stream"]
        assert stream.get_extra_info("socket") is not None
        assert client.get("/version").extensions["network_stream"] is stream


@pytest.mark.parametrize("drip", [b"", b" "])
def test_a_body_that_does_not_arrive(bounded: str, drip: bytes) -> None:
    with connection(bounded) as sock:
        sock.sendall(HEAD + b'Content-Length: 1000\r\n\r\n{"model": ')
        head, _, body = answer_of(sock, drip).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408")
    assert json.loads(body)["error"]["code"] == "body_timeout"


def test_a_body_after_the_answer_does_not_hold_a_connection(bounded: str) -> None:
    with connection(bounded) as sock:
        sock.sendall(HEAD + b"Content-Length: 999999999\r\n\r\n")
        assert answer_of(sock, b"x").startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(("size", "status"), [(1, 400), (100, 200)])
def test_a_body_in_tiny_pieces(bounded: str, size: int, status: int) -> None:
    content = b'{"model": "base", "prompt": "x", "max_tokens": 2' + b" " * (size * 20_000) + b"}"
    pieces = [content[start : start + size] for start in range(0, len(content), size)]
    with connection(bounded) as sock:
        sock.sendall(HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(ConnectionError):  # it is refused before its end
            sock.sendall(b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n")
        assert answer_of(sock).startswith(b"HTTP/1.1 %d" % status)


def test_too_many_connections(bounded: str) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(LIMITS.max_connections):
            stack.enter_context(connection(bounded)).sendall(b"G")
        with connection(bounded) as sock:
            head, _, body = answer_of(sock).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503")
        assert b"Retry-After" in head
        assert json.loads(body)["error"]["code"] == "unavailable"
        # The others are ended for their silence, and there is room again.
        time.sleep(2 * LIMITS.head_seconds)
        assert httpx.get(f"{bounded}/health").status_code == 200


def test_a_stream_that_nobody_reads_ends(bounded: str, bounded_parts: Parts) -> None:
    body = {"model": "base", "prompt": "x", "n": 24, "max_tokens": 500, "logprobs": 20, "ignore_eos": True}
    content = json.dumps({**body, "stream": True}).encode()
    with connection(bounded, receive_buffer=4096) as sock:
        sock.sendall(HEAD + f"Content-Length: {len(content)}\r\n\r\n".encode() + content)
        # The answer (10 MB) is larger than what sockets hold (4 MB on Linux), so its sender must wait for the reader.
        time.sleep(1)
        bounded_parts.wait_until_idle()
        time.sleep(4 * LIMITS.unread_seconds)
        received = b""
        with contextlib.suppress(ConnectionError):
            while piece := sock.recv(1 << 16):
                received += piece
    assert received.startswith(b"HTTP/1.1 200")
    assert b"data: [DONE]" not in received
    bounded_parts.wait_until_idle()


def test_a_slow_body_does_not_hold_the_end(family: Family) -> None:
    parts = make_parts(family)

    class ServerInThread(GracefulServer):
        capture_signals = contextlib.nullcontext  # type: ignore[assignment]  # signals are for the main thread

    settings = Settings(port=0)
    server = ServerInThread(
        ServerConfig(create_app(parts.services), settings, log_level="error", timeout_graceful_shutdown=30),
        parts.services,
    )
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    with connection(url) as silent, connection(url) as slow:
        for sock in (silent, slow):
            sock.sendall(HEAD + b"Content-Length: 1000\r\n\r\n{")
        time.sleep(0.3)
        start = time.monotonic()
        server.should_exit = True
        assert answer_of(slow, b" ").startswith(b"HTTP/1.1 503")
        assert answer_of(silent).startswith(b"HTTP/1.1 503")
        thread.join(10)
        assert time.monotonic() - start < 5


OUT_OF_DESCRIPTORS = """
    import asyncio, resource, sys
    from eda.server.graceful_server import GracefulServer
    from eda.server.connections import ServerConfig
    from eda.server.logs import configure_logs
    from eda.server.services import Services
    from eda.server.settings import Settings

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    settings = Settings(port=0, head_seconds=600)
    configure_logs(settings)
    server = GracefulServer(ServerConfig(app, settings, lifespan="off", log_config=None), Services(settings))

    async def main():
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        print(server.servers[0].sockets[0].getsockname()[1], flush=True)
        await serving

    asyncio.run(main())
"""


def test_without_file_descriptors_the_server_waits_quietly(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(OUT_OF_DESCRIPTORS)],
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
    try:
        assert process.stdout is not None
        url = f"http://127.0.0.1:{int(process.stdout.readline())}"
        with contextlib.ExitStack() as stack:
            for _ in range(60):
                stack.enter_context(connection(url))
            time.sleep(0.3)
            before = psutil.Process(process.pid).cpu_times()
            time.sleep(2.5)
            after = psutil.Process(process.pid).cpu_times()
        assert after.user + after.system - before.user - before.system < 1.0
        assert httpx.get(url, timeout=10).status_code == 200
    finally:
        process.terminate()
        process.wait(10)
        process.stdout.close()
    written = log.read_text()
    assert written.count("no connection can be accepted") == 1
    assert len(written) < 5000


@pytest.mark.parametrize(
    ("soft", "hard", "room", "asked"),
    [
        (1024, 4096, 1000, 1000 + OTHER_DESCRIPTORS),
        (4096, 4096, 1000, None),
        (256, 512, 512 - OTHER_DESCRIPTORS, 512),
        (32, 32, FEWEST_CONNECTIONS, 32),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 1000, None),
        (1024, resource.RLIM_INFINITY, 1000, 1000 + OTHER_DESCRIPTORS),
    ],
)
def test_connections_follow_the_file_descriptors(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, room: int, asked: int | None
) -> None:
    limits: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limit: limits.append(limit))
    assert room_for_connections(1000) == room
    assert limits == ([] if asked is None else [(asked, hard)])
