"""What the administrative routes must not let through, and the worker beside the server."""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from eda.adapters.database import Database, sqlite_url
from eda.adapters.worker.process import wait_until_dead
from eda.adapters.worker.settings import DATABASE_FILE, WorkerSettings
from eda.server.assembly import load_runtime
from eda.server.services import Services
from eda.server.settings import Settings
from eda.server.worker_supervisor import WorkerSupervisor
from tests.adapters.helpers import FAKE_WORKER, wait_for
from tests.adapters.helpers import Service as Setup
from tests.server.serving import serve
from tests.support.family import save_lora

ADMIN = {"Authorization": "Bearer admin-key"}
USER = {"Authorization": "Bearer user-key"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("secured")
    save_lora(directory / "loras" / "one", 1)
    (directory / "outside").mkdir()
    (directory / "outside" / "secret.jsonl").write_text('{"prompt": "secret"}\n')
    (directory / "loras" / "way-out").symlink_to(directory / "outside")
    return directory


@pytest.fixture(scope="module")
def client(family_directory: Path, directory: Path) -> Iterator[httpx.Client]:
    settings = Settings(
        target=family_directory / "base",
        draft=family_directory / "draft",
        data_dir=directory / "data",
        adapter_roots=(directory / "loras",),
        api_keys=("user-key",),
        admin_key="admin-key",
        weights="float32",
        cache_mib=8,
        reserve_disk_mib=0,
        worker=False,
    )
    services = Services(settings, load=load_runtime)
    with serve(services) as url, httpx.Client(base_url=url, timeout=30, headers=ADMIN) as client:
        yield client


def body(directory: Path, **changes: Any) -> dict[str, Any]:
    target = {"path": str(directory / "loras" / "one")}
    return {"name": "x", "target": target, "data": {"prompts": ["a b c", "d e f"]}} | changes


def require_refusal(response: httpx.Response, *statuses: int) -> str:
    """The message of a refusal in OpenAI's shape."""
    assert response.status_code in statuses, (response.status_code, response.text)
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    message: str = error["message"]
    return message


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/adapters"),
        ("POST", "/adapters/upload"),
        ("GET", "/adapters"),
        ("GET", "/adapters/base"),
        ("PATCH", "/adapters/base"),
        ("DELETE", "/adapters/base"),
        ("DELETE", "/adapters/base/traffic"),
        ("POST", "/adapters/base/activate"),
        ("POST", "/adapters/base/jobs"),
        ("GET", "/jobs"),
        ("GET", "/jobs/x"),
        ("GET", "/jobs/x/events"),
        ("POST", "/jobs/x/cancel"),
        ("POST", "/jobs/x/retry"),
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/v1/unload_lora_adapter"),
    ],
)
def test_administration_needs_its_own_key(client: httpx.Client, method: str, path: str) -> None:
    require_refusal(client.request(method, path, headers=USER), 403)
    require_refusal(client.request(method, path, headers={"Authorization": "Bearer wrong"}), 401)
    require_refusal(client.request(method, path, headers={"Authorization": ""}), 401)


@pytest.mark.parametrize(
    "path",
    ["/etc", "../outside", "one/../../outside", "way-out", "absent", "/proc/self/root/etc", "one\x00", ""],
)
def test_paths_outside_the_roots(client: httpx.Client, directory: Path, path: str) -> None:
    message = require_refusal(client.post("/adapters", json=body(directory, target={"path": path})), 400)
    assert "target.path" in message
    message = require_refusal(
        client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": path}), 400
    )
    message = require_refusal(client.post("/adapters", json=body(directory, data={"path": path})), 400)
    assert "data.path" in message
    assert "secret" not in message
    assert client.get("/adapters/x").status_code == 404


@pytest.mark.parametrize(
    "name", ["../x", "a/b", ".x", "x" * 65, "", "x\x00", "ä", "x y", "a\r\nb: c", "con..", None, 7]
)
def test_odd_names(client: httpx.Client, directory: Path, name: object) -> None:
    require_refusal(client.post("/adapters", json=body(directory, name=name)), 400)
    if isinstance(name, str):
        alias = {"lora_name": name, "lora_path": str(directory / "loras" / "one")}
        require_refusal(client.post("/v1/load_lora_adapter", json=alias), 400)


@pytest.mark.parametrize("name", ["..%2Fx", "%2e%2e", "x%00", "ä", "a" * 300])
def test_odd_names_in_the_url(client: httpx.Client, name: str) -> None:
    for response in (
        client.get(f"/adapters/{name}"),
        client.delete(f"/adapters/{name}"),
        client.get(f"/jobs/{name}"),
        client.get(f"/jobs/{name}/events"),
        client.delete(f"/adapters/{name}/traffic"),
    ):
        assert 400 <= response.status_code < 500
        assert "error" in response.json()


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        '{"name": ' * 50_000,
        '{"name": "x", "data": {"prompts": [' + "[" * 5_000 + "]" * 5_000 + "]}}",
        '{"name": "x", "target": {"path": "' + "p" * 100_000 + '"}, "data": {"self": 3}}',
        '{"name": "x", "target": {"path": "one"}, "data": {"self": 1e400}}',
        '{"name": "x", "target": {"path": "one"}, "data": {"self": 3}, "margin": NaN}',
        '{"name": "x", "target": {"path": "one"}, "data": {"self": 3}, "training": {"keep": -1}}',
        '{"name": "x", "target": {"path": "one"}, "data": {"self": 3}, "training": {"seed": 99999999999999999999}}',
        '{"name": "x", "target": {"path": "one"}, "data": {"self": 3, "path": "p"}}',
        '{"name": "x", "target": {"path": "one", "hub_id": "a/b"}, "data": {"self": 3}}',
        '{"name": "x", "target": {"path": "one"}, "data": {"self": 3}, "trust_remote_code": true}',
        '{"name": "x", "target": {"path": "one"}, "data": {"prompts": ["a", "\\ud800"]}}',
        '{"name": "x", "target": {"path": "one"}, "data": {}}',
        "\x00\xff",
        "null",
    ],
)
def test_huge_deep_and_odd_json(client: httpx.Client, content: str) -> None:
    headers = {"Content-Type": "application/json"}
    require_refusal(client.post("/adapters", content=content.encode("latin-1"), headers=headers), 400, 413)
    form = {"data": {"request": content}, "files": {"file": b'{"prompt": "a"}'}}
    if len(content) < 1_000_000 and content.startswith(("[", "{")):
        require_refusal(client.post("/adapters/upload", **form), 400, 413)


def test_bodies_over_the_limit(client: httpx.Client, directory: Path) -> None:
    large = body(directory, data={"prompts": ["x" * 1000] * 5000})
    require_refusal(client.post("/adapters", json=large), 413)
    form = {"data": {"request": "{}"}, "files": {"file": b"x" * 5_000_000}}
    require_refusal(client.post("/adapters/upload", **form), 413)


def test_weights_with_lying_headers(client: httpx.Client, directory: Path) -> None:
    path = directory / "loras" / "lying"
    save_lora(path, 2)
    weights = path / "adapter_model.safetensors"
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 2**60]}}).encode()
    weights.write_bytes(len(header).to_bytes(8, "little") + header)
    refused = client.post("/adapters", json=body(directory, target={"path": str(path)}))
    assert "offsets" in require_refusal(refused, 400)
    weights.write_bytes((2**63).to_bytes(8, "little") + b"{}")
    refused = client.post("/adapters", json=body(directory, target={"path": str(path)}))
    assert "states a header" in require_refusal(refused, 400)


def test_odd_event_ids(client: httpx.Client, directory: Path) -> None:
    job = client.post("/adapters", json=body(directory, name="seen")).json()["job"]["id"]
    client.post(f"/jobs/{job}/cancel")
    for odd in ("-1", "abc", "9" * 30, "1; DROP TABLE events"):
        assert client.get(f"/jobs/{job}/events", headers={"Last-Event-ID": odd}).status_code in (200, 204)
    require_refusal(client.get("/jobs", params={"limit": 0}), 400)
    require_refusal(client.get("/jobs", params={"after": "x' OR 1=1"}), 404)
    require_refusal(client.get("/jobs", params={"status": "odd"}), 400)


def supervisor(data_dir: Path) -> WorkerSupervisor:
    settings = WorkerSettings(str(data_dir), "", "", poll_seconds=0.05, supervised=True)
    os.environ["PYTHONPATH"] = str(FAKE_WORKER.parents[2])
    try:
        return WorkerSupervisor(settings, command=(sys.executable, str(FAKE_WORKER)))
    finally:
        del os.environ["PYTHONPATH"]


def test_the_supervisor_restarts_a_dead_worker_and_stops_with_the_server(tmp_path: Path) -> None:
    watched = supervisor(tmp_path)
    watched.start()
    try:
        first = wait_for(lambda: watched.pid)
        os.kill(first, signal.SIGKILL)
        second = wait_for(lambda: watched.pid if watched.pid not in (None, first) else None)
        assert watched.num_restarts == 1
    finally:
        watched.stop()
    assert watched.pid is None
    assert wait_until_dead(second, 5.0)


def test_a_worker_ends_when_its_server_is_killed(tmp_path: Path) -> None:
    watched = supervisor(tmp_path)
    process = watched._launch()  # what is closed here, the system closes when a server dies
    assert process is not None
    assert process.stdin is not None
    time.sleep(0.2)
    process.stdin.close()
    assert process.wait(20) == 0


def test_keys_are_not_handed_to_the_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDA_ADMIN_KEY", "secret")
    assert "EDA_ADMIN_KEY" not in supervisor(tmp_path)._environment


def test_each_job_gets_a_fresh_worker(tmp_path: Path) -> None:
    watched = supervisor(tmp_path)
    database = Database(sqlite_url(tmp_path / DATABASE_FILE))
    setup = Setup(tmp_path, database)
    watched.start()
    try:
        first = wait_for(lambda: watched.pid)
        time.sleep(1.0)
        jobs = [setup.submit(name).id for name in ("one", "two")]
        wait_for(lambda: all(setup.queue.get(job).state == "succeeded" for job in jobs), timeout=30)
        assert watched.num_restarts == 0
        wait_for(lambda: watched.pid not in (None, first))
    finally:
        watched.stop()
        database.close()
