"""A client gets its share of the queue and of the cache, however much others ask for."""

import asyncio
from collections.abc import Iterator

import httpx
import pytest

from eda.server.engine.engine import QueueFullError
from eda.server.settings import ConfigurationError, Settings, load_settings
from tests.server.serving import Parts, make_parts, serve
from tests.server.test_engine import Bench
from tests.support.fakes import FakeDecoder, make_sequence
from tests.support.family import Family

GREEDY, POLITE, ADMIN = ({"Authorization": f"Bearer {key}"} for key in ("greedy", "polite", "admin"))
COMPLETION = {"model": "base", "prompt": "x", "max_tokens": 2}


def test_a_newcomer_waits_for_one_of_each_client() -> None:
    bench = Bench(max_running=1)
    flood = [make_sequence(client=client) for client in ("a", "b") for _ in range(20)]
    bench.submit(*flood[:20])
    bench.submit(*flood[20:])
    bench.step(2)
    polite = make_sequence(client="c")
    bench.submit(polite)
    bench.run()
    assert bench.decoder.admitted.index(polite.state) <= 3
    shares = [state for state in bench.decoder.admitted if state is not polite.state][:20]
    assert sum(sequence.state in shares for sequence in flood[:20]) in (9, 10, 11)


def test_shares_are_of_cache_slots_and_not_of_requests() -> None:
    bench = Bench(FakeDecoder(num_slots=200), max_running=1)
    long = [make_sequence([1] * 10, 90, client="long") for _ in range(4)]
    short = [make_sequence([1] * 10, 10, client="short") for _ in range(20)]
    bench.submit(*long)
    bench.submit(*short)
    bench.run()
    first = bench.decoder.admitted[:12]
    assert sum(sequence.state in first for sequence in long) in (2, 3)


def test_one_client_alone_is_served_in_order_and_may_fill_the_queue() -> None:
    bench = Bench(max_waiting=30, max_running=1)
    sequences = [make_sequence(max_tokens=1 + 7 * (index % 3), client="a") for index in range(30)]
    bench.submit(*sequences)
    with pytest.raises(QueueFullError):
        bench.submit(make_sequence(client="a"))
    bench.run()
    assert bench.decoder.admitted == [sequence.state for sequence in sequences]


def test_a_full_queue_still_takes_every_clients_share() -> None:
    bench = Bench(max_waiting=12, max_running=1)
    bench.submit(*(make_sequence(client="a") for _ in range(12)))
    bench.submit(*(make_sequence(client="b") for _ in range(6)))
    with pytest.raises(QueueFullError, match="your share now 6"):
        bench.submit(make_sequence(client="b"))
    bench.submit(*(make_sequence(client="c") for _ in range(4)))
    with pytest.raises(QueueFullError, match="22 sequences are waiting, 12 of them yours"):
        bench.submit(make_sequence(client="a"))
    bench.run()
    assert bench.engine.num_waiting == 0
    bench.submit(*(make_sequence(client="a") for _ in range(12)))


@pytest.fixture(scope="module")
def shared_parts(family: Family) -> Parts:
    settings = Settings(api_keys="greedy,polite", admin_key="admin", max_running=4, max_waiting=40)  # type: ignore[arg-type]
    return make_parts(family, settings=settings)


@pytest.fixture(scope="module")
def shared(shared_parts: Parts) -> Iterator[str]:
    with serve(shared_parts.services) as url:
        yield url
        shared_parts.wait_until_idle()


async def test_a_polite_client_is_served_beside_110_greedy_connections(shared: str) -> None:
    # Idle connections are given up before the server would: it might do so while a request is on its way.
    limits = httpx.Limits(max_connections=110, keepalive_expiry=1.0)
    is_over = asyncio.Event()
    refused = 0

    async def ask_on(client: httpx.AsyncClient) -> None:
        nonlocal refused
        while not is_over.is_set():
            body = {**COMPLETION, "max_tokens": 8, "ignore_eos": True}
            response = await client.post("/v1/completions", json=body, headers=GREEDY)
            assert response.status_code in (200, 429)
            if response.status_code == 429:
                refused += 1
                await asyncio.sleep(0.5)

    async with (
        httpx.AsyncClient(base_url=shared, timeout=60, limits=limits) as greedy,
        httpx.AsyncClient(base_url=shared, timeout=60) as polite,
    ):
        tasks = [asyncio.create_task(ask_on(greedy)) for _ in range(110)]
        await asyncio.sleep(0.5)
        for _ in range(6):
            asking = [polite.post("/v1/completions", json=COMPLETION, headers=POLITE) for _ in range(4)]
            assert [answer.status_code for answer in await asyncio.gather(*asking)] == [200] * 4
        is_over.set()
        await asyncio.gather(*tasks)
    assert refused


def test_users_cannot_go_before_the_others(shared: str) -> None:
    for path, body in (
        ("/v1/completions", COMPLETION),
        (
            "/v1/chat/completions",
            {"model": "base", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2},
        ),
    ):
        for headers, priority, status in ((POLITE, -1, 403), (POLITE, 3, 200), (ADMIN, -(2**31), 200)):
            answer = httpx.post(f"{shared}{path}", json={**body, "priority": priority}, headers=headers)
            assert answer.status_code == status
            if status == 403:
                assert answer.json()["error"]["param"] == "priority"


def test_a_rate_limit_counts_each_key(family: Family) -> None:
    settings = Settings(api_keys="greedy,polite", admin_key="admin", rate_limit="3/minute")  # type: ignore[arg-type]
    with serve(make_parts(family, settings=settings).services) as url:

        def ask(headers: dict[str, str]) -> httpx.Response:
            return httpx.post(f"{url}/tokenize", json={"prompt": "x"}, headers=headers)

        assert [ask(GREEDY).status_code for _ in range(4)] == [200, 200, 200, 429]
        refusal = ask(GREEDY)
        assert refusal.json()["error"]["code"] == "rate_limit_exceeded"
        assert 1 <= int(refusal.headers["retry-after"]) <= 120
        assert ask(POLITE).status_code == 200
        assert [ask(ADMIN).status_code for _ in range(5)] == [200] * 5
        assert httpx.get(f"{url}/health").status_code == 200


def test_without_keys_an_address_is_a_client(family: Family) -> None:
    settings = Settings(rate_limit="2/minute", host="127.0.0.1")
    with serve(make_parts(family, settings=settings).services) as url:

        def ask(address: str) -> int:
            with httpx.Client(transport=httpx.HTTPTransport(local_address=address)) as client:
                return client.post(f"{url}/tokenize", json={"prompt": "x"}).status_code

        assert [ask("127.0.0.1") for _ in range(3)] == [200, 200, 429]
        assert ask("127.0.0.2") == 200


@pytest.mark.parametrize("rate", ["fast", "0", "10", "10/fortnight", ""])
def test_a_rate_that_is_none_is_refused(rate: str) -> None:
    with pytest.raises(ConfigurationError, match=r"rate_limit.*60/minute"):
        load_settings(None, {"rate_limit": rate})
