"""While the database of adapters and jobs is away, models are served and everything else says so."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.exc import OperationalError

from eda.adapters.serving.watcher import RegistryWatcher
from eda.server.assembly import load_runtime
from eda.server.services import Services
from eda.server.settings import Settings
from tests.adapters.helpers import wait_for
from tests.server.administration import Server
from tests.server.serving import serve


@pytest.fixture(scope="module")
def server(family_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("served")
    settings = Settings(
        target=family_directory / "base",
        draft=family_directory / "draft",
        data_dir=directory / "data",
        adapter_roots=(directory / "loras",),
        weights="float32",
        cache_mib=16,
        reserve_disk_mib=0,
        worker=False,
    )
    services = Services(settings, load=load_runtime)
    with serve(services) as url:
        server = Server(url, services, directory)
        yield server
        server.client.close()


@contextmanager
def database_away(server: Server) -> Iterator[None]:
    def refuse(*_: Any) -> None:
        raise OperationalError("SELECT 1", None, Exception("connection refused by secret-host"))

    engine = server.adapters.database.engine
    event.listen(engine, "begin", refuse, insert=True)
    try:
        yield
    finally:
        event.remove(engine, "begin", refuse)


def test_what_needs_no_database_goes_on(server: Server) -> None:
    with database_away(server):
        assert server.complete("base")["choices"][0]["text"]
        assert server.client.get("/v1/models").status_code == 200
        assert server.client.get("/health").status_code == 200
        metrics = server.client.get("/metrics")
    assert metrics.status_code == 200
    assert "eda:emitted_tokens_total" in metrics.text
    assert 'eda:adaptation_jobs{state="queued"}' not in metrics.text
    assert 'eda:adaptation_jobs{state="queued"}' in server.client.get("/metrics").text


def test_what_needs_it_is_answered_with_503(server: Server) -> None:
    job_id = server.create("tune").json()["job"]["id"]
    with database_away(server):
        for answer in (
            server.client.get("/adapters"),
            server.client.get("/adapters/tune"),
            server.create("other"),
            server.client.patch("/adapters/tune", json={"description": "x"}),
            server.client.get(f"/jobs/{job_id}"),
            server.client.get(f"/jobs/{job_id}/events"),
            server.client.post(f"/jobs/{job_id}/cancel"),
        ):
            assert answer.status_code == 503, answer.text
            assert answer.headers["Retry-After"]
            assert "secret-host" not in answer.text
    assert server.client.get(f"/jobs/{job_id}").json()["status"] == "queued"
    assert [card["id"] for card in server.client.get("/v1/models").json()["data"]] == ["base", "tune"]


def test_the_watch_says_it_once_and_goes_on(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    polls: list[None] = []
    registry = server.adapters.registry
    sync = registry.sync

    class Counting:
        guard = registry.guard
        active_versions = registry.active_versions

        def sync(self) -> None:
            polls.append(None)
            sync()

    watcher = RegistryWatcher(Counting(), poll_seconds=0.01)  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING, "eda.adapters.serving.watcher"):
        with database_away(server):
            watcher.start()
            wait_for(lambda: len(polls) > 3)
        seen = len(polls)
        wait_for(lambda: len(polls) > seen + 3)
        watcher.stop()
    mine = [record for record in caplog.records if record.name == "eda.adapters.serving.watcher"]
    # The server's own watch runs beside this one and has its say too.
    assert 1 <= len(mine) <= 2
    assert all("does not answer" in record.message for record in mine)
