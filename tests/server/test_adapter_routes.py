"""The administrative routes over a whole server: tiny models, a real database and store, a worker with fake stages."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import save_file

from eda.adapters.serving.guard import GuardSettings
from eda.adapters.serving.watcher import RegistryWatcher
from eda.server.assembly import load_runtime
from eda.server.services import Services
from eda.server.settings import Settings
from tests.server.administration import PROMPTS, Server
from tests.server.serving import serve
from tests.support.family import save_lora


@pytest.fixture(scope="module")
def services(family_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Services:
    directory = tmp_path_factory.mktemp("served")
    settings = Settings(
        target=family_directory / "base",
        draft=family_directory / "draft",
        data_dir=directory / "data",
        adapter_roots=(directory / "loras",),
        weights="float32",
        cache_mib=16,
        baseline_share=0.0,
        max_queued_jobs=12,
        reserve_disk_mib=0,
        worker=False,
    )
    return Services(settings, load=load_runtime)


@pytest.fixture(scope="module")
def server(services: Services) -> Iterator[Server]:
    with serve(services) as url:
        server = Server(url, services, services.settings.data_dir.parent)
        yield server
        server.client.close()


def error_of(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_from_post_to_an_active_version(server: Server) -> None:
    response = server.create("first", description="made by a test")
    assert response.status_code == 202
    body = response.json()
    job_id = body["job"]["id"]
    assert response.headers["Location"] == f"/jobs/{job_id}"
    assert (body["adapter"]["active_version"], body["job"]["status"]) == (None, "queued")
    before = server.complete("first")  # served at once
    assert before["metrics"]["adapter_version"] is None
    assert server.work()
    after = server.complete("first")
    assert (after["metrics"]["adapter"], after["metrics"]["adapter_version"]) == ("first", 1)
    assert after["choices"][0]["text"] == before["choices"][0]["text"]
    job = server.client.get(f"/jobs/{job_id}").json()
    assert (job["status"], job["progress"], job["result"]["version"]) == ("succeeded", 1.0, 1)
    assert job["result"]["activated"] is True
    adapter = server.client.get("/adapters/first").json()
    assert adapter["description"] == "made by a test"
    assert adapter["versions"][0]["metrics"]["after"] == {"mean_acceptance_length": 3.0}
    assert [event["type"] for event in adapter["events"]] == ["in_service", "activated", "registered"]
    assert 0 <= adapter["events"][0]["data"]["seconds_after_activation"] < 30
    assert "first" in [card["id"] for card in server.client.get("/v1/models").json()["data"]]
    assert job_id in [job["id"] for job in server.client.get("/jobs?adapter=first").json()["data"]]
    metrics = server.client.get("/metrics").text
    assert 'eda:adaptation_jobs{state="succeeded"}' in metrics


def test_a_second_job_makes_the_next_version_and_a_worse_one_is_not_activated(server: Server) -> None:
    server.create("second")
    server.work()
    response = server.client.post("/adapters/second/jobs", json={"data": {"self": 4}})
    assert response.status_code == 202
    server.work(after=2.51)  # the version in service has 2.5; two per cent more are asked for
    job = server.client.get(response.headers["Location"]).json()
    assert (job["result"]["version"], job["result"]["activated"]) == (2, False)
    assert "2.510 against 2.500 of version 1" in job["result"]["reason"]
    assert server.complete("second")["metrics"]["adapter_version"] == 1
    for version in (2, 1, None):
        answer = server.client.post("/adapters/second/activate", json={"version": version})
        assert answer.json()["active_version"] == version
        assert server.complete("second")["metrics"]["adapter_version"] == version
    missing = server.client.post("/adapters/second/activate", json={"version": 9})
    assert missing.status_code == 404
    assert "there are: 1, 2" in error_of(missing)["message"]
    assert server.client.post("/adapters/second/activate", json={}).status_code == 400


def test_triage_may_end_a_job_without_a_version(server: Server) -> None:
    location = server.create("easy").headers["Location"]
    server.work(worthwhile=False)
    job = server.client.get(location).json()
    assert (job["status"], job["result"]["version"], job["result"]["reason"]) == (
        "succeeded",
        None,
        "as told",
    )
    assert server.client.get("/adapters/easy").json()["versions"] == []


def events_in(text: str) -> list[tuple[int, str, dict[str, Any]]]:
    parsed = []
    for block in text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if "id" in fields:
            parsed.append((int(fields["id"]), fields["event"], json.loads(fields["data"])))
    return parsed


def test_events_stream_and_resume(server: Server) -> None:
    location = server.create("watched").headers["Location"]
    texts: list[str] = []
    watching = threading.Thread(target=lambda: texts.append(server.client.get(f"{location}/events").text))
    watching.start()
    server.work(steps=3)
    watching.join(20)
    events = events_in(texts[0])
    kinds = [kind for _, kind, _ in events]
    assert (kinds[0], kinds[-1]) == ("queued", "succeeded")
    assert kinds.count("stage_finished") == 6
    assert "metric" in kinds
    middle = events[len(events) // 2][0]
    rest = server.client.get(f"{location}/events", headers={"Last-Event-ID": str(middle)})
    assert rest.headers["content-type"].startswith("text/event-stream")
    assert events_in(rest.text) == [event for event in events if event[0] > middle]
    done = server.client.get(f"{location}/events", headers={"Last-Event-ID": str(events[-1][0])})
    assert done.status_code == 204
    assert server.client.get("/jobs/job-unknown/events").status_code == 404


def test_cancel_and_retry(server: Server) -> None:
    location = server.create("stopped").headers["Location"]
    assert server.client.post(f"{location}/cancel").json()["status"] == "cancelled"
    assert not server.work()
    assert server.client.post(f"{location}/retry").json()["status"] == "queued"
    assert server.client.post(f"{location}/retry").status_code == 409
    server.work()
    assert server.client.get(location).json()["status"] == "succeeded"
    assert server.client.post(f"{location}/cancel").status_code == 409
    assert server.client.post("/jobs/nothing/cancel").status_code == 404


def test_eight_posts_at_once(server: Server) -> None:
    names = [f"crowd-{index}" for index in range(4)] * 2
    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(lambda name: server.create(name).status_code, names))
    assert sorted(statuses) == [202] * 4 + [409] * 4
    while server.work():
        pass
    for name in set(names):
        assert server.client.get(f"/adapters/{name}").json()["active_version"] == 1
    assert list(server.adapters.workspaces.root.glob("job-*")) == []


def test_idempotency_key(server: Server) -> None:
    key = {"Idempotency-Key": "once-only"}
    body = server.body("idempotent")
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: server.client.post("/adapters", json=body, headers=key), range(4)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["job"]["id"] for answer in answers}) == 1
    other = server.client.post("/adapters", json=server.body("idempotent-2"), headers=key)
    assert other.status_code == 409
    assert "was used for another request" in error_of(other)["message"]
    server.work()


def test_too_many_waiting_jobs(server: Server) -> None:
    server.adapters.queue.queue_limit = 1
    try:
        assert server.create("waits").status_code == 202
        refused = server.create("too-many")
        assert (refused.status_code, refused.headers["Retry-After"]) == (429, "60")
        assert error_of(refused)["type"] == "rate_limit_error"
        assert server.client.get("/adapters/too-many").status_code == 404
    finally:
        server.adapters.queue.queue_limit = 12
    server.work()


def test_full_disk(server: Server) -> None:
    limits = server.adapters.settings.data_limits
    object.__setattr__(limits, "reserve_bytes", 10**18)
    try:
        refused = server.create("no-room")
    finally:
        object.__setattr__(limits, "reserve_bytes", 0)
    assert refused.status_code == 507
    assert "MiB left" in error_of(refused)["message"]
    assert server.client.get("/adapters/no-room").status_code == 404


def test_delete_while_streaming(server: Server) -> None:
    server.create("doomed")
    server.work()
    expected = server.complete("doomed", max_tokens=60)["choices"][0]["text"]
    text = ""
    body = {
        "model": "doomed",
        "prompt": "the quick brown",
        "max_tokens": 60,
        "temperature": 0,
        "stream": True,
    }
    with server.client.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        text += json.loads(next(lines).removeprefix("data: "))["choices"][0]["text"]
        assert server.client.delete("/adapters/doomed").status_code == 202
        assert server.client.post("/v1/completions", json=body).status_code == 404
        for line in lines:
            if line.startswith("data: {") and (choices := json.loads(line.removeprefix("data: "))["choices"]):
                text += choices[0]["text"]
    assert text == expected
    server.adapters.registry.sync()
    assert server.adapters.registry.store.versions("doomed") == []
    assert server.create("doomed").status_code == 202
    server.work()


def test_patch_and_recorded_traffic(server: Server) -> None:
    server.create("recorded")
    server.work()
    server.complete("recorded")
    assert server.adapters.traffic.usage("recorded").num_records == 0  # off by default
    patched = server.client.patch(
        "/adapters/recorded",
        json={"record_traffic": True, "description": "x", "limits": {"traffic_max_mib": 1}},
    ).json()
    assert (patched["traffic"]["recording"], patched["description"], patched["limits"]) == (
        True,
        "x",
        {"traffic_max_mib": 1},
    )
    refused = server.client.post("/adapters/recorded/jobs", json={"data": {"traffic": {"min_requests": 3}}})
    assert refused.status_code == 400
    assert "there are 0" in error_of(refused)["message"]
    for _ in range(3):
        answer = server.complete("recorded", return_token_ids=True)
    server.adapters.traffic.stop()
    server.adapters.traffic.start()
    posted = server.client.post("/adapters/recorded/jobs", json={"data": {"traffic": {"min_requests": 3}}})
    assert posted.status_code == 202, posted.text
    workspace = server.adapters.workspaces.directory(posted.json()["job"]["id"])
    rows = [json.loads(line) for line in (workspace / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    assert rows[0]["response_ids"] == answer["choices"][0]["token_ids"]
    assert server.client.delete("/adapters/recorded/traffic").status_code == 204
    assert server.client.get("/adapters/recorded").json()["traffic"]["num_records"] == 0
    server.work()


def test_lora_aliases(server: Server) -> None:
    body = {"lora_name": "plain", "lora_path": server.lora("one")}
    loaded = server.client.post("/v1/load_lora_adapter", json=body)
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'plain' added successfully.")
    assert server.complete("plain")["metrics"]["adapter"] is None
    again = server.client.post("/v1/load_lora_adapter", json=body)
    assert again.status_code == 400
    assert error_of(again)["param"] == "lora_name"
    assert server.client.post("/v1/unload_lora_adapter", json={"lora_name": "plain"}).status_code == 200
    assert server.client.post("/v1/unload_lora_adapter", json={"lora_name": "plain"}).status_code == 404
    for change, param in (({"lora_name": "a/b"}, "lora_name"), ({"lora_path": "/etc"}, "lora_path")):
        wrong = error_of(server.client.post("/v1/load_lora_adapter", json=body | change))
        assert wrong["param"] == param
        assert wrong["message"].startswith(f"{param} is {next(iter(change.values()))!r}")


def test_upload(server: Server) -> None:
    request = {key: value for key, value in server.body("uploaded").items() if key != "data"}
    content = b'{"prompt": "one"}\n{"messages": [{"role": "user", "content": "two"}]}\n'
    form = {"data": {"request": json.dumps(request)}, "files": {"file": ("p.jsonl", content)}}
    response = server.client.post("/adapters/upload", **form)
    assert response.status_code == 202, response.text
    broken = server.client.post(
        "/adapters/uploaded/jobs/upload", data={"request": "{}"}, files={"file": b"{}\n{"}
    )
    assert broken.status_code == 400
    assert "file, line 1" in error_of(broken)["message"]
    odd = server.client.post("/adapters/upload", data={"request": '{"name": 1}'}, files={"file": content})
    assert (odd.status_code, error_of(odd)["param"]) == (400, "request.name")
    server.work()


def test_a_fine_tune_that_does_not_fit(server: Server) -> None:
    path = server.directory / "loras" / "misfit"
    save_lora(path, 5)
    save_file({}, path / "adapter_model.safetensors")
    refused = server.create("misfit", target={"path": str(path)})
    assert refused.status_code == 400
    assert error_of(refused)["param"] == "target"
    wrong_kind = server.create("misfit", target={"path": server.lora("one"), "kind": "full"})
    assert error_of(wrong_kind)["param"] == "target.kind"
    hub = server.create("misfit", target={"hub_id": "some/thing"})
    assert "not allowed on this server" in error_of(hub)["message"]


def test_a_storm_of_activations_under_load(server: Server) -> None:
    server.create("stormy")
    server.work(steps=2)
    server.client.post("/adapters/stormy/jobs", json={"data": {"self": 4}, "activate": "always"})
    server.work(steps=3)  # another seed, so another module
    prompts = ["the quick", "1 + 2", "lazy dog and"]
    expected = {
        prompt: server.complete("stormy", prompt=prompt, draft="none")["choices"] for prompt in prompts
    }
    seen: list[int | None] = []

    def is_over() -> bool:
        """Enough answers, of more than one version unless the machine never gets to swapping between two of them."""
        return len(seen) >= 60 and (len(set(seen)) >= 2 or len(seen) >= 1000)

    def ask(place: int) -> None:
        while not is_over():
            answer = server.complete("stormy", prompt=prompts[place])
            assert answer["choices"] == expected[prompts[place]]
            seen.append(answer["metrics"]["adapter_version"])

    def activate(place: int) -> None:
        for turn in count(place):
            if is_over():
                return
            body = {"version": (None, 1, 2)[turn % 3]}
            assert server.client.post("/adapters/stormy/activate", json=body).status_code == 200

    with ThreadPoolExecutor(5) as pool:
        working = [pool.submit(ask, place) for place in range(3)] + [
            pool.submit(activate, n) for n in range(2)
        ]
        for future in working:
            future.result()
    assert len(set(seen)) >= 2
    state = server.client.get("/adapters/stormy").json()
    served = server.complete("stormy")["metrics"]["adapter_version"]
    assert (served, state["num_requests"]) == (state["active_version"], 0)
    live = {version["version"]: version["live"] for version in state["versions"]}
    assert any(figures and figures["num_passes"] > 0 for figures in live.values())


def test_models_of_the_settings_cannot_be_deleted_but_adapted(server: Server) -> None:
    refused = server.client.delete("/adapters/base")
    assert (refused.status_code, error_of(refused)["type"]) == (409, "invalid_request_error")
    listed = {adapter["name"]: adapter for adapter in server.client.get("/adapters").json()["data"]}
    assert (listed["base"]["kind"], listed["base"]["origin"]) == ("target", "configured")
    posted = server.client.post("/adapters/base/jobs", json={"data": {"prompts": PROMPTS}})
    assert posted.status_code == 202
    server.work()
    assert server.complete("base")["metrics"]["adapter_version"] == 1
    server.client.post("/adapters/base/activate", json={"version": None})


def test_the_guard_rolls_back_what_does_harm_in_service(server: Server) -> None:
    server.create("harmful")
    server.work()
    guard, registry = server.adapters.registry.guard, server.adapters.registry
    original = guard.settings
    guard.settings = GuardSettings(baseline_share=0.5, min_passes=20, patience_seconds=0.0)
    try:
        for _ in range(8):
            server.complete("harmful")
        assert (adapted := guard.live("harmful", 1)) is not None
        assert (baseline := guard.live("harmful", None)) is not None
        assert (adapted.num_requests, baseline.num_requests) == (4, 4)
        for _ in range(40):  # a random module does no harm worth speaking of; say that it did
            guard.observe("harmful", 1, 10, 11)
            guard.observe("harmful", None, 10, 30)
        watcher = RegistryWatcher(registry)
        watcher.poll()
        watcher.poll()
    finally:
        guard.settings = original
    adapter = server.client.get("/adapters/harmful").json()
    assert (adapter["active_version"], adapter["rejected_versions"]) == (None, [1])
    assert "rolled_back" in [event["type"] for event in adapter["events"]]
    assert server.complete("harmful")["metrics"]["adapter_version"] is None
    assert 'eda:adapter_rollbacks_total{model_name="harmful"} 1.0' in server.client.get("/metrics").text


@pytest.mark.parametrize(
    ("training", "param", "message"),
    [
        (
            {"keep": -1},
            "training.keep",
            "training.keep: Input should be greater than or equal to 0.01; got -1",
        ),
        ({"num_steps": "many"}, "training.num_steps", "valid integer"),
        ({"widht": 4}, "training.widht", "the parameter 'training.widht' is not supported"),
        ({"score": "luck"}, "training.score", "training.score is 'luck'; it must be one of"),
        ({"intermediate_size": 0, "fc_rank": 0, "attention_rank": 0}, "training", "nothing would be trained"),
        ([1], "training", "training: "),
    ],
)
def test_wrong_training_options_are_named(server: Server, training: object, param: str, message: str) -> None:
    response = server.client.post("/adapters", json={**server.body("untrained"), "training": training})
    assert response.status_code == 400
    error = error_of(response)
    assert error["param"] == param
    assert message in error["message"]
